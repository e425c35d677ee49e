"""Judge a node's recorded answer against the truth of the bag that was replayed to it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from itertools import tee
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray

from stac_core.evaluation.alignment import Similarity, align_points
from stac_core.evaluation.bag_result import BagResult
from stac_core.evaluation.cloud_metrics import cloud_errors
from stac_core.evaluation.datasets.bag import BagSequence
from stac_core.evaluation.datasets.sequence import same_view
from stac_core.evaluation.depth_metrics import depth_errors, valid_pixels
from stac_core.evaluation.registration import register
from stac_core.evaluation.results import MIB
from stac_core.evaluation.score import GrowingCloud, ReconOptions, enough_to_align, thin, unproject
from stac_core.evaluation.trajectory import Trajectory, pair_by_stamp
from stac_core.evaluation.trajectory_metrics import pose_errors

QUALITY = ("pose", "depth", "cloud")


class NoTruth(ValueError):
    """The bag, or the recording of the answer, does not hold what a measure compares with."""


@dataclass
class BagReport:
    """Figures of one replay; what is not judged says why."""

    figures: dict[str, dict[str, Any]] = field(default_factory=dict)  # section → name → value
    untold: dict[str, str] = field(default_factory=dict)  # section → which truth the bag lacks
    failed: dict[str, str] = field(default_factory=dict)  # section → why the answer cannot be judged

    def judge(self, section: str, measure: Callable[[], dict[str, Any]]) -> None:
        """Add a section, or the reason why it cannot be."""
        try:
            figures = measure()
            if not all(np.isfinite(value) for value in figures.values() if isinstance(value, float)):
                raise ValueError(f"a figure is not finite: {figures}")
            self.figures[section] = figures
        except NoTruth as error:
            self.untold[section] = str(error)
        except ValueError as error:
            self.failed[section] = str(error)

    def row(self) -> dict[str, float]:
        """All figures flat, for the result table."""
        return {name: value for section in self.figures.values() for name, value in section.items()}


def judge_bag(
    sequence: BagSequence, result: BagResult, pose_align: str, depth_align: str, options: ReconOptions
) -> BagReport:
    """Every figure that bag and answer allow; quality needs truth in the bag."""
    report = BagReport()
    report.judge("frames", lambda: _frame_counts(sequence, result))
    report.judge("latency", lambda: _latency(result))
    report.judge("pose", lambda: pose_errors(*paired_paths(sequence, result), pose_align))
    report.judge("depth", lambda: _judge_depth(sequence, result, depth_align))
    report.judge("cloud", lambda: _judge_cloud(sequence, result, options))
    report.judge("memory", lambda: _memory(result))
    return report


def _frame_counts(sequence: BagSequence, result: BagResult) -> dict[str, Any]:
    """Where the recording does not tell what was sent, every image of the bag was."""
    used = len(result.trajectory)
    sent = len(result.sent_ns.keys() | result.pose_logged_ns.keys()) if result.sent_ns else len(sequence)
    seconds = _seconds(result)
    chunks = result.diagnostics().texts.get("inference: chunks")  # such as "5 of 4, 1 of 3"
    return {
        "frames": len(sequence),
        "frames_sent": sent,
        "frames_used": used,
        "frames_dropped": sent - used,
        **({"chunks": chunks} if chunks else {}),
        "seconds": seconds,
        "frames_per_second": used / seconds if seconds > 0 else 0.0,
    }


def _seconds(result: BagResult) -> float:
    """From the first image, or else the first answer, to the last answer."""
    begin = min(min(times.values()) for times in (result.sent_ns, result.pose_logged_ns) if times)
    return (max(result.pose_logged_ns.values()) - begin) / 1e9


def _latency(result: BagResult) -> dict[str, float]:
    if not result.sent_ns:
        raise NoTruth("the recording holds neither the images nor when they were sent")
    values = np.array(list(result.latency_ms().values()))
    if not len(values):
        raise ValueError("no answer carries the stamp of a recorded image")
    return {
        "latency_median_ms": float(np.median(values)),
        "latency_p95_ms": float(np.percentile(values, 95)),
        "latency_max_ms": float(values.max()),
    }


def _memory(result: BagResult) -> dict[str, float]:
    """Largest of every diagnostics value that speaks of memory, and of what tables call the cache."""
    diagnostics = result.diagnostics()
    series = diagnostics.matching("bytes", "tokens", "voxels", "slots", "points")
    if not series:
        raise NoTruth("no diagnostics about memory were recorded")
    largest = {f"{name} (max)": max(values) for name, (_, values) in series.items()}
    parts = [diagnostics.numbers[name] for name in _CACHE_PARTS if name in diagnostics.numbers]
    if parts:
        largest["cache_mib_max"] = max(map(sum, zip(*parts, strict=False))) / MIB
    return largest


_CACHE_PARTS = ("memory: cache.live_bytes", "memory: cache.voxel_bytes")


def paired_paths(sequence: BagSequence, result: BagResult) -> tuple[Trajectory, Trajectory]:
    if sequence.truth is None:
        raise NoTruth(
            "no camera path to judge by: the bag holds none (TF, Odometry or PoseStamped), or none is asked "
            "for; name a TUM file with --truth"
        )
    return pair_by_stamp(result.trajectory, sequence.truth)


DepthPair = tuple[int, NDArray[np.float32], NDArray[np.float32]]


def depth_numbers(sequence: BagSequence, result: BagResult) -> list[int]:
    """Numbers of the images that have both a predicted and a true depth."""
    if not sequence.depth_topic:
        raise NoTruth("the bag holds no depth topic (32FC1 or 16UC1)")
    published = set(result.depth_stamps_ns.tolist())
    if not published:
        raise ValueError("the node published no depth")
    answered = (i for i, stamp in enumerate(sequence.stamps_ns.tolist()) if stamp in published)
    numbers = [number for number in answered if sequence.has_depth(number)]
    if not numbers:
        raise ValueError("no published depth carries the stamp of an image with true depth")
    return numbers


def depth_pairs(sequence: BagSequence, result: BagResult, numbers: list[int]) -> Iterator[DepthPair]:
    """Number, predicted and true depth of one size, one image after the other.

    They keep their sizes where these cannot show the same view.
    """
    for number in numbers:
        truth = sequence.depth(number)
        assert truth is not None, "numbers are those of images with true depth"
        predicted = result.depth(int(sequence.stamps_ns[number]))
        if predicted.shape != truth.shape and same_view(predicted.shape, truth.shape):
            resized = cv2.resize(predicted, truth.shape[::-1], interpolation=cv2.INTER_NEAREST)
            predicted = np.asarray(resized, np.float32)
        yield number, predicted, truth


def _judge_depth(sequence: BagSequence, result: BagResult, align: str) -> dict[str, float]:
    ours, theirs = tee(depth_pairs(sequence, result, depth_numbers(sequence, result)))
    return depth_errors((p for _, p, _ in ours), (t for _, _, t in theirs), align)


def _judge_cloud(sequence: BagSequence, result: BagResult, options: ReconOptions) -> dict[str, float]:
    """The node's last map against the surface seen by the true depth from the true poses."""
    if not sequence.depth_topic:
        raise NoTruth("the bag holds no depth topic to see the true surface by")
    if sequence.depth_intrinsics is None:
        raise NoTruth("the bag holds no calibration (CameraInfo) to see the true surface by")
    paired_paths(sequence, result)  # says what is missing where the two paths do not meet
    found = result.map_cloud()
    if found is None or not len(found.points):
        raise ValueError("the node published no map")
    alignment = _align_by_pixels(sequence, result)
    ours = GrowingCloud(options.voxel_size)
    ours.add(alignment.apply(found.points))
    theirs = _true_cloud(sequence, options.voxel_size)
    moved = ours.points()
    if options.icp_distance:
        moved = register(thin(moved), theirs, options.icp_distance).apply(moved)
    return asdict(cloud_errors(moved, theirs, options.threshold))


