"""Keys split among several programs: any number of parts gives the same attention; when they are split."""

from __future__ import annotations

import math

import pytest
import torch
from kernels.coded import random_segments
from kernels.split_keys import attend_in

from stac_core.kernels import attend_split_triton, attend_triton, launch_triton
from stac_core.kernels.attend import Segment
from stac_core.kernels.attend_split_triton import MOST_PARTS, choose_parts
from stac_core.kernels.judge import judge_attend

H200 = 2 * 132  # programs that run at once, of 128 queries and 64 keys; it has 132 multiprocessors


def segment(rows: int, keys: int, dim: int, dtype: torch.dtype, hide: slice | None = None) -> Segment:
    """With a bias where keys are hidden."""
    k, v = torch.randn(2, rows, keys, dim, generator=torch.Generator().manual_seed(keys)).to(dtype)
    if hide is None:
        return Segment(k, v)
    bias = torch.randn(rows, keys, generator=torch.Generator().manual_seed(1))
    bias[:, hide] = -math.inf
    return Segment(k, v, bias)


def queries(rows: int, count: int, dim: int, dtype: torch.dtype) -> torch.Tensor:
    return torch.randn(rows, count, dim, generator=torch.Generator().manual_seed(9)).to(dtype)


def judge(q: torch.Tensor, segments: list, parts: int, share: float = 1.0) -> None:
    verdicts = judge_attend(q, segments, share, attend_in(parts)(q, segments, True, share))
    assert all(v.passed for v in verdicts), verdicts


@pytest.mark.parametrize(
    "parts, dtype",
    [(parts, torch.bfloat16) for parts in range(1, MOST_PARTS + 1)]
    + [(3, torch.float32), (7, torch.float32)],
    ids=str,
)
def test_any_number_of_parts_keeps_the_twice_rule(parts, dtype):
    """Numbers with and without bias, an empty segment; 9 blocks of keys in bfloat16, 16 in float32."""
    segments = [
        segment(2, n, 64, dtype, hide)
        for n, hide in ((129, None), (0, None), (190, slice(50, 90)), (70, None))
    ]
    judge(queries(2, 50, 64, dtype), segments, parts)


@pytest.mark.parametrize("bits, dim, parts", [(8, 64, 3), (4, 64, MOST_PARTS), (4, 128, 5)])
def test_codes_in_parts(bits, dim, parts):
    q, segments = random_segments(dim, bits, 3, torch.bfloat16)
    judge(q, [*segments, segments[0]], parts, 0.5)


@pytest.mark.parametrize("keys", [1, 64, 65])
def test_parts_without_any_key(keys):
    """One or two blocks of keys for eight parts."""
    judge(queries(3, 40, 64, torch.float16), [segment(3, keys, 64, torch.float16)], MOST_PARTS)


@pytest.mark.parametrize("hidden", [slice(0, 64), slice(64, 128), slice(128, 192)], ids=str)
def test_a_part_that_sees_none_of_its_keys(hidden):
    judge(queries(2, 40, 64, torch.bfloat16), [segment(2, 192, 64, torch.bfloat16, hidden)], 3)


def test_rows_that_see_nothing_in_any_part():
    one = segment(2, 192, 64, torch.float32, slice(0, 0))
    one.bias[1] = -math.inf
    out, lse, mass = attend_in(3)(queries(2, 40, 64, torch.float32), [one], True)
    assert (out[1] == 0).all() and lse[1].isneginf().all() and (mass[0][1] == 0).all()
    assert out.isfinite().all() and lse[0].isfinite().all() and mass[0].isfinite().all()


def test_splitting_costs_no_accuracy_where_logits_are_large():
    """Parts whose logits lie 500 apart: nothing is rounded besides what one program rounds as well."""
    low, high = segment(1, 64, 16, torch.float32), segment(1, 65, 16, torch.float32, slice(0, 0))
    high = Segment(high.keys, high.values, high.bias + 500)
    q = queries(1, 33, 16, torch.float32)
    for pair in ([low, high], [high, low]):
        whole, split = attend_in(1)(q, pair), attend_in(4)(q, pair)
        torch.testing.assert_close(split.out, whole.out)
        torch.testing.assert_close(split.lse, whole.lse)


@pytest.mark.parametrize("parts", [2, 7])
def test_two_runs_give_identical_bytes(parts):
    q, one = queries(2, 70, 64, torch.bfloat16), segment(2, 300, 64, torch.bfloat16)
    first, second = (attend_in(parts)(q, [one], True) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first[:2], second[:2], strict=True))
    assert torch.equal(first.key_mass[0], second.key_mass[0])


def test_many_multiprocessors_split_few_queries(monkeypatch):
    """The whole path, as a device with 132 multiprocessors would take it."""
    found, real = [], attend_split_triton.choose_parts
    monkeypatch.setattr(attend_triton, "multiprocessors", lambda _: 132)
    monkeypatch.setattr(
        attend_triton, "choose_parts", lambda *sizes: found.append((sizes, real(*sizes))) or found[-1][1]
    )
    q, one = queries(1, 130, 16, torch.bfloat16), segment(1, 1500, 16, torch.bfloat16)
    verdicts = judge_attend(q, [one], 1.0, attend_triton.attend(q, [one], True))
    assert all(v.passed for v in verdicts), verdicts
    assert found == [((2, 24, 132), found[0][1])] and 1 < found[0][1] <= MOST_PARTS


def test_one_frame_is_split_and_a_chunk_of_four_is_not():
    """1041 queries in 16 heads over ten frames of keys, 4164 over thirteen."""
    assert choose_parts(9 * 16, 166, H200) > 1
    assert choose_parts(33 * 16, 215, H200) == 1


@pytest.mark.parametrize("at_once", [1, 46, 108, 264])
def test_sensible_numbers_of_parts(at_once):
    for query_blocks in (1, 16, 144, 272, 528, 2000):
        for key_blocks in (1, 2, 3, 17, 166, 5000):
            parts = choose_parts(query_blocks, key_blocks, at_once)
            assert 1 <= parts <= min(MOST_PARTS, key_blocks)
            assert parts == 1 or query_blocks < 1.5 * at_once
    assert choose_parts(1, 3, at_once) == 1  # what a second launch costs is not saved by so few keys


def test_nothing_is_split_where_programs_run_one_after_the_other():
    """As in the interpreter."""
    assert launch_triton.multiprocessors(torch.device("cpu")) == 1
    assert {choose_parts(q, k, 1) for q in (1, 2, 9) for k in (1, 30, 3000)} == {1}
