"""The highest scores of every lane: the same places as a stable sort finds, in the same order."""

from __future__ import annotations

import math

import pytest
import torch

from stac_core.evaluation.gpu.measure import poisoned_memory
from stac_core.kernels import highest_torch, highest_triton

BACKENDS = {"torch": highest_torch.highest, "triton": highest_triton.highest}
SPECIAL = torch.tensor([0.0, -0.0, math.inf, -math.inf, 1.0, -1.0, 1e-45, -1e-45, 3e38, -3e38])


@pytest.fixture(params=BACKENDS)
def backend(request):
    return BACKENDS[request.param]


def naive(score, budget):
    """By Python's stable sort; → places and the rest, lane by lane."""
    chosen, rest = [], []
    for row in score.tolist():
        order = sorted(range(len(row)), key=lambda i: -row[i])
        chosen.append(sorted(order[:budget]))
        rest.append(sorted(order[budget:]))
    return (torch.tensor(x, dtype=torch.int64).reshape(len(score), -1) for x in (chosen, rest))


def normal(lanes, n, g):
    return torch.randn(lanes, n, generator=g)


def tied(lanes, n, g):
    return torch.randint(-2, 3, (lanes, n), generator=g).float()


def equal(lanes, n, g):
    return torch.full((lanes, n), -0.25)


def special(lanes, n, g):
    """Both zeros and infinities, the smallest and the largest numbers."""
    return SPECIAL[torch.randint(len(SPECIAL), (lanes, n), generator=g)]


def absent(lanes, n, g):
    """−∞ in most columns."""
    return normal(lanes, n, g).masked_fill(torch.rand(lanes, n, generator=g) < 0.8, -math.inf)


def agree(backend, score, budget):
    before = score.clone()
    with poisoned_memory():
        places, rest = backend(score, budget, rest=True)
        alone = backend(score, budget)
    expected, others = naive(score, budget)
    assert places.dtype == rest.dtype == torch.int64
    assert torch.equal(places, expected) and torch.equal(rest, others)
    assert torch.equal(alone.places, expected) and alone.rest is None
    assert torch.equal(score, before)


@pytest.mark.parametrize("scores", [normal, tied, equal, special, absent])
@pytest.mark.parametrize("lanes, n", [(1, 1), (3, 97), (1, 1025)])
def test_the_highest_are_those_of_a_stable_sort(backend, scores, lanes, n):
    score = scores(lanes, n, torch.Generator().manual_seed(n))
    for budget in (0, 1, n // 3, n - 1, n, n + 5):
        agree(backend, score, budget)


def test_of_rows_as_long_as_in_a_stream(backend):
    agree(backend, tied(3, 6246, torch.Generator().manual_seed(0)), 2082)


@pytest.mark.parametrize("scores", [tied, absent])
def test_of_rows_that_registers_do_not_hold(backend, scores):
    score = scores(2, highest_triton.KEPT + highest_triton.BLOCK + 77, torch.Generator().manual_seed(1))
    for budget in (5, highest_triton.KEPT):
        agree(backend, score, budget)


def test_what_is_no_number_is_highest(backend):
    nan, inf = math.nan, math.inf
    negative = torch.tensor(-0x400000, dtype=torch.int32).view(torch.float32).item()  # NaN with a sign
    score = torch.tensor([[1.0, nan, inf, -inf, negative, inf, nan], [nan] * 7])
    for budget in range(8):
        got, expected = backend(score, budget, True), highest_torch.highest(score, budget, True)
        assert torch.equal(got.places, expected.places) and torch.equal(got.rest, expected.rest)
    assert backend(score, 3).places.tolist() == [[1, 4, 6], [0, 1, 2]]


def test_rows_need_not_lie_together(backend):
    g = torch.Generator().manual_seed(2)
    agree(backend, normal(3, 200, g)[:, 40:137], 30)
    agree(backend, tied(97, 3, g).T, 30)
    agree(backend, normal(1, 97, g).expand(3, 97), 96)


@pytest.mark.parametrize("lanes, n", [(0, 5), (3, 0), (0, 0)])
def test_of_nothing_there_is_nothing(backend, lanes, n):
    places, rest = backend(torch.zeros(lanes, n), 2, True)
    assert places.shape == (lanes, min(2, n)) and rest.shape == (lanes, max(0, n - 2))
    assert places.dtype == rest.dtype == torch.int64


@pytest.mark.parametrize(
    "score, budget, words",
    [
        (torch.zeros(5), 1, r"score: expected \[lanes, n\], got shape \[5\]"),
        (torch.zeros(2, 3, 4), 1, r"score: expected \[lanes, n\], got shape \[2, 3, 4\]"),
        (torch.zeros(2, 3).half(), 1, "score: expected torch.float32, got torch.float16"),
        (torch.zeros(2, 3), -1, "budget = -1: expected a number of places"),
    ],
)
def test_bad_input_is_named(backend, score, budget, words):
    with pytest.raises(ValueError, match=words):
        backend(score, budget)
