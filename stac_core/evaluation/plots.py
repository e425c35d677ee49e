"""Figures of runs: quality against bytes, cost against frame number, paths from above."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import matplotlib

matplotlib.use("agg")  # files only; no display is needed or looked for
import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from numpy.typing import NDArray

from stac_core.evaluation.trajectory import Trajectory

Series = Mapping[str, tuple[Sequence[float] | NDArray, Sequence[float] | NDArray]]  # label → x, y
_MARKERS = "os^Dv<>Ph*X"


def line_plot(series: Series, x_label: str, y_label: str, title: str) -> Figure:
    """Curves over one axis, from zero up; a curve without a label has no legend."""
    figure, axes = _axes(x_label, y_label, title)
    for label, (x, y) in series.items():
        axes.plot(x, y, label=label, linewidth=1.2, marker="." if len(x) < 60 else "")
    _from_zero(axes)
    _legend(axes, len([label for label in series if label]))
    return figure


def scatter_plot(series: Series, x_label: str, y_label: str, title: str) -> Figure:
    """Points of runs; x is logarithmic, because caches differ by orders of magnitude."""
    figure, axes = _axes(x_label, y_label, title)
    for (label, (x, y)), marker in zip(series.items(), _MARKERS * len(series), strict=False):
        axes.scatter(x, y, label=label, marker=marker, s=36)
    if all(value > 0 for x, _ in series.values() for value in x):
        axes.set_xscale("log")
        axes.xaxis.set_major_formatter("{x:g}")
        axes.xaxis.set_minor_formatter("{x:g}")
    _from_zero(axes)
    _legend(axes, len(series))
    return figure


def path_plot(paths: Mapping[str, Trajectory], title: str, unit: str = "m") -> Figure:
    """Camera centres from above; a dot marks the start."""
    first = next(iter(paths.values()))
    centre, plane = first.centres.mean(0), floor_plane(first)
    figure, axes = _axes(f"right ({unit})", f"forward ({unit})", title)
    for label, path in paths.items():
        flat = (path.centres - centre) @ plane.T
        axes.plot(flat[:, 0], flat[:, 1], label=label, linewidth=1.2)
        axes.plot(*flat[0], marker="o", color=axes.lines[-1].get_color())
    axes.set_aspect("equal", adjustable="datalim")
    _legend(axes, len(paths))
    return figure


def cloud_from_above(points: NDArray, colours: NDArray | None, path: Trajectory, title: str) -> Figure:
    """A cloud [N, 3] with the camera path over it; what is highest is drawn last."""
    centre, plane = np.median(points, 0), floor_plane(path)
    spread = np.abs(points - centre)
    near = (spread <= np.quantile(spread, 0.99, axis=0) * 1.2 + 1e-9).all(1)  # outliers would shrink all else
    height = (points[near] - centre) @ np.cross(plane[1], plane[0])
    order = np.argsort(-height)
    flat = (points[near][order] - centre) @ plane.T
    figure, axes = _axes("right (map units)", "forward (map units)", title)
    shade = colours[near][order] if colours is not None else "0.4"
    axes.scatter(flat[:, 0], flat[:, 1], c=shade, s=0.4, linewidths=0, rasterized=True)
    line = (path.centres - centre) @ plane.T
    axes.plot(line[:, 0], line[:, 1], color="tab:red", linewidth=1.4, label="camera")
    axes.plot(*line[0], marker="o", markersize=4, color="tab:red")  # a short path is a speck else
    _legend(axes, 1)
    axes.set_aspect("equal", adjustable="datalim")
    return figure


def floor_plane(path: Trajectory) -> NDArray[np.float64]:
    """Two unit rows [2, 3], right and forward, of the floor as a camera held upright suggests it.

    Down is the mean of the image's own down; forward is where the first camera looks.
    """
    down = path.world_from_camera[:, :3, 1].mean(0)
    looks, up_of_image = path.world_from_camera[0, :3, 2], -path.world_from_camera[0, :3, 1]
    if np.linalg.norm(down) < 0.1:  # the camera turned over and over: no side is down
        down = path.world_from_camera[0, :3, 1]
    down = down / np.linalg.norm(down)
    forward = looks if np.linalg.norm(np.cross(down, looks)) > 0.1 else up_of_image
    right = np.cross(down, forward)
    right /= np.linalg.norm(right)
    return np.stack([right, np.cross(right, down)])


def image_grid(images: Sequence[tuple[str, NDArray]], columns: int, title: str) -> Figure:
    """Pictures in rows; single-channel ones are depth, in one scale of colours per row; 0 or NaN is grey."""
    rows = -(-len(images) // columns)
    figure, grid = plt.subplots(
        rows, columns, figsize=(3.2 * columns, 2.4 * rows), layout="constrained", squeeze=False
    )
    for axes, (name, _) in zip(grid.flat, images, strict=False):
        axes.set_title(name, fontsize=9)
    for row in range(rows):
        _show_row(grid[row], [image for _, image in images[row * columns : (row + 1) * columns]])
    for axes in grid.flat:
        axes.axis("off")
    figure.suptitle(title, fontsize=10)
    return figure


def _show_row(row: Sequence[Axes], images: list[NDArray]) -> None:
    depths = [np.ma.masked_where(~(np.nan_to_num(image) > 0), image) for image in images if image.ndim == 2]
    valid = np.concatenate([depth.compressed() for depth in depths]) if depths else np.empty(0)
    least, most = np.percentile(valid, [2, 98]) if len(valid) else (0.0, 1.0)  # without the wildest
    colours = matplotlib.colormaps["turbo"].with_extremes(bad="0.6")
    for axes, image in zip(row, images, strict=False):
        if image.ndim == 2:
            shown = axes.imshow(depths.pop(0), cmap=colours, vmin=least, vmax=most)
            if not depths:  # the last one carries the scale of all
                row[0].figure.colorbar(shown, ax=axes, shrink=0.8, extend="both")
        else:
            axes.imshow(image)


def close(figure: Figure) -> None:
    """Release a figure's memory; pyplot keeps every open one."""
    plt.close(figure)


def _axes(x_label: str, y_label: str, title: str) -> tuple[Figure, Axes]:
    figure, axes = plt.subplots(figsize=(6.4, 4.0), layout="constrained")
    axes.set_xlabel(x_label)
    axes.set_ylabel(y_label)
    axes.set_title(title, fontsize=10)
    axes.grid(alpha=0.3)
    return figure, axes


def _from_zero(axes: Axes) -> None:
    """Zero at the bottom and some air above the highest value, which may be the only one."""
    highest = float(axes.dataLim.y1)
    axes.set_ylim(0, 1.08 * highest if np.isfinite(highest) and highest > 0 else 1)


def _legend(axes: Axes, entries: int) -> None:
    if entries > 3:  # under the curves, where it hides none of them
        figure = axes.figure
        assert isinstance(figure, Figure)
        longest = max(len(label) for label in axes.get_legend_handles_labels()[1])
        columns = 2 if longest < 40 else 1
        figure.set_figheight(figure.get_figheight() + 0.19 * -(-entries // columns))
        axes.legend(fontsize=7, loc="upper center", bbox_to_anchor=(0.5, -0.14), ncols=columns)
    elif entries:
        axes.legend(fontsize=8)
