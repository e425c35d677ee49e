"""Scores mean the same however frames arrive: one by one, by fours, or as many as a camera had ready."""

from __future__ import annotations

from functools import cache
from itertools import cycle

import pytest
import torch
from cache.worlds_of_tokens import KERNELS, Walk, feed, small_network
from hypothesis import given, settings
from hypothesis import strategies as st

from stac_core.cache.scores import Decay, update
from stac_core.cache.stream_cache import StreamCache
from stac_core.config import CacheConfig

FRAMES = 120
TEMPERATURES = st.sampled_from([0.0, 0.5, 0.9, 0.99, 1.0])
PASSES = st.lists(st.integers(1, 8), min_size=1, max_size=60)


@settings(deadline=None)
@given(
    temperature=TEMPERATURES,
    unit=st.sampled_from(["frames", "chunk"]),
    passes=PASSES,
    first=st.integers(0, 59),
)
def test_a_token_that_always_receives_the_same_ranks_the_same(temperature, unit, passes, first):
    """Whatever the passes since its own and before."""
    decay, first = Decay(temperature, unit), first % len(passes)
    score = torch.zeros(1)
    for frames in passes[first:]:
        lasts = decay.time(1, frames)
        score = update(score, 3 * torch.ones(1) * decay.gathered(lasts), decay.left(lasts))
    now = decay.time(len(passes), sum(passes))
    born = torch.tensor([decay.time(first, sum(passes[:first]))], dtype=torch.int32)
    torch.testing.assert_close(score / decay.gathered(now - born), torch.full((1,), 3.0), rtol=1e-4, atol=0)


@pytest.mark.parametrize("temperature", [0.9999999, 0.99999999])
def test_decays_near_none_are_those_of_none(temperature):
    frames = torch.arange(1, 9, dtype=torch.int32)
    near, none = (Decay(t, "frames").gathered(frames) for t in (temperature, 1.0))
    torch.testing.assert_close(near, none, rtol=1e-5, atol=0)


@settings(deadline=None)
@given(temperature=TEMPERATURES, passes=PASSES)
def test_how_frames_are_divided_into_passes_changes_no_steady_score(temperature, passes):
    decay, score = Decay(temperature, "frames"), 0.0
    for frames in passes:
        score = decay.left(frames) * score + decay.gathered(frames)
    expected = Decay(temperature, "frames").gathered(sum(passes))
    assert temperature == 0 or score == pytest.approx(expected)


@cache
def anchor_age(passes: tuple[int, ...]) -> float:
    """Mean age in frames of the anchors after passes over so many frames in turn, chunk_size = 4."""
    ages = []
    for seed in (1, 3, 5):
        walk = Walk(small_network(), pace=1.0, noise=1.0, seed=seed)
        config = CacheConfig(chunk_size=4, window_size=4, hh_size=2, retrieval_size=0)
        stream, sizes = StreamCache(config, walk.network, KERNELS), cycle(passes)
        while (seen := stream.frames_seen) < FRAMES:
            feed(stream, walk, seen, min(next(sizes), FRAMES - seen))
        everything = torch.stack([walk.frames(i, 1)[1] for i in range(FRAMES)])  # [F, layers, heads, P, D]
        anchors = stream.live().keys[:, :, walk.tokens : 3 * walk.tokens]  # behind the pinned frame
        same = (anchors[None, :, :, :, None] == everything[:, :, :, None]).all(-1).any(-1)  # [F, L, H, n]
        assert (same.sum(0) == 1).all()
        ages.append(FRAMES - same.int().argmax(0).float().mean())
    return float(torch.stack(ages).mean())


@pytest.mark.parametrize("passes", [(1,), (2,), (1, 3, 4, 2)], ids=str)
def test_anchors_are_as_old_however_frames_arrive(passes):
    """By the plain sums of single frames they were 1.6 times as old, the incumbents always winning."""
    assert anchor_age(passes) == pytest.approx(anchor_age((4,)), rel=0.05)
