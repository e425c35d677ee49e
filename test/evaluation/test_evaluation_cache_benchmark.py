"""The benchmark of the cache: its bytes are those of a real stream, however few lanes it runs."""

import math
import re

import pytest
import torch

from stac_core.evaluation import cache_benchmark
from stac_core.evaluation.cache_benchmark import ROWS, SHAPES, Cost, Run, main, measure

SMALL, CPU = SHAPES["small"], torch.device("cpu")


@pytest.mark.parametrize("row", ["stac", "stac, int8 live, int4 store"])
def test_one_lane_stands_for_all(row):
    (scaled,) = measure(ROWS[row], SMALL, [48], CPU).costs
    (real,) = measure(ROWS[row], SMALL, [48], CPU, whole=True).costs
    assert scaled.bytes == pytest.approx(real.bytes, rel=0.03)
    assert sum(real.parts.values()) == real.bytes


@pytest.mark.parametrize("row", ["window_kv 1+8", "stac, no voxels", "xstream"])
def test_bytes_that_are_not_measured_are_those_a_stream_allocates(row):
    (known,) = measure(ROWS[row], SMALL, [24], CPU).costs
    (real,) = measure(ROWS[row], SMALL, [24], CPU, whole=True).costs
    assert known.bytes == pytest.approx(real.bytes, rel=0.01) and known.bytes >= real.bytes


@pytest.mark.slow
@pytest.mark.timeout(1800)  # 40 seconds of one idle core
def test_a_coded_room_costs_what_is_wanted_of_it():
    """With the published number of slots after the published number of frames (STAC, arXiv 2603.20284)."""
    full = SHAPES["full"]
    with torch.inference_mode():
        costs = measure(ROWS["stac, int8 live, int4 store"], full, [100, 300, 1000, 1500, 3000], CPU).costs
    cost = {cost.frames: cost for cost in costs}
    for frames, wanted in ((100, 9.5), (300, 25), (1000, 80), (3000, 240)):
        assert frames * full.frame_bytes / cost[frames].bytes >= wanted, frames
    assert cost[1500].slots == pytest.approx(4.9, abs=0.05)


def test_causal_is_the_measure_of_all_and_its_last_steps_are_timed():
    run = measure(ROWS["causal"], SMALL, [8, 24], CPU, timed=True)
    assert [cost.bytes for cost in run.costs] == [8 * SMALL.frame_bytes, 24 * SMALL.frame_bytes]
    assert run.costs[-1].step_ms > 0


def test_steadiness_compares_the_tail_with_a_young_stream():
    steps = [(frame, 11.0 if frame < 2700 else 12.0) for frame in range(0, 3000, 4)]
    early, late = Run([Cost(3000, 1, 10.0)], steps, [10.0] * 75).steadiness() or (0, 0)
    assert (early, late) == (10, 12)
    assert Run([Cost(300, 1, 10.0)], steps[:75]).steadiness() is None


def test_the_young_stream_takes_turns_with_the_last_tenth_only(monkeypatch):
    monkeypatch.setattr(cache_benchmark, "EARLY", (8, 16))
    run = measure(ROWS["window_kv 1+8"], SMALL, [16, 48], CPU, timed=True)
    assert len(run.early) == sum(frame >= 0.9 * 48 for frame, _ in run.steps) == 1
    assert len(run.steps) == 12


def test_the_command_prints_a_row_per_mode(capsys):
    assert main(["--shape", "full", "--frames", "8", "12", "--rows", "causal", "stac", "--parts"]) == 0
    printed = capsys.readouterr().out
    assert "full shape: 1041 tokens per frame, 97.6 MiB" in printed
    rows = [line.split(" | ") for line in printed.splitlines() if line.startswith("| ")]
    assert [row[0] for row in rows] == ["| mode", "| causal", "| stac"]
    assert "(1.0×)" in rows[1][1] and not math.isnan(float(rows[2][1].split()[0]))
    assert re.search(r"stac, N = 12, [1-9]\.\d\d slots per voxel, layer and head, MiB: live", printed)


@pytest.mark.parametrize(
    ("flags", "named"),
    [
        ("--frames 0 8", "--frames = 0: below the minimum; nearest value that works: 1"),
        ("--device toaster", "--device = 'toaster' does not work here"),
    ],
)
def test_what_cannot_be_measured_is_refused_in_one_line(flags, named, capsys):
    assert main([*flags.split(), "--shape", "full", "--rows", "causal"]) == 1
    told = capsys.readouterr().err.strip()
    assert told.startswith("cache_benchmark: ") and named in told and "\n" not in told
