"""The CUDA library: compiles for every GPU generation without spills, installs, loads, describes its ops."""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

REPOSITORY = Path(__file__).parents[2]
spec = importlib.util.spec_from_file_location("stac_cuda_build", REPOSITORY / "cuda_ext" / "build.py")
build = importlib.util.module_from_spec(spec)
spec.loader.exec_module(build)

needs_nvcc = pytest.mark.skipif(shutil.which("nvcc") is None, reason="needs nvcc")


@needs_nvcc
@pytest.mark.parametrize(
    "source, capability",
    [
        pytest.param(source, c, marks=() if (source, c) == ("voxel_merge.cu", "87") else pytest.mark.slow)
        for source in build.CUDA_SOURCES
        for c in build.CAPABILITIES
    ],
)
def test_device_code_compiles_without_torch_and_without_spills(source, capability, tmp_path):
    _, report = build.compile_source(source, (capability,), tmp_path)
    assert "torch" not in " ".join(build.compile_command(source, (capability,), tmp_path))
    spills = re.findall(r"(\d+) bytes spill stores, (\d+) bytes spill loads", report)
    assert spills and all(pair == ("0", "0") for pair in spills), report
    assert "warning" not in report


def test_device_headers_do_not_include_torch():
    for header in (REPOSITORY / "cuda_ext").glob("*.cu*"):
        assert not re.search(r"#include\s*[<\"](torch|ATen|c10)", header.read_text()), header


def test_a_missing_compiler_is_named(monkeypatch, tmp_path):
    monkeypatch.setenv("CUDA_HOME", str(tmp_path))
    with pytest.raises(FileNotFoundError, match=f"{tmp_path}/bin/nvcc: no CUDA compiler there.*CUDA_HOME"):
        build.find_nvcc()


@pytest.fixture(scope="module")
def installed(tmp_path_factory) -> Path:
    """The library, built as a user builds it, for one target, outside the environment."""
    target = tmp_path_factory.mktemp("site")
    source = shutil.copytree(REPOSITORY / "cuda_ext", tmp_path_factory.mktemp("source") / "cuda_ext")
    command = [sys.executable, "-m", "pip", "install", source, "--no-build-isolation", "--no-deps"]
    done = subprocess.run([*command, "--target", target], env=environment(), capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    return target


def environment() -> dict[str, str]:
    return {**os.environ, "STAC_CUDA_CAPABILITIES": "80", "PIP_DISABLE_PIP_VERSION_CHECK": "1"}


OPCHECK = """
import sys; sys.path[:0] = sys.argv[1:]
import torch
from stac_core.kernels import attend_torch, cuda_library, gather_torch
from stac_core.kernels.attend import CodedSegment, Codes, Segment
from stac_core.kernels.gather import Page, Wanted, shares
from stac_core.kernels.voxel_merge import MergeRules, RowState, RowTokens
from stac_core.kernels.voxel_merge_torch import voxel_merge
from stac_core.kernels.random_merges import empty_state, random_tokens
from kernels.coded import random_segments
from kernels.test_kernels_gather import small
cuda_library.load()

# The library has kernels for CUDA only; the reference stands in on the CPU so that schema and fake
# kernels can be checked against real results.
def segments(keys, key_grids, factors, values, value_grids, biases, bits):
    dim = keys[0].shape[-1] if bits[0] == 16 else keys[0].shape[-1] * 8 // bits[0]
    for k, kg, f, v, vg, bias, b in zip(keys, key_grids, factors, values, value_grids, biases, bits):
        if b == 16:
            yield Segment(k, v, bias)
        else:
            yield CodedSegment(Codes(k, kg, b, dim, f), Codes(v, vg, b, dim), bias)

def forward(q, *lists):
    out, lse, _ = attend_torch.attend(q, list(segments(*lists)))
    return out.contiguous(), lse.contiguous()

def mass(q, keys, key_grids, factors, biases, bits, lse, factor):
    parts = list(segments(keys, key_grids, factors, keys, key_grids, biases, bits))
    return torch.cat(attend_torch.attend(q, parts, True).key_mass, 1) * factor

def merge(state, order, start, keys, values, score, threshold, gate, heaviest):
    rules = MergeRules(threshold, gate, 0.0)
    after, _ = voxel_merge(RowState(*state), RowTokens(start, order, keys, values, score), rules)
    return [*after, torch.zeros(len(start) - 1, 5, dtype=torch.int32)]

def gather(keys, values, bias, page_keys, key_grids, page_values, value_grids, first, bits, slots, members,
           before, wanted, total, factor, pad):
    pages = [Page(*part) for part in zip(page_keys, page_values, key_grids, value_grids)]
    found = gather_torch.gather([Wanted(pages, bits, slots, members)], *keys.shape[1:], keys.dtype, factor)
    for mine, theirs in zip((keys, values, bias), found):
        mine.copy_(theirs)

torch.library.impl("stac::attend_forward", "CPU", forward)
torch.library.impl("stac::gather", "CPU", gather)
torch.library.impl("stac::voxel_merge", "CPU", merge)
torch.library.impl("stac::attend_mass", "CPU", mass)
q, (coded, plain) = random_segments(16, 8, 3, torch.bfloat16)
lists = ([coded.keys.codes, plain.keys], [coded.keys.grid, None], [coded.keys.factor, None])
others = ([coded.bias, None], [8, 16])
values = ([coded.values.codes, plain.values], [coded.values.grid, None])
ops = torch.ops.stac
_, lse = ops.attend_forward(q, *lists, *values, *others)
torch.library.opcheck(ops.attend_forward, (q, *lists, *values, *others))
only = ([plain.keys], [None], [None], [plain.values], [None], [None], [16])
torch.library.opcheck(ops.attend_forward, (q, *only))
torch.library.opcheck(ops.attend_mass, (q, *lists, *others, lse, 1.0))
torch.library.opcheck(ops.attend_mass, (q[:, ::2], *lists, *others, lse[:, ::2], 2.5))
state, tokens = empty_state(6, 4, 8, 16), random_tokens(6, 70, 16, seed=1)
start, order, *rest = tokens
torch.library.opcheck(ops.voxel_merge, (list(state), order, start, *rest, 0.8, 0.2, float("inf")))
kind, dim = small()["kinds"][0], 16
page, (share,), total = kind.pages[0], *shares([kind])
outputs = torch.zeros(2, 3, dim), torch.zeros(2, 3, dim), torch.zeros(2, 3)
torch.library.opcheck(ops.gather, (
    *outputs, [page.keys], [page.key_grid], [page.values], [page.value_grid], 0, 8,
    kind.slots, kind.members, *share, total, None, True,
))
print("clean")
"""


@needs_nvcc
@pytest.mark.slow
def test_installs_loads_and_passes_opcheck(installed):
    done = subprocess.run(
        [sys.executable, "-c", OPCHECK, installed, REPOSITORY, REPOSITORY / "test"],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0 and done.stdout.strip() == "clean", done.stdout + done.stderr[-3000:]


REFUSAL = """
import sys; sys.path[:0] = sys.argv[1:]
from stac_core.kernels.select import select_kernels
select_kernels("cuda", "cpu")
"""


@needs_nvcc
@pytest.mark.slow
@pytest.mark.skipif(torch.cuda.is_available(), reason="about machines without a GPU")
def test_an_installed_library_without_a_gpu_says_the_true_cause(installed):
    done = subprocess.run(
        [sys.executable, "-c", REFUSAL, str(installed), str(REPOSITORY)], capture_output=True, text=True
    )
    assert "'cuda' cannot run: the device is 'cpu'" in done.stderr, done.stderr[-2000:]
