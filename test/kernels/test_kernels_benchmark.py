"""The GPU benchmark, rehearsed: every part runs, every check passes, nothing pretends to be a time."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from stac_core.evaluation.gpu import network

REPOSITORY = Path(__file__).parents[2]
TIMED = ("attend", "frames", "merge", "gather", "renewal", "blocks")
COMMAND = [sys.executable, "-m", "stac_core.evaluation.benchmark_gpu"]


@pytest.mark.slow
def test_rehearsal(tmp_path):
    written = tmp_path / "figures.json"
    done = subprocess.run(
        [*COMMAND, "--rehearse", "--json", written], cwd=REPOSITORY, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-3000:]
    results = json.loads(written.read_text())
    assert results["rehearsal"] and results["checks"] and all(row["passed"] for row in results["checks"])
    assert {row["backend"] for row in results["checks"]} == {"torch", "triton", "eager"}
    timed = [row["ms"] for part in TIMED for row in results[part]]
    timed += [row["step_ms"] for row in results["network"]]
    timed += [row["device_ms"] for row in results["parts"]]
    assert timed and all(ms is None for ms in timed)
    assert all(row["met"] is None for row in results["wanted"])
    assert any("in 3 parts" in row["case"] for row in results["checks"])
    assert {(row["parts"], row["chosen"]) for row in results["parts"]} == {(1, True), (2, False)}
    moved = {row["what"] for row in results["checks"] if " pages, " in row["case"]}
    assert moved == {"read", "figures", "saved", "written"}
    assert {"highest", "take"} <= {row["what"] for row in results["checks"]}
    assert {(row["backend"], row["variant"]) for row in results["renewal"]} == {
        (backend, what) for backend in ("torch", "triton") for what in ("highest", "take")
    }
    assert {"q", "k", "v", "out", "activated", "mapped"} <= {row["what"] for row in results["checks"]}
    assert [row["report"] for row in results["sanitizer"]] == ["ran triton"]
    assert "cuda" in {row["backend"] for row in results["backends"]}


@pytest.mark.parametrize("kernel", ["_highest_kernel", "_take_kernel", "_gather_kernel"])
def test_rows_that_move_count_as_copies(kernel):
    assert network._category(kernel) == "copies and gathers"


@pytest.mark.parametrize(
    "kernel, kind",
    [
        ("_attend_within_kernel", "attention"),
        ("_to_heads_kernel", "norms"),
        ("_gelu_kernel", "element-wise"),
        ("_few_rows_kernel", "linear layers"),
    ],
)
def test_kernels_of_blocks_count_as_what_they_do(kernel, kind):
    assert network._category(kernel) == kind


@pytest.mark.skipif(torch.cuda.is_available(), reason="about machines without a GPU")
def test_without_a_gpu_it_says_what_to_do(tmp_path):
    done = subprocess.run(
        [*COMMAND, "--json", tmp_path / "x.json"], cwd=REPOSITORY, capture_output=True, text=True
    )
    assert done.returncode == 2 and "no CUDA device here; `--rehearse`" in done.stderr
    assert not (tmp_path / "x.json").exists()
