"""Judge a node's recorded answer against the truth of the bag that was replayed to it."""

from __future__ import annotations

import base64
import io
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from typing import Any

import cv2
import numpy as np
from matplotlib.figure import Figure
from numpy.typing import NDArray

from stac_core.evaluation import plots
from stac_core.evaluation.alignment import Similarity, align_points
from stac_core.evaluation.bag_result import BagResult
from stac_core.evaluation.cloud_metrics import cloud_errors
from stac_core.evaluation.datasets.bag import BagSequence
from stac_core.evaluation.depth_metrics import depth_errors, fit_depth, valid_pixels
from stac_core.evaluation.registration import register
from stac_core.evaluation.results import MIB
from stac_core.evaluation.score import PAIRS_PER_FRAME, GrowingCloud, ReconOptions, unproject
from stac_core.evaluation.trajectory import Trajectory, pair_by_stamp
from stac_core.evaluation.trajectory_metrics import absolute_errors, align_trajectory, pose_errors

QUALITY = ("pose", "depth", "cloud")


class NoTruth(ValueError):
    """The bag does not hold what a measure compares with."""


@dataclass
class BagReport:
    """Figures and pictures of one replay; what is not judged says why."""

    figures: dict[str, dict[str, Any]] = field(default_factory=dict)  # section → name → value
    untold: dict[str, str] = field(default_factory=dict)  # section → which truth the bag lacks
    failed: dict[str, str] = field(default_factory=dict)  # section → why the answer cannot be judged
    pictures: dict[str, str] = field(default_factory=dict)  # title → PNG as base64

    def judge(self, section: str, measure: Callable[[], dict[str, Any]]) -> None:
        """Add a section, or the reason why it cannot be."""
        try:
            self.figures[section] = measure()
        except NoTruth as error:
            self.untold[section] = str(error)
        except ValueError as error:
            self.failed[section] = str(error)

    def draw(self, title: str, figure: Figure | None) -> None:
        if figure is None:
            return
        picture = io.BytesIO()
        figure.savefig(picture, format="png", dpi=100)
        plots.close(figure)
        self.pictures[title] = base64.b64encode(picture.getvalue()).decode()

    def row(self) -> dict[str, float]:
        """All figures flat, for the result table."""
        return {name: value for section in self.figures.values() for name, value in section.items()}


def make_report(
    sequence: BagSequence, result: BagResult, pose_align: str, depth_align: str, options: ReconOptions
) -> BagReport:
    """Every figure that bag and answer allow; quality needs truth in the bag."""
    report = BagReport()
    report.judge("frames", lambda: _frame_counts(sequence, result))
    report.judge("latency", lambda: _latency(result))
    report.judge("pose", lambda: pose_errors(*_paired(sequence, result), pose_align))
    report.judge("depth", lambda: _judge_depth(sequence, result, depth_align))
    report.judge("cloud", lambda: _judge_cloud(sequence, result, options))
    report.judge("memory", lambda: _memory(result))
    _draw_all(report, sequence, result, pose_align)
    return report


def _frame_counts(sequence: BagSequence, result: BagResult) -> dict[str, Any]:
    used = len(result.trajectory)
    sent = len(result.sent_ns)
    return {
        "frames": len(sequence),
        "frames_sent": sent,
        "frames_used": used,
        "frames_dropped": sent - used,
        "seconds": _seconds(result),
        "frames_per_second": used / _seconds(result) if _seconds(result) > 0 else 0.0,
    }


def _seconds(result: BagResult) -> float:
    """From the first image to the last answer."""
    if not result.sent_ns:
        return 0.0
    return (max(result.pose_logged_ns.values()) - min(result.sent_ns.values())) / 1e9


def _latency(result: BagResult) -> dict[str, float]:
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


def _paired(sequence: BagSequence, result: BagResult) -> tuple[Trajectory, Trajectory]:
    if sequence.truth is None:
        raise NoTruth(
            "the bag holds no camera path (TF, Odometry or PoseStamped); name a TUM file with --truth"
        )
    return pair_by_stamp(result.trajectory, sequence.truth)


def depth_pairs(
    sequence: BagSequence, result: BagResult
) -> list[tuple[int, NDArray[np.float32], NDArray[np.float32]]]:
    """Number of the image, predicted and true depth of one size, for every image that has both."""
    if not sequence.depth_topic:
        raise NoTruth("the bag holds no depth topic (32FC1 or 16UC1)")
    messages, pairs = result.depths(), []
    if not messages:
        raise ValueError("the node published no depth")
    for index, stamp in enumerate(sequence.stamps_ns):
        truth = sequence.depth(index) if int(stamp) in messages else None
        if truth is not None:
            predicted = result.decode(messages[int(stamp)])
            if predicted.shape != truth.shape:
                resized = cv2.resize(predicted, truth.shape[::-1], interpolation=cv2.INTER_NEAREST)
                predicted = np.asarray(resized, np.float32)
            pairs.append((index, predicted, truth))
    if not pairs:
        raise ValueError("no published depth carries the stamp of an image with true depth")
    return pairs


def _judge_depth(sequence: BagSequence, result: BagResult, align: str) -> dict[str, float]:
    pairs = depth_pairs(sequence, result)
    return depth_errors([p for _, p, _ in pairs], [t for _, _, t in pairs], align)


