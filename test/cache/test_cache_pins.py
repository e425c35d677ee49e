"""Frames pinned on the way: kept whole for ever, and never beyond the byte limit."""

from __future__ import annotations

import pytest
import torch
from cache.worlds_of_tokens import KERNELS, Walk, feed, parity, small_network

from stac_core.cache.memory_model import live_bytes
from stac_core.cache.stream_cache import StreamCache

WALK = Walk(small_network())
SETTINGS = {"chunk_size": 1, "voxel_buf_cap": 3, "camera_window": 3}


def stream(mode: str = "stac", room: int = 0) -> StreamCache:
    """A stream whose byte limit leaves so much room beside the live cache."""
    config = parity(mode=mode, memory_budget=least(mode) + room, **SETTINGS)
    return StreamCache(config, WALK.network, KERNELS)


def least(mode: str) -> int:
    return live_bytes(parity(mode=mode, **SETTINGS), WALK.network, WALK.tokens, torch.float32)


def pinned(cache: StreamCache, frame: int, limit: int) -> bool:
    try:
        cache.pin(frame)
    except ValueError as refusal:
        assert int(str(refusal).rpartition("nearest value that works: ")[2]) > limit
        return False
    return True


@pytest.mark.parametrize("mode", ["stac", "window_kv", "xstream"])
@pytest.mark.parametrize("begins", [1, 30])
def test_pins_never_exceed_the_limit(mode, begins):
    """Early, when the voxel memory has little, and late, when it has taken what there was."""
    cache, limit, accepted = stream(mode, 50_000), least(mode) + 50_000, 0
    for frame in range(60):
        feed(cache, WALK, frame, 1)
        if frame >= begins:
            accepted += pinned(cache, frame, limit)
        assert cache.stats().bytes <= limit, frame
    assert accepted < 60 - begins
    assert accepted > 0 or (mode == "stac" and begins == 30)


def test_a_window_of_nothing_but_pinned_frames_counts_as_begun():
    cache = stream("window_kv")
    feed(cache, WALK, 0, 1)
    with pytest.raises(ValueError, match="memory_budget"):
        cache.pin(1)
    feed(cache, WALK, 1, 1)


def test_pins_that_the_first_pass_finds_too_many_are_dropped_and_the_stream_goes_on():
    plain, cache = stream(), stream()
    cache.pin(3)
    with pytest.raises(ValueError, match=r"pinned no more.*frames 3\..*nearest value that works: \d+"):
        feed(cache, WALK, 0, 1)
    for frame in range(8):
        assert torch.equal(feed(cache, WALK, frame, 1), feed(plain, WALK, frame, 1))


def test_pins_before_the_first_pass_that_fit_are_kept():
    cache = stream("window_kv", 50_000)
    cache.pin(3)
    for frame in range(12):
        feed(cache, WALK, frame, 1)
    _, keys, _, _ = WALK.frames(3, 1)
    assert torch.equal(cache.live().keys[:, :, WALK.tokens : 2 * WALK.tokens], keys)


def test_pinning_a_pinned_frame_again_changes_nothing():
    plain, cache = stream("window_kv"), stream("window_kv")
    for frame in range(8):
        cache.pin(0)
        assert torch.equal(feed(cache, WALK, frame, 1), feed(plain, WALK, frame, 1))


def test_a_negative_frame_is_refused():
    with pytest.raises(ValueError, match=r"frame = -3: .*nearest value that works: 0"):
        stream().pin(-3)
