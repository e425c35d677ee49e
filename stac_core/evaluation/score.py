"""From a run and a sequence's truth to the columns of one result row."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from itertools import chain, tee

import numpy as np
import torch
from numpy.typing import NDArray

from stac_core.confidence import most_confident
from stac_core.evaluation.alignment import Similarity, align_points
from stac_core.evaluation.cloud_metrics import cloud_errors, voxel_downsample
from stac_core.evaluation.datasets import Frame, Sequence
from stac_core.evaluation.depth_metrics import depth_errors, valid_pixels
from stac_core.evaluation.registration import register
from stac_core.evaluation.scene_run import SceneRun, true_frames
from stac_core.evaluation.trajectory import Trajectory
from stac_core.evaluation.trajectory_metrics import pose_errors
from stac_core.geometry import VALID_DEPTH, unproject_depth

Array = NDArray[np.float64]
_PAIRS_PER_FRAME = 2000  # corresponding points for the alignment; more change nothing
_MOST_PAIRS = 4_000_000  # of all frames; bounds the memory of a long sequence
_ENOUGH = 50_000  # points for a registration, or up to twice as many
_COMPACT_ABOVE = 4_000_000  # points; bounds the memory of a growing cloud


@dataclass(frozen=True)
class ReconOptions:
    """Lengths in metres. Raises ValueError for a value that judges nothing."""

    voxel_size: float = 0.02  # both clouds are thinned to this
    threshold: float = 0.05  # distance of the F-score
    icp_distance: float = 0.1  # pairs farther apart do not register; 0 = no registration
    drop_percent: float = 0.0  # least confident share of each frame that is left out

    def __post_init__(self) -> None:
        for name, cure in (("voxel_size", ""), ("threshold", ""), ("icp_distance", ", or 0 for none")):
            length = getattr(self, name)
            if not 0 < length < np.inf and not (cure and length == 0):
                raise ValueError(f"{name} = {length:g}: must be positive{cure}")
        if not 0 <= self.drop_percent < 100:
            raise ValueError(f"drop_percent = {self.drop_percent:g}: must lie between 0 and 100")


def score_pose(run: SceneRun, sequence: Sequence, align: str) -> dict[str, float]:
    """Pose columns over the frames that have a true pose. Raises ValueError where fewer than two do."""
    known = [
        (number, frame.world_from_camera)
        for number, frame in true_frames(run, sequence)
        if frame.world_from_camera is not None
    ]
    if len(known) < 2:
        raise ValueError(
            f"{sequence.name}: {len(known)} frames with a true pose; pose errors need at least 2"
        )
    numbers = np.array([number for number, _ in known])
    truth = Trajectory(run.trajectory.stamps_ns[numbers], np.array([pose for _, pose in known]))
    return pose_errors(run.trajectory.take(numbers), truth, align)


def score_depth(run: SceneRun, sequence: Sequence, align: str, per: str) -> dict[str, float]:
    """Depth columns over the frames that have true depth. Raises ValueError where none has."""
    known = (
        (run.camera_depth(number), frame.depth_m)
        for number, frame in true_frames(run, sequence)
        if frame.depth_m is not None
    )
    first = next(known, None)
    if first is None:
        raise ValueError(f"{sequence.name}: no frame has true depth")
    predicted, true = tee(chain([first], known))  # which go on together: no map waits for long
    return depth_errors((p for p, _ in predicted), (t for _, t in true), align, per, sequence.max_depth_m)


def score_recon(run: SceneRun, sequence: Sequence, options: ReconOptions) -> dict[str, float]:
    """Cloud columns: align by corresponding pixels (with scale), register, compare.

    Truth is the sequence's own cloud, or its depth seen from its poses. Raises ValueError where the
    sequence holds neither.
    """
    ours, theirs, alignment = reconstruct(run, sequence, options)
    if options.icp_distance:
        fine = register(thin(ours), theirs, options.icp_distance)
        ours, alignment = fine.apply(ours), fine.after(alignment)
    errors = cloud_errors(ours, theirs, options.threshold)
    return {**asdict(errors), "points": float(len(ours)), "recon_scale": alignment.scale}


def reconstruct(run: SceneRun, sequence: Sequence, options: ReconOptions) -> tuple[Array, Array, Similarity]:
    """Predicted cloud in the true world, true cloud, and the similarity that moved the first."""
    alignment = _align(run, sequence, options)
    ours, theirs = GrowingCloud(options.voxel_size), GrowingCloud(options.voxel_size)
    surface = sequence.cloud()
    for number, frame in true_frames(run, sequence):
        predicted, true = _corresponding(run, number, frame, sequence.max_depth_m, options)
        ours.add(alignment.apply(predicted if surface is None else predicted_points(run, number, options)))
        if surface is None:
            theirs.add(true)
    if surface is not None:
        theirs.add(surface)
    return ours.points(), theirs.points(), alignment


def _align(run: SceneRun, sequence: Sequence, options: ReconOptions) -> Similarity:
    """By pixels with true depth and pose; by camera centres where the truth is a cloud alone."""
    sources, targets = [], []
    for number, frame in true_frames(run, sequence):
        predicted, true = _corresponding(run, number, frame, sequence.max_depth_m, options)
        sources.append(enough_to_align(predicted, len(run.indices)))
        targets.append(enough_to_align(true, len(run.indices)))
        if not len(true) and frame.depth_m is None and frame.world_from_camera is not None:
            sources.append(run.trajectory.centres[[number]])
            targets.append(frame.world_from_camera[None, :3, 3])
    if not any(map(len, targets)):
        raise ValueError(f"{sequence.name}: no frame has true depth, pose and intrinsics; use --no_recon")
    return align_points(np.concatenate(sources), np.concatenate(targets), with_scale=True)


def enough_to_align(points: Array, frames: int) -> Array:
    """Of the points [N, 3] of one of so many frames every n-th, the same of those that correspond."""
    wanted = max(1, min(_PAIRS_PER_FRAME, _MOST_PAIRS // frames))
    return points[:: max(1, len(points) // wanted)].copy()  # a view would keep all of them in memory


def _corresponding(
    run: SceneRun, number: int, frame: Frame, max_depth_m: float, options: ReconOptions
) -> tuple[Array, Array]:
    """Predicted and true points [M, 3] of the pixels that have both; [0, 3] without truth."""
    if frame.depth_m is None or frame.world_from_camera is None or frame.intrinsics is None:
        return np.empty((0, 3)), np.empty((0, 3))
    depth = run.camera_depth(number)
    both = valid_pixels(depth, frame.depth_m, max_depth_m) & _confident(run, number, options)
    ours = unproject(depth, run.camera_intrinsics[number], run.trajectory.world_from_camera[number])
    theirs = unproject(frame.depth_m, frame.intrinsics, frame.world_from_camera)
    return ours[both], theirs[both]


def predicted_points(run: SceneRun, number: int, options: ReconOptions) -> Array:
    """All points [M, 3] of one frame in the stream's own world."""
    depth = run.camera_depth(number)
    points = unproject(depth, run.camera_intrinsics[number], run.trajectory.world_from_camera[number])
    return points[(depth > VALID_DEPTH) & _confident(run, number, options)]


