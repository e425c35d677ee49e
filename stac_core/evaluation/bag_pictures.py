"""The pictures of a bag's report: paths, errors and costs over time, depth, and the map from above."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from matplotlib.figure import Figure
from numpy.typing import NDArray

from stac_core.evaluation import plots
from stac_core.evaluation.bag_report import BagReport, depth_numbers, depth_pairs, paired_paths
from stac_core.evaluation.bag_result import BagResult, Diagnostics
from stac_core.evaluation.datasets.bag import BagSequence
from stac_core.evaluation.depth_metrics import fit_depth, valid_pixels
from stac_core.evaluation.results import MIB
from stac_core.evaluation.trajectory import Trajectory
from stac_core.evaluation.trajectory_metrics import absolute_errors, align_trajectory

Pictures = Iterator[tuple[str, Figure]]  # title, figure
_TIME = "time (s)"


def draw_pictures(report: BagReport, sequence: BagSequence, result: BagResult, pose_align: str) -> Pictures:
    """Every picture that the figures allow."""
    if "pose" in report.figures:
        yield from _judged_path(sequence, result, pose_align)
    else:
        yield "Camera path", plots.path_plot({"node": result.trajectory}, "Camera path", "map units")
    if "latency" in report.figures:
        yield "Latency", _latency(result)
    yield from _costs(result.diagnostics())
    cloud = result.map_cloud()
    if cloud is not None and len(cloud.points):
        path = result.trajectory
        yield "Map", plots.cloud_from_above(cloud.points, cloud.colours, path, "The map from above")
    if "depth" in report.figures:
        yield "Depth", _judged_depth(sequence, result)
    elif answered := np.flatnonzero(np.isin(sequence.stamps_ns, result.depth_stamps_ns)).tolist():
        yield "Depth", _depth(sequence, result, sorted({answered[0], answered[-1]}))


def _judged_path(sequence: BagSequence, result: BagResult, align: str) -> Pictures:
    estimate, truth = paired_paths(sequence, result)
    moved = align_trajectory(estimate, truth, align).apply_poses(estimate.world_from_camera)
    paths = {"truth": truth, "node": Trajectory(estimate.stamps_ns, moved)}
    yield "Camera path", plots.path_plot(paths, "Camera path, aligned, from above")
    seconds = (truth.stamps_ns - truth.stamps_ns[0]) / 1e9
    distance, angle = absolute_errors(estimate, truth, align)
    for title, errors, unit in (("Position error", distance, "m"), ("Rotation error", angle, "degrees")):
        yield title, plots.line_plot({"": (seconds, errors)}, _TIME, f"error ({unit})", title)


def _latency(result: BagResult) -> Figure:
    values = [value for _, value in sorted(result.latency_ms().items())]
    series = {"": (range(len(values)), values)}
    return plots.line_plot(series, "answered frame", "latency (ms)", "Latency, from image to pose")


def _costs(diagnostics: Diagnostics) -> Pictures:
    in_mib = {
        name: (seconds, [value / MIB for value in values])
        for name, (seconds, values) in diagnostics.matching("bytes").items()
    }
    for title, series, unit in (
        ("Memory", in_mib, "memory (MiB)"),
        ("Tokens and voxels", diagnostics.matching("tokens", "voxels", "slots"), "count"),
        ("Time of a step", diagnostics.matching("_ms", "[ms]"), "time of a step (ms)"),
    ):
        if series:
            yield title, plots.line_plot(series, _TIME, unit, title)


def _judged_depth(sequence: BagSequence, result: BagResult) -> Figure:
    """First, middle and last answered image beside the predicted and the true depth."""
    numbers = depth_numbers(sequence, result)
    chosen = sorted({numbers[0], numbers[len(numbers) // 2], numbers[-1]})
    shown = []
    for number, predicted, truth in depth_pairs(sequence, result, chosen):
        both = valid_pixels(predicted, truth)
        scale = fit_depth([(predicted[both], truth[both])], "scale")[0] if both.any() else 1.0
        image = sequence.frame(number).image
        shown += [(f"image {number}", image), ("node, scaled (m)", scale * predicted), ("true (m)", truth)]
    return plots.image_grid(shown, 3, "Depth, each image by its own scale; one scale of colours per row")


def _depth(sequence: BagSequence, result: BagResult, numbers: list[int]) -> Figure:
    """Images beside the predicted depth."""
    shown: list[tuple[str, NDArray]] = []
    for number in numbers:
        predicted = result.depth(int(sequence.stamps_ns[number]))
        shown += [(f"image {number}", sequence.frame(number).image), ("node (map units)", predicted)]
    return plots.image_grid(shown, 2, "Depth")
