"""The compiled voxel merges decide like the reference and agree with it in every number."""

from __future__ import annotations

import pytest
import torch
from kernels.emulated import EmulatedMerge, build, can_build, stand_in

from stac_core.kernels import voxel_merge_cuda, voxel_merge_triton
from stac_core.kernels.random_merges import RULES, decisive, empty_state, in_16_bits, random_tokens
from stac_core.kernels.voxel_merge import MergeRules
from stac_core.kernels.voxel_merge_rows import group_by_row
from stac_core.kernels.voxel_merge_torch import voxel_merge as reference


@pytest.fixture(scope="module")
def emulated(tmp_path_factory):
    """The CUDA kernel, thread by thread on the host."""
    if not can_build():
        pytest.skip("needs g++ and CUDA's headers")
    return EmulatedMerge(build("voxel_merge_emulated", tmp_path_factory.mktemp("emulator")))


@pytest.fixture(params=["triton", "emulated"])
def backend(request, monkeypatch):
    if request.param == "emulated":
        stand_in(request.getfixturevalue("emulated"), monkeypatch)
        return voxel_merge_cuda.voxel_merge
    return voxel_merge_triton.voxel_merge


def assert_same(got, expected):
    assert torch.equal(got.members, expected.members)
    assert torch.equal(got.buffer_score, expected.buffer_score)
    for name, mine, theirs in zip(got._fields, got, expected, strict=True):
        present = (
            expected.members > 0 if mine.shape[1] == got.members.shape[1] else got.buffer_score.isfinite()
        )
        torch.testing.assert_close(
            mine[present], theirs[present], atol=1e-5, rtol=1e-5, msg=lambda m, n=name: f"{n}: {m}"
        )


@pytest.mark.parametrize(
    "pivots, buffer, dim, rules, calls, count",
    [
        pytest.param(4, 8, 64, RULES, 4, 90, marks=pytest.mark.slow),
        (3, 4, 20, MergeRules(0.7, 0.5), 3, 40),
        (2, 2, 16, MergeRules(0.8, 0.0, inertia=5.0), 2, 30),
    ],
)
def test_a_series_of_calls_agrees_with_the_reference(backend, pivots, buffer, dim, rules, calls, count):
    state = empty_state(6, pivots, buffer, dim)
    seen = torch.zeros(5, dtype=torch.int64)
    for call in range(calls):
        tokens = decisive(state, random_tokens(6, count, dim, seed=call), rules)
        tokens = decisive(state, in_16_bits(tokens), rules) if call else tokens
        before = [part.clone() for part in state]
        got, got_counts = backend(state, tokens, rules)
        expected, counts = reference(state, tokens, rules)
        assert torch.equal(got_counts, counts)
        assert_same(got, expected)
        assert all(torch.equal(a, b) for a, b in zip(before, state, strict=True))
        state = expected
        seen += counts
    assert (seen[[0, 1, 3, 4]] > 0).all() and (seen[2] > 0 or rules.gate == 0)  # everything happened


def test_rows_of_many_pivots_and_tokens_agree_with_the_reference():
    """More pivots than a number of 32 bits has, more tokens than are ranked at once."""
    state = empty_state(3, 35, 2, 16)
    rules = MergeRules(0.9, 0.0)
    for call in range(2):
        tokens = decisive(state, random_tokens(3, 150, 16, seed=call), rules)
        got, got_counts = voxel_merge_triton.voxel_merge(state, tokens, rules)
        expected, counts = reference(state, tokens, rules)
        assert torch.equal(got_counts, counts)
        assert_same(got, expected)
        state = expected
    assert counts[0] > 0 and counts[4] > 0  # some joined, some pivots were folded
    assert ((state.members > 0).sum(1) == 35).any()


@pytest.mark.parametrize("pivots, dim", [(32, 128), (32, 64), (12, 128)])
def test_rows_as_large_as_the_cuda_kernel_takes_agree_with_the_reference(emulated, monkeypatch, pivots, dim):
    """Their pivots fill the shared memory of a small GPU."""
    stand_in(emulated, monkeypatch)
    state, rules = empty_state(5, pivots, 2, dim), MergeRules(0.9, 0.0)
    for call in range(2):
        tokens = decisive(state, random_tokens(5, 60, dim, seed=call), rules)
        got, got_counts = voxel_merge_cuda.voxel_merge(state, tokens, rules)
        expected, counts = reference(state, tokens, rules)
        assert torch.equal(got_counts, counts)
        assert_same(got, expected)
        state = expected
    assert counts[0] > 0 and counts[3] > 0  # some joined, some pivots were made