def _confident(run: SceneRun, number: int, options: ReconOptions) -> NDArray[np.bool_]:
    confidence = run.camera_confidence(number)
    if not options.drop_percent:
        return np.ones(confidence.shape, bool)
    return most_confident(confidence > 0, confidence, options.drop_percent)


def unproject(depth: NDArray, intrinsics: Array, world_from_camera: Array) -> Array:
    tensors = (
        torch.from_numpy(np.asarray(array, np.float64)) for array in (depth, intrinsics, world_from_camera)
    )
    return unproject_depth(*tensors).numpy()


def thin(points: Array) -> Array:
    """Enough points for a registration."""
    return points[:: max(1, len(points) // _ENOUGH)]


class GrowingCloud:
    """Points of many frames, thinned as they come."""

    def __init__(self, voxel_size: float) -> None:
        self._voxel_size = voxel_size
        self._parts: list[Array] = []
        self._count = 0

    def add(self, points: Array) -> None:
        self._parts.append(voxel_downsample(points, self._voxel_size))
        self._count += len(self._parts[-1])
        if self._count > _COMPACT_ABOVE:
            self._parts = [self.points()]
            self._count = len(self._parts[0])

    def points(self) -> Array:
        """The cloud [N, 3] so far. Raises ValueError where it would be empty."""
        if not self._count:
            raise ValueError("the cloud is empty: no pixel has both a predicted and a true point")
        return voxel_downsample(np.concatenate(self._parts), self._voxel_size)
