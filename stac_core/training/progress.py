"""What a run shows: a progress bar, two tables (CSV) and a plot of the held-out curve."""

from __future__ import annotations

import csv
import logging
import math
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from stac_core.device import Stopwatch
from stac_core.files import replacing

log = logging.getLogger(__name__)


class Progress:
    """Means of the figures since the last row, frames per second, share of time spent rendering.

    Tables and plot are for people: where they cannot be written, one warning says so and the run goes on.
    """

    def __init__(self, folder: Path, first_step: int, steps: int, log_every: int, shown: bool) -> None:
        self.folder, self.log_every, self.shown = folder, log_every, shown
        self._warned = False
        self.bar = tqdm(total=steps, initial=first_step, disable=not shown, unit="step", mininterval=2.0)
        self._begin_row()

    def update(self, step: int, figures: dict[str, Tensor], frames: int, drawing: Stopwatch) -> None:
        """Account for one step; nothing is fetched from the device before a row is due.

        drawing: began and ended with the drawing of its batch.
        """
        self.figures.append((list(figures), torch.stack(list(figures.values()))))
        self.drawings.append(drawing)
        self.frames += frames
        self.bar.update(1)
        if step % self.log_every == 0:
            self._write_row(step)

    def add_held_out(self, row: dict[str, float]) -> None:
        """A row of the held-out curve: into its table and its plot, and as a line above the bar."""
        with self._written_or_warned():
            append_row(self.folder / "held_out.csv", row)
            plot_curve(self.folder / "held_out.csv", self.folder / "held_out.png")
        self.bar.write("held out: " + "  ".join(f"{name} {value:.4g}" for name, value in row.items()))

    def close(self) -> None:
        """End the bar."""
        self.bar.close()

    def _begin_row(self) -> None:
        self.figures: list[tuple[list[str], Tensor]] = []
        self.drawings: list[Stopwatch] = []
        self.frames, self.since = 0, time.monotonic()

    def _write_row(self, step: int) -> None:
        names = self.figures[0][0]
        means = torch.stack([values for _, values in self.figures]).mean(0).tolist()
        rendering = sum(sum(drawing.milliseconds()) for drawing in self.drawings) / 1e3
        seconds = max(time.monotonic() - self.since, 1e-9)
        row = dict(zip(names, means, strict=True))
        if not math.isfinite(row["gradient"]):
            log.warning("up to step %d: a gradient is not finite, its step was not taken", step)
        row |= {"frames_per_s": self.frames / seconds, "rendering_share": rendering / seconds}
        self.bar.set_postfix({name: f"{value:.3g}" for name, value in row.items()}, refresh=False)
        if self.shown:
            with self._written_or_warned():
                append_row(self.folder / "training.csv", {"step": step, "time": int(time.time()), **row})
        self._begin_row()

    @contextmanager
    def _written_or_warned(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            if not self._warned:
                log.warning(
                    "a table or plot in %s cannot be written, the run goes on: %s", self.folder, error
                )
            self._warned = True


def append_row(path: Path, row: dict[str, float]) -> None:
    """Add one row to a table, whole or not at all; the first row brings the header.

    A later one may bring further columns; cells that a row does not know stay empty.
    """
    columns = _columns(path) or list(row)
    if further := [name for name in row if name not in columns]:
        columns += further
        _widen(path, columns)
    size = path.stat().st_size if path.exists() else 0
    try:
        with path.open("a", newline="") as file:
            writer = csv.DictWriter(file, columns)
            if not size:
                writer.writeheader()
            writer.writerow({k: f"{v:.6g}" if isinstance(v, float) else v for k, v in row.items()})
    except OSError:
        with suppress(OSError):
            os.truncate(path, size)
        raise


def _columns(path: Path) -> list[str]:
    """Of a table; none where it is empty, or no file yet."""
    if not path.exists() or not path.stat().st_size:
        return []
    with path.open(newline="") as file:
        return next(csv.reader(file))


def _widen(path: Path, columns: list[str]) -> None:
    """The same table with further columns, which are empty so far."""
    with path.open(newline="") as old, replacing(path) as new, new.open("w", newline="") as file:
        writer = csv.DictWriter(file, columns)
        writer.writeheader()
        writer.writerows(csv.DictReader(old))


def plot_curve(table: Path, picture: Path) -> None:
    """Every figure of a table over its steps, one panel each, logarithmic where all are positive."""
    from matplotlib.figure import Figure

    with table.open() as file:
        rows = list(csv.DictReader(file))
    names = [name for name in rows[0] if name not in ("step", "time")]
    figure = Figure(figsize=(7, 2 * len(names)))
    axes = figure.subplots(len(names), 1, sharex=True, squeeze=False)
    for axis, name in zip(axes[:, 0], names, strict=True):
        known = [(float(row["step"]), float(row[name])) for row in rows if row[name]]
        axis.plot(*zip(*known, strict=True), marker=".")
        axis.set_title(name, fontsize=9)
        axis.set_yscale("log" if min(value for _, value in known) > 0 else "linear")
        axis.grid(alpha=0.3)
    axes[-1, 0].set_xlabel("step")
    figure.tight_layout()
    with replacing(picture) as temporary:
        figure.savefig(temporary, format="png")
