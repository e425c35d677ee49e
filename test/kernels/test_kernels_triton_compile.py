"""The Triton kernels compile to machine code for real GPUs, fit their shared memory, do not spill and read no
register that nothing was written into."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

SHARED_LIMIT = {80: 166_912, 86: 101_376, 87: 166_912, 89: 101_376, 90: 232_448, 100: 232_448}  # bytes
SCRIPT = Path(__file__).with_name("compile_triton.py")


def compile_for(capability: int, cache: Path) -> list[dict]:
    environment = {**os.environ, "TRITON_CACHE_DIR": str(cache), "PYTHONPATH": str(SCRIPT.parents[2])}
    environment.pop("TRITON_INTERPRET", None)
    done = subprocess.run(
        [sys.executable, SCRIPT, str(capability)], env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return [json.loads(line) for line in done.stdout.splitlines()]


@pytest.mark.slow
@pytest.mark.parametrize("capability", SHARED_LIMIT)
def test_kernels_compile(capability, tmp_path):
    variants = compile_for(capability, tmp_path)
    assert variants
    for variant in variants:
        assert variant["spilled"] == 0, variant
        assert not variant["undefined"], variant
        assert variant["shared"] <= SHARED_LIMIT[capability], variant
        assert variant["load_bytes"] >= variant.get("aligned", 0), variant
        assert variant["tensor_cores"] or variant["dtype"] == "*fp32", variant
    kernels = {"_forward_kernel", "_combine_kernel", "_mass_kernel", "_merge_kernel", "_gather_kernel"}
    kernels |= {"_read_kernel", "_write_kernel", "_save_kernel", "_highest_kernel", "_take_kernel"}
    kernels |= {"_to_heads_kernel", "_attend_within_kernel", "_gelu_kernel", "_keep_kernel"}
    kernels |= {"_few_rows_kernel"}
    kernels |= {"_normalise_kernel", "_finish_kernel", "_enlarge_kernel"}
    assert {v["kernel"] for v in variants} == kernels
