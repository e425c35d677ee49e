"""Coded segments on Triton by tile of the forward pass: right or wrong, and the time, in a process apart.

A kernel that reads wrong addresses ends its process; the next tile then has a new one.
"""

from __future__ import annotations

import json
import subprocess
import sys
from unittest import mock

import torch

from stac_core.evaluation.gpu.attention import FRAME, LIVE, live_inputs
from stac_core.evaluation.gpu.measure import median_ms
from stac_core.evaluation.gpu.report import Rows
from stac_core.kernels import attend_triton
from stac_core.kernels.judge import judge_attend
from stac_core.kernels.launch_triton import Tile

SHARE, REPEATS = 0.25, 10
SECONDS = 120  # that a process may take
TILES = (  # queries, keys, warps, stages, registers
    Tile(128, 32, 8, 3, 128),
    Tile(128, 32, 8, 2, 128),
    Tile(128, 32, 8, 1, 128),
    Tile(128, 64, 8, 3),
    Tile(64, 64, 4, 3),
    Tile(64, 32, 4, 3, 128),
    Tile(32, 64, 4, 2),
)


def sweep(frame: int = FRAME, count: int = len(TILES)) -> Rows:
    """One row for each of the first `count` tiles, as far as a process got with it."""
    rows: Rows = []
    while len(rows) < count:
        command = [sys.executable, "-m", "stac_core.evaluation.gpu.coded"]
        command += [str(number) for number in (len(rows), count, frame)]
        done = _run(command)
        rows += [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
        if done.returncode and len(rows) < count:
            said = done.stderr.strip().splitlines()
            error = said[-1][:80] if said else f"exit code {done.returncode}"
            rows.append({**TILES[len(rows)]._asdict(), "passed": False, "ms": float("nan"), "error": error})
    return rows


def _run(command: list[str]) -> subprocess.CompletedProcess[str]:
    """A process that does not end in time counts as one that failed."""
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=SECONDS)
    except subprocess.TimeoutExpired as late:
        said = late.stdout.decode() if isinstance(late.stdout, bytes) else late.stdout or ""
        return subprocess.CompletedProcess(command, 1, said, f"stopped after {SECONDS} s")


def main(first: int, stop: int, frame: int) -> None:
    """Print what each tile from `first` to before `stop` does to one frame of a coded stream, as JSON."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    _, bits = LIVE[-1]
    q, segments = live_inputs(1, bits, device, frame)
    for tile in TILES[first:stop]:
        with mock.patch.object(attend_triton, "forward_tile", lambda *_, tile=tile: tile):
            got = attend_triton.attend(q, segments, True, SHARE)
            wrong = [verdict.what for verdict in judge_attend(q, segments, SHARE, got) if not verdict.passed]
            ms = median_ms(lambda: attend_triton.attend(q, segments, True, SHARE), device, REPEATS)
        error = f"wrong: {', '.join(wrong)}" if wrong else ""
        row = {**tile._asdict(), "passed": not wrong, "ms": ms, "error": error}
        print(json.dumps(row), flush=True)


if __name__ == "__main__":
    main(*map(int, sys.argv[1:4]))
