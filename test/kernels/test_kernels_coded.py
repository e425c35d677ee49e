"""Keys and values read as codes: the layout of the cache's codec, and the same attention."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from kernels.coded import coded, random_segments

from stac_core.kernels import attend_cuda, attend_torch, attend_triton
from stac_core.kernels.attend import CodedSegment, Codes
from stac_core.kernels.judge import judge_attend
from stac_core.kernels.quantization import Codec

BACKENDS = {"torch": attend_torch.attend, "triton": attend_triton.attend}
CHECKING = BACKENDS | {"cuda": attend_cuda.attend}


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("dim", [16, 64, 96, 128])
def test_the_layout_is_that_of_the_cache(bits, dim):
    x = torch.randn(2, 9, dim)
    codec = Codec(bits, dim, torch.float32)
    torch.testing.assert_close(coded(x, bits).decode(torch.float32), codec.decode(codec.encode(x)))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    "bits, dim, dtype, sharp",
    [
        (8, 64, torch.bfloat16, 1),
        (8, 64, torch.bfloat16, 60),  # exponentials of such logits do not fit
        (4, 64, torch.bfloat16, 60),
        (4, 64, torch.float16, 1),
        (4, 128, torch.bfloat16, 1),
        (8, 20, torch.float32, 1),
        (4, 96, torch.float16, 1),
    ],
    ids=str,
)
def test_twice_rule(backend, bits, dim, dtype, sharp):
    q, segments = random_segments(dim, bits, 3, dtype)
    q[:, 50:] *= sharp
    verdicts = judge_attend(q, segments, 1.0, BACKENDS[backend](q, segments, True))
    assert all(v.passed for v in verdicts), verdicts


@pytest.mark.parametrize("backend", CHECKING)
@pytest.mark.parametrize(
    "change, words",
    [
        ({"bits": 5}, r"segments\[0\].keys.bits = 5: expected 8 or 4"),
        ({"bits": 4}, r"keys.codes: expected \[1, 7, 8\] of torch.uint8 on cpu, got \[1, 7, 16\]"),
        ({"grid": torch.zeros(1, 7, 2)}, r"keys.grid: expected .*float16.*got .*float32"),
        ({"dim": 32}, r"keys.dim = 32: q has a head width of 16"),
        ({"codes": torch.zeros(1, 16, 7).byte().mT}, "keys.codes: the last dimension must be contiguous"),
        ({"codes": torch.zeros(7).byte()}, r"segments\[0\].keys.codes: expected \[rows, keys, .*shape \[7\]"),
        ({"factor": torch.ones(16)}, r"keys.factor: expected \[1, 16\]"),
    ],
)
def test_bad_codes_are_named(backend, change, words):
    x = torch.randn(1, 7, 16)
    keys = coded(x, 8)
    broken = Codes(**{**vars(keys), **change})
    with pytest.raises(ValueError, match=words):
        CHECKING[backend](x, [CodedSegment(broken, coded(x, 8))])


@pytest.mark.parametrize("backend", BACKENDS)
def test_grids_may_begin_anywhere_in_memory(backend):
    q, (segment, _) = random_segments(64, 8, 3, torch.float16)
    grid = segment.keys.grid
    moved = torch.cat([grid.new_zeros(1), grid.flatten()])[1:].view_as(grid)
    assert moved.is_contiguous() and moved.storage_offset() == 1
    shifted = CodedSegment(replace(segment.keys, grid=moved), segment.values, segment.bias)
    assert torch.equal(BACKENDS[backend](q, [shifted]).out, BACKENDS[backend](q, [segment]).out)


def test_mixed_bits_are_refused():
    x = torch.randn(1, 7, 16)
    with pytest.raises(ValueError, match="keys have 8 bits, values 4"):
        attend_torch.attend(x, [CodedSegment(coded(x, 8), coded(x, 4))])


def test_many_codes_are_decoded_a_block_at_a_time(monkeypatch):
    """The torch path never holds all of them as numbers."""
    monkeypatch.setattr(attend_torch, "DECODED", 40)
    q, segments = random_segments(64, 8, 3, torch.bfloat16)
    verdicts = judge_attend(q, segments, 1.0, attend_torch.attend(q, segments, True))
    assert all(v.passed for v in verdicts), verdicts
