"""Every attention backend against float64 by the twice-rule, on awkward shapes."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from kernels.split_keys import attend_in

from stac_core.kernels import attend_torch, attend_triton
from stac_core.kernels.attend import Segment
from stac_core.kernels.judge import judge_attend

PLAIN, SPLIT = {"torch": attend_torch.attend, "triton": attend_triton.attend}, "triton, keys split"
BACKENDS = {**PLAIN, SPLIT: attend_in(3)}
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
LENGTHS, HEADS, DIMS = (1, 97, 1025), (1, 3, 16), (16, 48, 64, 128)

# heads, queries, keys of each segment, dim, dtype, subsample, keys hidden by −inf
AWKWARD = [
    (1, 1, (1,), 16, "float32", 1.0, False),
    (3, 97, (97,), 64, "bfloat16", 1.0, True),
    (16, 97, (1,), 16, "float16", 0.25, False),
    (1, 1025, (97,), 64, "float16", 0.25, True),
    (1, 97, (1025,), 128, "bfloat16", 1.0, True),
    (3, 1, (1025,), 48, "float32", 1.0, True),
    (3, 97, (97, 1), 64, "float32", 1.0, False),
    (1, 1025, (97, 1025), 64, "bfloat16", 0.25, True),
    (3, 97, (33, 0, 97), 20, "float16", 1.0, True),
    (1, 300, (130, 97), 128, "float16", 0.5, False),
]


def grid():
    """Every pair of lengths with every width and share; heads, types, segments and −∞ columns take turns.

    The interpreter runs heads and blocks one after the other, in Python: many heads of long queries over
    long keys would take minutes each and repeat what one head shows. So 16 and 3 heads meet one long side.
    """
    for i, (queries, keys, dim, ratio) in enumerate(itertools.product(LENGTHS, LENGTHS, DIMS, (1.0, 0.25))):
        heads = HEADS[i % 3] if queries * keys <= 97 * 1025 else 1
        segments = (keys, 97) if i // 2 % 3 == 0 else (keys,)
        yield heads, queries, segments, dim, tuple(DTYPES)[i // 3 % 3], ratio, i // 2 % 2 == 0


def check(backend, heads, queries, keys, dim, dtype, ratio, hide):
    g = torch.Generator().manual_seed(1000 * queries + sum(keys))
    q = torch.randn(heads, queries, dim, generator=g).to(DTYPES[dtype])
    segments = []
    for i, n in enumerate(keys):
        k, v = torch.randn(2, heads, n, dim, generator=g).to(DTYPES[dtype])
        bias = torch.randn(heads, n, generator=g)
        if hide:
            bias[:, n // 3 : n // 2] = -math.inf
            bias[0, : n if heads > 1 else 0] = -math.inf  # one head sees nothing of this segment
        segments.append(Segment(k, v, None if i else bias))
    verdicts = judge_attend(q, segments, ratio, BACKENDS[backend](q, segments, True, ratio))
    assert all(v.passed for v in verdicts), verdicts


@pytest.mark.parametrize("backend", [*PLAIN, pytest.param(SPLIT, marks=pytest.mark.slow)])
@pytest.mark.parametrize("case", AWKWARD, ids=str)
def test_awkward_shapes(backend, case):
    check(backend, *case)


@pytest.mark.slow
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("case", list(grid()), ids=str)
def test_grid(backend, case):
    check(backend, *case)


@pytest.mark.parametrize("backend", BACKENDS)
def test_two_runs_give_identical_bytes(backend):
    g = torch.Generator().manual_seed(5)
    q, k, v = (torch.randn(1, n, 64, generator=g) for n in (70, 130, 130))
    first, second = (BACKENDS[backend](q, [Segment(k, v)], True) for _ in range(2))
    assert torch.equal(first.out, second.out) and torch.equal(first.key_mass[0], second.key_mass[0])


@pytest.mark.parametrize("backend", BACKENDS)
def test_large_logits_do_not_overflow(backend):
    g = torch.Generator().manual_seed(6)
    q, k, v = (torch.randn(1, n, 64, generator=g).half() for n in (64, 97, 97))
    segment = Segment(k * 30, v, torch.full((1, 97), -80.0))
    verdicts = judge_attend(q * 30, [segment], 1.0, BACKENDS[backend](q * 30, [segment], True))
    assert all(v.passed for v in verdicts), verdicts


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("largest", [40, 68, 80, 100, 300])  # natural logarithms; float32 ends at 88
@pytest.mark.parametrize("sign", [1, -1])
def test_any_logits_keep_the_twice_rule(backend, largest, sign):
    """Rows of every size side by side, those that leave the range of exponentials among them."""
    g = torch.Generator().manual_seed(9)
    q, k, v = (torch.randn(2, n, 64, generator=g) for n in (64, 131, 131))
    common = torch.randn(64, generator=g)
    q[:, ::2] += sign * common * torch.linspace(0, 1, 32)[:, None]  # half of the queries, more and more
    k += 3 * common
    largest_now = (q @ k.transpose(1, 2)).abs().max() / 8
    q, k, v = (q * largest / largest_now).bfloat16(), k.bfloat16(), (1e6 * v).bfloat16()
    segments = [Segment(k, v), Segment(k[:, :70] / 2, v[:, :70], torch.randn(2, 70, generator=g))]
    verdicts = judge_attend(q, segments, 1.0, BACKENDS[backend](q, segments, True))
    assert all(v.passed for v in verdicts), verdicts


def test_triton_refuses_a_head_width_it_has_no_tile_for():
    x = torch.zeros(1, 4, 160)
    with pytest.raises(ValueError, match="q: head width 160 is more than the 128"):
        attend_triton.attend(x, [Segment(x, x)])
