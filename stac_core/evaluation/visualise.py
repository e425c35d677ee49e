"""Files to look at: the aligned cloud, the path and some depth maps of one scene."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from matplotlib.figure import Figure
from numpy.typing import NDArray

from stac_core.evaluation.datasets import Sequence
from stac_core.evaluation.plots import close, cloud_from_above, image_grid, path_plot
from stac_core.evaluation.scene_run import SceneRun, true_frames
from stac_core.evaluation.score import GrowingCloud, ReconOptions, predicted_points
from stac_core.evaluation.trajectory import Trajectory
from stac_core.evaluation.trajectory_metrics import align_trajectory
from stac_core.files import replacing
from stac_core.ply import write_ply

_FILES = ("cloud.ply", "cloud.png", "path.png", "depth.png")


def is_drawn(folder: Path) -> bool:
    """Whether `visualise` has written all its files."""
    return all((folder / name).is_file() for name in _FILES)


def visualise(run: SceneRun, sequence: Sequence, folder: Path, options: ReconOptions) -> None:
    """Write `cloud.ply`, `cloud.png`, `path.png` and `depth.png`."""
    folder.mkdir(parents=True, exist_ok=True)
    points = _cloud(run, options)
    write_ply(folder / "cloud.ply", points)
    figures = {
        "cloud.png": cloud_from_above(points, None, run.trajectory, f"{sequence.name}, from above"),
        "path.png": path_plot(_paths(run, sequence), f"{sequence.name}: camera path"),
        "depth.png": _depth_samples(run, sequence),
    }
    for name, figure in figures.items():
        save_figure(folder / name, figure)


def save_figure(path: Path, figure: Figure) -> None:
    """Write a figure as PNG, whole or not at all, and close it."""
    with replacing(path) as temporary:
        figure.savefig(temporary, format="png", dpi=110)
    close(figure)


def _cloud(run: SceneRun, options: ReconOptions) -> NDArray[np.float64]:
    """All predicted points in the stream's own world, thinned in proportion to the scene."""
    scale = float(np.median(run.depth[0]))
    cloud = GrowingCloud(max(scale, 1e-6) * 0.01)
    for number in range(len(run.indices)):
        cloud.add(predicted_points(run, number, options))
    return cloud.points()


def _paths(run: SceneRun, sequence: Sequence) -> dict[str, Trajectory]:
    """The camera's path, on top of the true one where that is known and long enough to align."""
    known = [
        (i, f.world_from_camera) for i, f in true_frames(run, sequence) if f.world_from_camera is not None
    ]
    if len(known) < 2:
        return {"estimate, unaligned": run.trajectory}
    numbers = np.array([number for number, _ in known])
    estimate = run.trajectory.take(numbers)
    truth = Trajectory(estimate.stamps_ns, np.array([pose for _, pose in known]))
    try:
        moved = align_trajectory(estimate, truth, "sim3").apply_poses(estimate.world_from_camera)
    except ValueError:  # a camera that stands still has no shape to align by
        return {"estimate, unaligned": run.trajectory}
    return {"truth": truth, "estimate": Trajectory(estimate.stamps_ns, moved)}


def _depth_samples(run: SceneRun, sequence: Sequence) -> Figure:
    count = len(run.indices)
    shown: list[tuple[str, NDArray]] = []
    for number in sorted({0, count // 2, count - 1}):
        frame = sequence.frame(run.indices[number])
        shown += [(f"frame {run.indices[number]}", frame.image), ("predicted", run.camera_depth(number))]
    return image_grid(shown, 2, f"{sequence.name}: depth in the stream's unit")
