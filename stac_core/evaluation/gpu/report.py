"""Results of a benchmark as they come: printed, kept and written part by part."""

from __future__ import annotations

import json
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from stac_core.files import write_whole

SHARES, TIMES = (
    ("share", "of_roofline"),
    ("ms", "step_ms", "gflop", "live_mib", "voxel_mib", "peak_gib", "reserved_gib"),
)
Rows = list[dict[str, Any]]


class DeviceLost(RuntimeError):
    """An error after which this process can no longer use the GPU."""


class Report:
    """A part that fails is noted with its traceback; the next one runs, unless the GPU is lost."""

    def __init__(self, path: Path, device: torch.device) -> None:
        self.results: dict[str, Any] = {"seconds": {}, "failed_parts": []}
        self._path, self._device = path, device

    def part(self, name: str, title: str, work: Callable[[], Rows], key: str = "") -> Rows:
        """Rows of `work`, printed under the title and kept under `key` or the name; [] where it failed."""
        started = time.perf_counter()
        try:
            rows = work()
        except Exception as error:  # whatever fails must not take the other parts with it
            rows = []
            self._fail(name, error)
        seconds = time.perf_counter() - started
        self.results["seconds"][name] = seconds
        self.results.setdefault(key or name, []).extend(rows)
        if rows:
            print_table(f"{title} ({seconds:.1f} s)", rows)
        self.write()
        if self.results["failed_parts"] and self.results["failed_parts"][-1]["part"] == name:
            self._check_device()
        return rows

    def _fail(self, name: str, error: Exception) -> None:
        text = "".join(traceback.format_exception(error))
        print(f"\nPart '{name}' failed:\n{text}", flush=True)
        self.results["failed_parts"].append({"part": name, "error": repr(error), "traceback": text})

    def _check_device(self) -> None:
        """DeviceLost after an error that stays, such as a wrong address."""
        if self._device.type != "cuda":
            return
        try:
            torch.cuda.synchronize(self._device)
            torch.zeros(1, device=self._device).add_(1).item()
            torch.cuda.empty_cache()
        except RuntimeError as error:
            raise DeviceLost(f"the GPU no longer answers this process: {error}") from error

    def write(self) -> None:
        """All there is so far; NaN becomes null."""
        content = json.dumps(_without_nan(self.results), indent=2, ensure_ascii=False)
        write_whole(self._path, content + "\n")


def print_table(title: str, rows: Rows) -> None:
    """Rows of equal keys as aligned text; NaN, a time nobody has taken, as a dash."""
    print(f"\n{title}")
    if not rows:
        print("  nothing")
        return
    names = list(dict.fromkeys(name for row in rows for name in row))
    numeric = {name: all(isinstance(row.get(name, 0), int | float | None) for row in rows) for name in names}
    lines = [names] + [[_text(name, row.get(name)) for name in names] for row in rows]
    widths = [max(len(line[i]) for line in lines) for i in range(len(names))]
    for line in lines:
        cells = [
            cell.rjust(width) if numeric[name] else cell.ljust(width)
            for name, cell, width in zip(names, line, widths, strict=True)
        ]
        print("  " + "  ".join(cells).rstrip())
    sys.stdout.flush()


def _text(name: str, value: object) -> str:
    if value is None or value != value:
        return "–"
    if not isinstance(value, float):
        return str(value)
    if name in SHARES:
        return f"{value:.1%}"
    if name in TIMES:
        return f"{value:.2f}"
    return f"{value:.4g}"


def _without_nan(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_nan(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_without_nan(item) for item in value]
    return None if isinstance(value, float) and value != value else value
