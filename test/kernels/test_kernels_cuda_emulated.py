"""The CUDA attention kernels themselves, thread by thread on the host, judged by the twice-rule."""

from __future__ import annotations

import math

import pytest
import torch
from kernels.coded import random_segments
from kernels.emulated import EmulatedAttend, build, can_build, stand_in

from stac_core.kernels import attend_cuda
from stac_core.kernels.attend import CodedSegment, Codes, Segment
from stac_core.kernels.judge import judge_attend

pytestmark = pytest.mark.skipif(not can_build(), reason="needs g++ and CUDA's headers")


@pytest.fixture(scope="module")
def emulated(tmp_path_factory):
    return EmulatedAttend(build("attend_emulated", tmp_path_factory.mktemp("emulator")))


@pytest.fixture
def attend(emulated, monkeypatch):
    stand_in(emulated, monkeypatch)
    return attend_cuda.attend


# heads, queries, keys of each segment, dim, dtype, subsample, bias
CASES = [
    (2, 130, (97,), 64, torch.float16, 1.0, True),
    (1, 5, (1,), 64, torch.bfloat16, 1.0, False),
    (1, 300, (70, 0, 33), 16, torch.float16, 0.5, True),
    (1, 65, (129,), 128, torch.bfloat16, 1.0, True),
    (1, 33, (64, 65), 32, torch.bfloat16, 1.0, True),
]


def random_case(heads, queries, keys, dim, dtype, bias):
    g = torch.Generator().manual_seed(queries)
    buffer = torch.full((heads, queries, 2, dim), math.nan, dtype=dtype)  # q is a view with gaps
    buffer[:, :, 0] = torch.randn(heads, queries, dim, generator=g).to(dtype)
    segments = []
    for i, n in enumerate(keys):
        k, v = torch.randn(2, heads, n, dim, generator=g).to(dtype)
        b = torch.randn(heads, n, generator=g)
        b[:, n // 3 : n // 2] = -math.inf
        segments.append(Segment(k, v, b if bias and i != 1 else None))
    return buffer[:, :, 0], segments


@pytest.mark.parametrize("case", CASES, ids=str)
def test_twice_rule(attend, case):
    heads, queries, keys, dim, dtype, ratio, bias = case
    q, segments = random_case(heads, queries, keys, dim, dtype, bias)
    verdicts = judge_attend(q, segments, ratio, attend(q, segments, True, ratio))
    assert all(v.passed for v in verdicts), verdicts


@pytest.mark.parametrize(
    "bits, dim, dtype",
    [(8, 64, torch.bfloat16), (4, 64, torch.float16), (8, 128, torch.bfloat16), (4, 16, torch.float16)],
    ids=str,
)
def test_codes_are_decoded_in_the_kernel(attend, bits, dim, dtype):
    """Coded segments before and after one of plain numbers, all in one launch."""
    q, segments = random_segments(dim, bits, 3, dtype)
    q, segments = q[:2, :40], [first_rows(s, 2) for s in (*segments, segments[0])]
    verdicts = judge_attend(q, segments, 1.0, attend(q, segments, True))
    assert all(v.passed for v in verdicts), verdicts


def first_rows(segment, rows):
    """The first rows of a segment."""
    if isinstance(segment, Segment):
        return Segment(segment.keys[:rows], segment.values[:rows])
    keys, values = segment.keys, segment.values
    return CodedSegment(
        Codes(keys.codes[:rows], keys.grid[:rows], keys.bits, keys.dim, keys.factor[:rows]),
        Codes(values.codes[:rows], values.grid[:rows], values.bits, values.dim),
        segment.bias[:rows],
    )


def test_order_of_threads_changes_no_bit(attend):
    """Every call draws another order of threads and blocks: a missing barrier would show."""
    q, segments = random_case(1, 140, (70,), 64, torch.float16, True)
    first, second = attend(q, segments, True), attend(q, segments, True)
    assert torch.equal(first.out, second.out) and torch.equal(first.key_mass[0], second.key_mass[0])


def test_rows_without_a_visible_key(attend):
    q, (segment,) = random_case(2, 20, (70,), 16, torch.float16, True)
    segment.bias[1] = -math.inf
    out, lse, key_mass = attend(q, [segment, segment], True)
    assert (out[1] == 0).all() and lse[1].isneginf().all() and (key_mass[1][1] == 0).all()
    assert out[0].isfinite().all() and lse[0].isfinite().all() and key_mass[0].isfinite().all()
