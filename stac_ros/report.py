"""One picture of what was mapped: camera, depth, map from above, and the memory it took."""

from __future__ import annotations

import io
from pathlib import Path

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from numpy.typing import NDArray

from stac_core.files import write_whole
from stac_ros.output_listener import MemorySample, Seen

matplotlib.use("agg")  # no screen is needed
_MOST_POINTS = 120_000  # more would only paint over each other
_MOST_SAMPLES = 5000  # of the path and of the memory: a curve of a long way looks no better by more
_INK, _PATH, _START = "#222222", "#d6336c", "#2b8a3e"


def write_report(path: Path, seen: Seen) -> None:
    """Draw `report.png`; what has not been heard is said so in its place."""
    figure = Figure(figsize=(13, 9), layout="constrained")
    figure.suptitle(f"stac_ros · {len(seen.stamps_ns)} frames mapped\nweights: {seen.weights}", fontsize=13)
    axes = figure.subplots(2, 2)
    _draw_image(axes[0, 0], seen)
    _draw_depth(figure, axes[0, 1], seen)
    _draw_map(axes[1, 0], seen)
    _draw_memory(axes[1, 1], seen.memory)
    content = io.BytesIO()
    figure.savefig(content, format="png", dpi=110)
    write_whole(path, content.getvalue())


def _draw_image(axes: Axes, seen: Seen) -> None:
    axes.set_title("camera, last frame")
    axes.axis("off")
    if seen.view is None:
        return _say(axes, "no camera image was heard")
    axes.imshow(seen.view.image)


def _draw_depth(figure: Figure, axes: Axes, seen: Seen) -> None:
    axes.set_title("depth of that frame")
    axes.axis("off")
    if seen.view is None or not np.isfinite(seen.view.depth).any():
        return _say(axes, "no valid depth was heard")
    depth = seen.view.depth
    low, high = np.nanpercentile(depth, [1, 99])
    colours = matplotlib.colormaps["turbo_r"].with_extremes(bad="#888888")
    shown = axes.imshow(depth, cmap=colours, vmin=low, vmax=high, interpolation="nearest")
    figure.colorbar(shown, ax=axes, label="along the optical axis (stream unit, or m with a scale)")


def _draw_map(axes: Axes, seen: Seen) -> None:
    """x forward is up, y left is left, as a robot sees its own map."""
    axes.set_title(f"map from above, {len(seen.map_positions):,} points, and the path of the camera")
    axes.set_xlabel("y, left")
    axes.set_ylabel("x, forward")
    if not len(seen.map_positions):
        return _say(axes, "no map was heard")
    drawn = _spread(len(seen.map_positions), _MOST_POINTS)
    drawn = drawn[np.argsort(seen.map_positions[drawn, 2])]  # the highest last, as seen from above
    points, colours = seen.map_positions[drawn], seen.map_colours[drawn]
    axes.scatter(points[:, 1], points[:, 0], c=colours / 255.0, s=1.0, linewidths=0)
    poses = [seen.map_from_camera[i] for i in _spread(len(seen.map_from_camera), _MOST_SAMPLES)]
    path = np.array([pose[:3, 3] for pose in poses]).reshape(-1, 3)
    axes.plot(path[:, 1], path[:, 0], color=_PATH, linewidth=2)
    axes.scatter(path[:1, 1], path[:1, 0], color=_START, s=40, zorder=3, label="start")
    low, high = _limits(np.vstack([_middle(points), path]))
    axes.set_xlim(high[1], low[1])  # y points to the left
    axes.set_ylim(low[0], high[0])
    axes.set_aspect("equal")
    axes.legend(loc="upper right", framealpha=0.9, edgecolor="none")


def _draw_memory(axes: Axes, samples: list[MemorySample]) -> None:
    axes.set_title("memory of the key/value cache")
    axes.set_xlabel("time since the first frame, s")
    axes.set_ylabel("MiB")
    axes.grid(alpha=0.3)
    memory = [samples[i] for i in _spread(len(samples), _MOST_SAMPLES) if samples[i].frames]
    if not memory:
        return _say(axes, "no diagnostics were heard")
    seconds = [sample.seconds - memory[0].seconds for sample in memory]
    mebibytes = [sample.cache_bytes / 2**20 for sample in memory]
    axes.plot(seconds, mebibytes, color=_INK, marker=".")
    axes.set_ylim(0, max([*mebibytes, 0.1]) * 1.15)
    for index in _spread(len(memory), 4):
        place = (seconds[index], mebibytes[index])
        text = f"{memory[index].frames} frames"
        side = {0: "left", len(memory) - 1: "right"}.get(index, "center")  # the ends stay within the axes
        axes.annotate(text, place, (0, 8), textcoords="offset points", ha=side)


def _say(axes: Axes, text: str) -> None:
    axes.text(0.5, 0.5, text, transform=axes.transAxes, ha="center", va="center", color="#888888")


def _spread(count: int, most: int) -> NDArray[np.int64]:
    """Indices of at most `most` of `count` items, evenly spread."""
    return np.linspace(0, count - 1, min(count, most)).astype(np.int64)


def _middle(points: NDArray[np.float32]) -> NDArray[np.float32]:
    """Points without the far ends along any axis: a few stray ones would shrink the rest to a dot."""
    low, high = np.percentile(points, [2, 98], axis=0)
    return points[((points >= low) & (points <= high)).all(axis=1)]


def _limits(points: NDArray[np.float64]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    low, high = points.min(axis=0), points.max(axis=0)
    margin = 0.05 * (high - low) + 1e-3
    return low - margin, high + margin