def _judge_cloud(sequence: BagSequence, result: BagResult, options: ReconOptions) -> dict[str, float]:
    """The node's last map against the surface seen by the true depth from the true poses."""
    if not sequence.depth_topic:
        raise NoTruth("the bag holds no depth topic to see the true surface by")
    if sequence.intrinsics is None:
        raise NoTruth("the bag holds no calibration (CameraInfo) to see the true surface by")
    _paired(sequence, result)  # says what is missing where the two paths do not meet
    found = result.map_cloud()
    if found is None or not len(found.points):
        raise ValueError("the node published no map")
    alignment = _align_by_pixels(sequence, result)
    ours = GrowingCloud(options.voxel_size)
    ours.add(alignment.apply(found.points))
    theirs = _true_cloud(sequence, options.voxel_size)
    moved = ours.points()
    if options.icp_distance:
        moved = register(moved, theirs, options.icp_distance).apply(moved)
    return asdict(cloud_errors(moved, theirs, options.threshold))


def _align_by_pixels(sequence: BagSequence, result: BagResult) -> Similarity:
    """Map to true world by points of the same pixels, seen by the node's depth and by the true one.

    Camera centres alone would leave the scale to a path that may hardly move.
    """
    node_poses = dict(
        zip(result.trajectory.stamps_ns.tolist(), result.trajectory.world_from_camera, strict=True)
    )
    sources, targets = [], []
    for index, predicted, truth in depth_pairs(sequence, result):
        frame, pose = sequence.frame(index), node_poses.get(int(sequence.stamps_ns[index]))
        if pose is None or frame.world_from_camera is None or frame.intrinsics is None:
            continue
        both = valid_pixels(predicted, truth)
        stride = max(1, int(both.sum()) // PAIRS_PER_FRAME)
        sources.append(unproject(predicted, frame.intrinsics, pose)[both][::stride])
        targets.append(unproject(truth, frame.intrinsics, frame.world_from_camera)[both][::stride])
    if not sources:
        raise ValueError("no published depth belongs to an image with true depth and pose")
    return align_points(np.concatenate(sources), np.concatenate(targets), with_scale=True)


def _true_cloud(sequence: BagSequence, voxel_size: float) -> NDArray[np.float64]:
    cloud = GrowingCloud(voxel_size)
    for index in range(len(sequence)):
        frame = sequence.frame(index)
        if frame.depth_m is not None and frame.world_from_camera is not None and frame.intrinsics is not None:
            points = unproject(frame.depth_m, frame.intrinsics, frame.world_from_camera)
            cloud.add(points[frame.depth_m > 0])
    return cloud.points()


def _draw_all(report: BagReport, sequence: BagSequence, result: BagResult, align: str) -> None:
    if "pose" in report.figures:
        estimate, truth = _paired(sequence, result)
        moved = align_trajectory(estimate, truth, align).apply_poses(estimate.world_from_camera)
        aligned = Trajectory(estimate.stamps_ns, moved)
        report.draw("Camera path", plots.path_plot({"truth": truth, "node": aligned}, "Camera path, aligned"))
        seconds = (truth.stamps_ns - truth.stamps_ns[0]) / 1e9
        distance, angle = absolute_errors(estimate, truth, align)
        report.draw(
            "Position error", plots.line_plot({"error": (seconds, distance)}, "s", "m", "Position error")
        )
        report.draw(
            "Rotation error", plots.line_plot({"error": (seconds, angle)}, "s", "degrees", "Rotation error")
        )
    else:
        report.draw("Camera path", plots.path_plot({"node": result.trajectory}, "Camera path", "map units"))
    report.draw("Latency", _latency_plot(result))
    _draw_diagnostics(report, result)
    report.draw("Depth", _depth_pictures(report, sequence, result))
    cloud = result.map_cloud()
    if cloud is not None and len(cloud.points):
        report.draw(
            "Map",
            plots.cloud_from_above(cloud.points, cloud.colours, result.trajectory, "The map from above"),
        )


def _draw_diagnostics(report: BagReport, result: BagResult) -> None:
    diagnostics = result.diagnostics()
    in_mib = {
        name: (seconds, [value / MIB for value in values])
        for name, (seconds, values) in diagnostics.matching("bytes").items()
    }
    for title, series, unit in (
        ("Memory", in_mib, "MiB"),
        ("Tokens and voxels", diagnostics.matching("tokens", "voxels", "slots"), ""),
        ("Time of a step", diagnostics.matching("_ms", "[ms]"), "ms"),
    ):
        report.draw(title, plots.line_plot(series, "s", unit, title) if series else None)


def _latency_plot(result: BagResult) -> Figure | None:
    latency = sorted(result.latency_ms().items())
    if not latency:
        return None
    values = [value for _, value in latency]
    return plots.line_plot({"latency": (range(len(values)), values)}, "answered frame", "ms", "Image to pose")


def _depth_pictures(report: BagReport, sequence: BagSequence, result: BagResult) -> Figure | None:
    """First, middle and last answered frame: image, predicted depth, true depth where known."""
    if "depth" in report.figures:
        pairs = depth_pairs(sequence, result)
        scale, _ = fit_depth([(p[m], t[m]) for _, p, t in pairs if (m := valid_pixels(p, t)).any()], "scale")
        chosen = [pairs[i] for i in sorted({0, len(pairs) // 2, len(pairs) - 1})]
        shown = []
        for index, predicted, truth in chosen:
            image = sequence.frame(index).image
            shown += [(f"frame {index}", image), ("node, scaled (m)", scale * predicted), ("true (m)", truth)]
        return plots.image_grid(shown, 3, "Depth")
    messages = result.depths()
    stamps = [int(stamp) for stamp in sequence.stamps_ns if int(stamp) in messages]
    if not stamps:
        return None
    shown = []
    for stamp in sorted({stamps[0], stamps[-1]}):
        index = int(np.flatnonzero(sequence.stamps_ns == stamp)[0])
        shown += [(f"frame {index}", sequence.frame(index).image), ("node", result.decode(messages[stamp]))]
    return plots.image_grid(shown, 2, "Depth, in map units")