def _align_by_pixels(sequence: BagSequence, result: BagResult) -> Similarity:
    """Map to true world by points of the same pixels, seen by the node's depth and by the true one.

    Camera centres alone would leave the scale to a path that may hardly move.
    """
    node_poses = dict(
        zip(result.trajectory.stamps_ns.tolist(), result.trajectory.world_from_camera, strict=True)
    )
    sources, targets, numbers = [], [], depth_numbers(sequence, result)
    for number, predicted, truth in depth_pairs(sequence, result, numbers):
        node_pose = node_poses.get(int(sequence.stamps_ns[number]))
        true_pose = sequence.pose(number)
        if node_pose is None or true_pose is None or sequence.depth_intrinsics is None:
            continue
        both = valid_pixels(predicted, truth)
        ours = unproject(predicted, sequence.depth_intrinsics, node_pose)[both]
        theirs = unproject(truth, sequence.depth_intrinsics, true_pose)[both]
        sources.append(enough_to_align(ours, len(numbers)))
        targets.append(enough_to_align(theirs, len(numbers)))
    if not sources:
        raise ValueError("no published depth belongs to an image with true depth and pose")
    return align_points(np.concatenate(sources), np.concatenate(targets), with_scale=True)


def _true_cloud(sequence: BagSequence, voxel_size: float) -> NDArray[np.float64]:
    cloud = GrowingCloud(voxel_size)
    for number in range(len(sequence)):
        depth, pose = sequence.depth(number), sequence.pose(number)
        if depth is not None and pose is not None and sequence.depth_intrinsics is not None:
            cloud.add(unproject(depth, sequence.depth_intrinsics, pose)[depth > 0])
    return cloud.points()
