"""A stream against one pass over all of its frames: the same numbers wherever they see the same past."""

from __future__ import annotations

import pytest
import torch
from cache.streams import FRAMES, KERNELS, assert_equal, cache_for, stream
from tiny import figures, golden_images, tiny_network

from stac_core.cache import open_cache
from stac_core.cache.one_pass import OnePass
from stac_core.config import CacheConfig


@pytest.fixture(scope="module")
def network():
    return tiny_network()


def test_unlimited_budget_equals_one_causal_pass(network):
    streamed = stream(network, cache_for(network, mode="causal"), [1] * FRAMES)
    assert_equal(streamed, figures(network, golden_images(FRAMES), OnePass("causal")))


def test_one_chunk_of_all_frames_equals_full(network):
    streamed = stream(network, cache_for(network, mode="causal"), [FRAMES])
    assert_equal(streamed, figures(network, golden_images(FRAMES), OnePass("full")))


@pytest.mark.parametrize("mode", ["window_kv", "stac"])
def test_a_window_longer_than_the_stream_equals_causal_bit_for_bit(network, mode):
    settings = {"chunk_size": 1, "hh_size": 0, "retrieval_size": 0, "camera_window": FRAMES}
    window = cache_for(network, mode=mode, window_size=FRAMES, **settings)
    windowed = stream(network, window, [1] * FRAMES)
    causal = stream(network, cache_for(network, mode="causal", chunk_size=1), [1] * FRAMES)
    for name, value in causal.items():
        assert torch.equal(windowed[name], value), name


@pytest.mark.parametrize(("window", "chunks"), [(2, [1] * 8), (3, [2] * 4), (1, [3, 3, 2]), (5, [1] * 8)])
def test_window_kv_equals_one_pass_under_the_block_mask(network, window, chunks):
    frames = sum(chunks)
    visible = torch.zeros(frames, frames, dtype=torch.bool)
    start = 0
    for size in chunks:
        visible[start : start + size, max(0, start - window) : start + size] = True
        visible[start : start + size, 0] = True
        start += size
    cache = cache_for(network, mode="window_kv", window_size=window, chunk_size=max(chunks))
    expected = figures(network, golden_images(frames), OnePass(visible=visible))
    assert_equal(stream(network, cache, chunks), expected)


def test_shared_camera_memory_shows_each_iteration_the_ones_before():
    network = tiny_network("shared")
    streamed = stream(network, cache_for(network, mode="causal"), [1] * FRAMES)
    separate = stream(tiny_network(), cache_for(tiny_network(), mode="causal"), [1] * FRAMES)
    first, last = "pose_enc_iter0", "pose_enc"
    assert_equal({first: streamed[first][:, :1]}, {first: separate[first][:, :1]})
    assert (streamed[last] - separate[last]).abs().max() > 1e-3


class Broken(Exception):
    pass


@pytest.mark.parametrize("layer", [0, 3, "heads"])
def test_a_failed_chunk_leaves_the_stream_as_it_was(network, layer, monkeypatch):
    images = golden_images(FRAMES)
    settings = {"mode": "window_kv", "window_size": 2, "chunk_size": 2}
    expected = stream(network, cache_for(network, **settings), [2, 2, 2, 2])
    cache = cache_for(network, **settings)
    first = stream(network, cache, [2, 2], images[:, :4])

    def fail(*_):
        raise Broken

    part = network.depth_head if layer == "heads" else network.aggregator.global_blocks[layer].mlp.fc2
    with monkeypatch.context() as patch, pytest.raises(Broken):
        patch.setattr(part, "forward", fail)
        figures(network, images[:, 4:5], cache)  # fewer frames than the chunk that follows
    rest = stream(network, cache, [2, 2], images[:, 4:])
    for name, value in expected.items():
        assert torch.equal(torch.cat([first[name], rest[name]], 1), value), name


def test_streams_that_share_a_network_do_not_meet(network):
    images = golden_images(FRAMES)
    alone = [stream(network, cache_for(network), [1] * 8, frames) for frames in (images, images.flip(1))]
    caches = [cache_for(network), cache_for(network)]
    for i in range(FRAMES):
        for cache, frames, expected in zip(caches, (images, images.flip(1)), alone, strict=True):
            found = figures(network, frames[:, i : i + 1], cache)
            cache.settle()
            for name, value in expected.items():
                assert torch.equal(found[name], value[:, i : i + 1]), name


def test_reset_begins_a_new_stream(network):
    cache = cache_for(network, window_size=2)
    first = stream(network, cache, [1] * 4)
    cache.reset()
    again = stream(network, cache, [1] * 4)
    assert all(torch.equal(again[name], value) for name, value in first.items())


def test_a_window_of_a_thousand_frames_stays_as_small_as_of_ten():
    cache = cache_for(tiny_network(), mode="window_kv", window_size=4, chunk_size=4)
    generator = torch.Generator().manual_seed(0)
    sizes = set()
    for step in range(250):
        cache.begin(4, 12)
        for layer in range(6):
            cache.attend(layer, *torch.randn(3, 1, 4, 48, 16, generator=generator))
        for iteration in range(4):
            for layer in range(3):
                cache.attend_camera(iteration, layer, *torch.randn(3, 1, 8, 4, 16, generator=generator))
        cache.settle()
        if step >= 5:
            stats = cache.stats()
            sizes.add((stats.live_tokens, stats.live_bytes, stats.camera_bytes))
    assert cache.stats().frames_seen == 1000
    ((tokens, total, camera),) = sizes
    assert tokens == 5 * 12
    assert 0 <= camera - 2 * 12 * 8 * (1 + 4 + 4) * 16 * 4 < 1000  # beside keys and values: frame numbers
    assert 0 <= total - camera - 2 * 6 * 4 * (1 + 4 + 4) * 12 * 16 * 4 < 1000


def test_frames_that_do_not_fit_the_stream_are_refused_with_the_cure(network):
    cache = cache_for(network, chunk_size=2)
    with pytest.raises(ValueError, match=r"3 frames .*chunk_size is 2"):
        figures(network, golden_images(3), cache)
    stream(network, cache, [2])
    with pytest.raises(ValueError, match="reset the stream"):
        figures(network, golden_images(1)[..., :56, :56], cache)
    with pytest.raises(ValueError, match="batch size 1"):
        figures(network, golden_images(1).repeat(2, 1, 1, 1, 1), cache)


def test_settling_an_unfinished_pass_is_an_error(network):
    cache = cache_for(network)
    cache.begin(1, 4)
    cache.attend(0, *torch.randn(3, 1, 4, 4, 16))
    with pytest.raises(RuntimeError, match="incomplete"):
        cache.settle()


@pytest.mark.parametrize("mode", ["full", "window"])
def test_offline_modes_take_one_pass(network, mode):
    cache = open_cache(CacheConfig(mode=mode, window_size=4), network.config, KERNELS)
    expected = figures(network, golden_images(FRAMES), OnePass(mode, window=5))
    assert_equal(stream(network, cache, [FRAMES]), expected, 0.0)
    with pytest.raises(ValueError, match="one step"):
        figures(network, golden_images(1), cache)
