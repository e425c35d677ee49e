"""What is judged or written at the end of a walk lies where a loop, closed on the way, has moved it."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from evaluation.evaluation_judges import evo
from scipy.spatial import cKDTree
from walks import LAP, bundled, frames_of, images_of

from stac_core import Config, Prediction, StreamSession, unproject_depth
from stac_core.evaluation.datasets import open_sequence
from stac_core.evaluation.scene_run import run_scene
from stac_core.evaluation.trajectory import Trajectory, read_tum, write_tum
from stac_core.prediction import moved_on
from stac_core.reconstruct import CELL, DEPTH_PNG_UNITS, main
from stac_core.training.evaluate import measure_stream
from stac_core.training.figures import turn_error

RESUMED = 20  # frame
CHUNK = 4


@dataclass(frozen=True)
class Walk:
    """The lap as a stream says it, and as moved at its end."""

    said: Prediction  # all frames
    moved: Prediction
    saved: Path  # the stream before frame RESUMED

    @property
    def true(self) -> np.ndarray:
        return np.stack([frame.world_from_camera for frame in frames_of(LAP)])


@pytest.fixture(scope="module")
def walk(tmp_path_factory) -> Walk:
    saved, said = tmp_path_factory.mktemp("lap") / "stream.safetensors", []
    stream, frames = StreamSession(bundled(), Config()), frames_of(LAP)
    for first in range(0, len(frames), CHUNK):
        if first == RESUMED:
            stream.save(saved)
        said.append(stream.step(images_of(frames[first : first + CHUNK]), frames[0].intrinsics).to_host())
    return Walk(joined(said), joined(moved_on(said)), saved)


def joined(predictions: list[Prediction]) -> Prediction:
    names = ("pose_encoding", "world_from_camera", "intrinsics", "depth", "depth_confidence")
    return Prediction(*(torch.cat([getattr(p, name) for p in predictions]) for name in names))


def poses(of: Prediction) -> np.ndarray:
    return of.world_from_camera.double().numpy()


def test_a_run_is_judged_as_it_lies_at_its_end(walk, tmp_path):
    run = run_scene(open_sequence(LAP), bundled(), Config(), tmp_path / "run")
    found = run.trajectory.world_from_camera
    assert np.allclose(found, poses(walk.moved), atol=1e-5) and not np.allclose(found, poses(walk.said))
    assert np.allclose(run.depth, walk.moved.depth, rtol=1e-5) and not np.allclose(run.depth, walk.said.depth)
    write_tum(tmp_path / "truth.tum", Trajectory(run.trajectory.stamps_ns, walk.true))
    errors = []
    for estimate in (found, poses(walk.said)):
        write_tum(tmp_path / "estimate.tum", Trajectory(run.trajectory.stamps_ns, estimate))
        errors.append(evo("evo_ape", tmp_path, "--align_origin", "-r", "angle_deg")["mean"])
    print(f"turned by {errors[0]:.2f}°, as said by {errors[1]:.2f}°")
    assert errors[0] < 0.8 * errors[1]


def test_figures_of_a_stream_are_those_of_its_end(walk):
    figures = measure_stream(bundled(), frames_of(LAP), calibrated=True)
    assert figures.rotation_deg == pytest.approx(turn_error(poses(walk.moved), walk.true), rel=1e-4)
    assert figures.rotation_deg < 0.8 * turn_error(poses(walk.said), walk.true)


def case_of(first: int, folder: Path) -> Path:
    """The walk from one frame on, as a recording with its camera."""
    frames = frames_of(LAP)[first:]
    (fx, _, cx), (_, fy, cy), _ = frames[0].intrinsics.tolist()
    folder.mkdir()
    for number, image in enumerate(images_of(frames)):
        cv2.imwrite(str(folder / f"{number}.png"), image[..., ::-1])
    rows = [{"rgb": f"{number}.png"} for number in range(len(frames))]
    camera = dict(fx=fx, fy=fy, cx=cx, cy=cy)
    (folder / "case.json").write_text(json.dumps({"camera": camera, "frames": rows}))
    return folder


def test_what_is_written_lies_where_it_was_moved_though_the_stream_began_in_another_run(walk, tmp_path):
    """Path, cloud and depth maps of the frames since; loops also move submaps that this run has not seen."""
    flags = ["--quiet", "--conf_percent", "0", "--resume", str(walk.saved), "--output_dir", str(tmp_path)]
    assert main(["--scene_dir", str(case_of(RESUMED, tmp_path / "case")), *flags]) == 0
    assert json.loads((tmp_path / "stats.json").read_text())["stats"]["loops"] > 0
    moved, said = (p.map(lambda tensor: tensor[RESUMED:]) for p in (walk.moved, walk.said))
    assert np.allclose(read_tum(tmp_path / "trajectory.tum").world_from_camera, poses(moved), atol=1e-5)
    files = sorted((tmp_path / "depth").iterdir())
    written = np.stack([cv2.imread(str(file), cv2.IMREAD_UNCHANGED) for file in files]) / DEPTH_PNG_UNITS
    assert np.abs(written - moved.depth.numpy()).max() < 1.1 / DEPTH_PNG_UNITS
    assert np.abs(written - said.depth.numpy()).max() > 0.05
    cloud, cell = points_in(tmp_path / "cloud.ply"), CELL * float(said.depth[0].median())
    now, before = (cKDTree(points_of(p)) for p in (moved, said))
    assert now.query(cloud)[0].max() < 1e-5
    assert before.query(cloud[::17])[0].max() > 10 * cell
    assert np.percentile(cKDTree(cloud).query(now.data[::17])[0], 99) < 5 * cell  # nothing is missing


def points_in(ply: Path) -> np.ndarray:
    body = ply.read_bytes().split(b"end_header\n", 1)[1]
    vertices = np.frombuffer(body, [("position", "<f4", 3), ("colour", "u1", 3)])
    return vertices["position"].astype(np.float64)


def points_of(p: Prediction) -> np.ndarray:
    return unproject_depth(p.depth, p.intrinsics, p.world_from_camera).reshape(-1, 3).numpy()