def test_equal_scores_keep_the_older_token_first(backend):
    state = empty_state(1, 4, 8, 16)
    g = torch.Generator().manual_seed(3)
    keys, values = torch.randn(2, 11, 16, generator=g)
    tokens = group_by_row(torch.zeros(11, dtype=torch.int64), 1, keys, values, torch.ones(11))
    state, _ = backend(state, tokens, RULES)
    assert torch.equal(state.buffer_keys[0, :3], keys[8:])
    torch.testing.assert_close(state.members[0], torch.tensor([8.0, 0, 0, 0]))


def test_strided_views_are_read_like_copies(backend):
    state, _ = reference(empty_state(3, 4, 8, 16), random_tokens(3, 60, 16, seed=1), RULES)
    tokens = decisive(state, random_tokens(3, 20, 16, seed=2))
    strided = type(state)(*(torch.stack([part, part], -1)[..., 0] for part in state))
    assert not strided.weight.is_contiguous()
    (got, counts), (expected, expected_counts) = (
        backend(strided, tokens, RULES),
        backend(state, tokens, RULES),
    )
    assert torch.equal(counts, expected_counts)
    assert_same(got, expected)


def test_rows_take_their_tokens_from_anywhere_in_a_longer_order(backend):
    """As the rows of one of several merges do."""
    state, tokens = empty_state(6, 4, 8, 16), random_tokens(6, 90, 16, seed=1)
    late = type(state)(*(part[3:] for part in state))
    got, counts = backend(late, tokens._replace(start=tokens.start[3:]), RULES)
    expected, _ = backend(state, tokens, RULES)
    assert_same(got, type(state)(*(part[3:] for part in expected)))
    assert int(counts[:3].sum()) == int(tokens.start[-1] - tokens.start[3]) < 90


def test_nothing_to_merge_changes_nothing(backend):
    state, _ = reference(empty_state(6, 4, 8, 16), random_tokens(6, 200, 16, seed=1), RULES)
    none = random_tokens(6, 0, 16, seed=1)
    after, counts = backend(state, none, RULES)
    assert counts.tolist() == [0, 0, 0, 0, 0]
    assert_same(after, state)


CHECKING = {
    "torch": reference, "triton": voxel_merge_triton.voxel_merge, "cuda": voxel_merge_cuda.voxel_merge,
}  # fmt: skip


@pytest.mark.parametrize("name", CHECKING)
@pytest.mark.parametrize(
    "part, value, words",
    [
        ("keys", torch.zeros(7, 17), r"tokens.keys: expected shape \[7, 16\], got \[7, 17\]"),
        ("score", torch.zeros(7).double(), "tokens.score: expected torch.float32, got torch.float64"),
        ("keys", torch.zeros(7, 16).double(), "tokens.keys: expected float32, bfloat16 or float16, got"),
        ("values", torch.zeros(7, 16).half(), "tokens.values: expected torch.float32, got torch.float16"),
        ("order", torch.zeros(7), "tokens.order: expected torch.int64, got torch.float32"),
        ("start", torch.zeros(6, dtype=torch.int64), r"tokens.start: expected shape \[7\], got \[6\]"),
        ("score", torch.zeros(7, device="meta"), "tokens.score: is on meta"),
    ],
)
def test_bad_tokens_are_named(name, part, value, words):
    tokens = random_tokens(6, 7, 16, seed=1)._replace(**{part: value})
    with pytest.raises(ValueError, match=words):
        CHECKING[name](empty_state(6, 4, 8, 16), tokens, RULES)


@pytest.mark.parametrize("name", CHECKING)
@pytest.mark.parametrize(
    "part, value, words",
    [
        ("weight", torch.zeros(6, 3), r"state.weight: expected shape \[6, 4\], got \[6, 3\]"),
        ("pivot_keys", torch.zeros(6, 4), r"state: expected pivot_keys \[R, G, D\].*got \[6, 4\]"),
        ("members", torch.zeros(6, 4).half(), "state.members: expected torch.float32, got torch.float16"),
        ("buffer_keys", torch.zeros(6, 8, 16, device="meta"), "state.buffer_keys: is on meta"),
    ],
)
def test_bad_state_is_named(name, part, value, words):
    state = empty_state(6, 4, 8, 16)._replace(**{part: value})
    with pytest.raises(ValueError, match=words):
        CHECKING[name](state, random_tokens(6, 7, 16, seed=1), RULES)


def test_cuda_refuses_what_it_has_no_kernel_for():
    merge, tokens = voxel_merge_cuda.voxel_merge, random_tokens(6, 7, 16, seed=1)
    with pytest.raises(ValueError, match=r"state.pivot_keys: 33 pivots of 16 channels.* at most 32 and 128"):
        merge(empty_state(6, 33, 8, 16), tokens, RULES)
    with pytest.raises(
        ValueError, match=r"tokens.order: is on cpu, the cuda backend computes on CUDA devices"
    ):
        merge(empty_state(6, 4, 8, 16), tokens, RULES)
