"""What a pass makes leave may be merged while the device is at the next one: everything stays the same."""

from __future__ import annotations

import gc
import weakref
from dataclasses import replace

import pytest
import torch
from cache.test_cache_budget import limited
from cache.worlds_of_tokens import KERNELS, Walk, feed, numbers, parity, small_network

from stac_core.cache.stream_cache import StreamCache
from stac_core.evaluation.gpu.waits import host_waits
from stac_core.kernels import select

FRAMES = 24
WALK = Walk(small_network(layers=2, heads=1, dim=8), patches=6, length=6.0, pace=0.5)
FEW = {"voxel_buf_cap": 3, "voxel_num": 200, "retrieve_buf": True}
SETTINGS = {
    "every chunk of two retrieves": {},
    "some do": {"window_size": 4},
    "after merging": {"retrieve_after_merge": True},
    "codes": {"pivot_bits": 4, "buffer_bits": 8, "window_bits": 8, "anchor_bits": 8, "pinned_bits": 8},
    "feedback": {"feedback": 0.5, "prefetch": True},
    "stale": {"stale_after": 2, "norm_keep": True},
    "by distance": {"retrieve_by": "near"},
    "by query": {"retrieve_by": "query"},
    "pruned": {"mode": "xstream"},
}


def stream(config, kernels=KERNELS) -> StreamCache:
    return StreamCache(config, WALK.network, kernels)


def assert_same_memory(ours: StreamCache, theirs: StreamCache) -> None:
    found, expected = numbers(ours.state()), numbers(theirs.state())
    assert found.keys() == expected.keys()
    for name, number in expected.items():
        assert torch.equal(found[name].nan_to_num(), number.nan_to_num()), name


@pytest.mark.parametrize("name", SETTINGS)
@pytest.mark.parametrize("chunk", [1, 2])
@pytest.mark.parametrize("when", ["early", "late"])
def test_merging_beside_the_next_pass_changes_nothing(name, chunk, when):
    """A device may do so at any time from the beginning of the pass to its end."""
    config = parity(chunk_size=chunk, **({} if "mode" in SETTINGS[name] else FEW), **SETTINGS[name])
    ours, theirs = stream(config), stream(config)
    for first in range(0, FRAMES, chunk):
        found, expected = (feed(s, WALK, first, chunk, beside=when * (s is ours)) for s in (ours, theirs))
        assert torch.equal(found, expected), first
    assert ours.stats(members=True) == theirs.stats(members=True)
    assert_same_memory(ours, theirs)


def test_a_pass_that_nobody_merges_beside_merges_before_it_is_settled():
    """Not every pass of a stream is a recorded one; and one is pinned, saved and reset in the midst of it."""
    config = parity(**FEW)
    ours, theirs = stream(config), stream(config)
    for first in range(0, FRAMES, 2):
        for cache in (ours, theirs):
            feed(cache, WALK, first, 2, beside="late" * (cache is ours and first % 6 > 0))
        if first == 8:
            ours.pin(9), theirs.pin(9)
        if first == 16:
            assert_same_memory(ours, theirs)
    ours.reset(), theirs.reset()
    assert ours.stats() == theirs.stats()
    for cache in (ours, theirs):
        feed(cache, WALK, 0, 2)
    assert_same_memory(ours, theirs)


def noting(asked: list[str]) -> select.Kernels:
    """Kernels that note which of them is asked for."""

    def noted(name):
        def call(*arguments, **named):
            asked.append(name)
            return getattr(KERNELS, name)(*arguments, **named)

        return call

    return replace(KERNELS, **{name: noted(name) for name in ("voxel_merge", "gather")})


def test_settling_leaves_to_the_next_pass_what_it_does_not_need():
    """Every other chunk retrieves, before the tokens that leave are merged."""
    asked: list[str] = []
    cache, settled, caught_up = stream(parity(window_size=4, **FEW), noting(asked)), [], []
    settle = cache.settle
    cache.settle = lambda places: (caught_up.append(asked.copy()), asked.clear(), settle(places))
    for first in range(0, FRAMES, 2):
        feed(cache, WALK, first, 2, beside="late")
        settled.append(asked.copy()), asked.clear()
    assert settled[-4:] in ([["gather"], [], ["gather"], []], [[], ["gather"], [], ["gather"]])
    assert caught_up[-4:] == [["voxel_merge"]] * 4


def test_settling_waits_for_no_voxels_where_nothing_is_retrieved():
    """So the host can go on to the next pass while the device is at this one."""
    cache, waits = stream(parity(window_size=4, **FEW)), []
    settle = cache.settle
    cache.settle = lambda places: waits.append(host_waits(lambda: settle(places), torch.device("cpu")))
    for first in range(0, FRAMES, 2):
        feed(cache, WALK, first, 2, beside="late")
    of_voxels = [any("voxel" in row["line"] for row in lines) for lines in waits[-4:]]
    assert of_voxels in ([True, False] * 2, [False, True] * 2), waits[-4:]


def test_tokens_that_wait_are_told_and_not_yet_counted():
    ours, theirs = (stream(parity(**FEW)) for _ in range(2))
    for first in range(0, FRAMES, 2):
        before = theirs.stats()
        for cache in (ours, theirs):
            feed(cache, WALK, first, 2, beside="late" * (cache is ours))
    waiting, merged = ours.stats(), theirs.stats()
    assert (waiting.inserted, waiting.merged) == (before.inserted, before.merged)
    assert waiting.inserted < merged.inserted and waiting.merged < merged.merged
    assert waiting.live_bytes > merged.live_bytes
    ours.catch_up()
    assert ours.stats() == merged


@pytest.mark.parametrize("extra", [2_000, 9_000, 30_000])
def test_under_a_limit_tokens_wait_only_where_it_has_room_for_them(extra):
    config = limited(extra, WALK, **FEW)
    ours, theirs = stream(config), stream(config)
    waited = []
    for first in range(0, 2 * FRAMES, 2):
        found, expected = (feed(s, WALK, first, 2, beside="late" * (s is ours)) for s in (ours, theirs))
        assert torch.equal(found, expected), first
        assert ours.stats().bytes <= config.memory_budget
        waited.append(ours.stats() != theirs.stats())
    assert any(waited) == (extra > 2_000) and all(waited[2:]) == (extra == 30_000), waited
    assert_same_memory(ours, theirs)


def test_a_stream_that_is_dropped_gives_its_memory_back_at_once():
    """Whatever it has left to be done; on a GPU nobody waits for the garbage collector."""
    cache = stream(parity(window_size=4, **FEW))
    gc.collect(), gc.disable()
    try:
        for first in range(0, FRAMES, 2):
            feed(cache, WALK, first, 2, beside="late")
            left_undone = cache._unmerged is not None
        assert left_undone
        gone = weakref.ref(cache)
        del cache
        assert gone() is None
    finally:
        gc.enable()
