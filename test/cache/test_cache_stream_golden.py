"""Streams against what the upstream networks put out, in both camera memories and with window trimming."""

from __future__ import annotations

import pytest
from cache.streams import cache_for, stream
from tiny import assert_matches, figures, golden, golden_images, tiny_network

CASES = {
    "s3r_stream_causal": ("per_iteration", [1] * 5, {"mode": "causal"}),
    "s3r_stream_chunked": ("per_iteration", [2, 2, 1], {"mode": "causal"}),
    "s3r_stream_window": ("per_iteration", [1] * 8, {"mode": "window_kv", "window_size": 5, "chunk_size": 1}),
    "sv_stream": ("shared", [1] * 5, {"mode": "causal"}),
}


@pytest.mark.parametrize("name", CASES)
def test_stream_equals_the_golden_figures(name):
    camera_cache, chunks, settings = CASES[name]
    network = tiny_network(camera_cache)
    cache = cache_for(network, **settings)
    found, expected = stream(network, cache, chunks), golden(name)
    compared = [key for key in found if key in expected]
    assert {"depth", "depth_conf"} <= set(compared) and {"pose_enc", "pose_enc_iter3"} & set(compared)
    for key in compared:
        value = expected[key]
        actual = found[key].squeeze(-1) if found[key].ndim == value.ndim + 1 else found[key]
        assert_matches(actual, value, 2e-5, f"{name}.{key}")


def test_window_trimming_keeps_the_anchor_and_five_frames():
    network = tiny_network()
    cache = cache_for(network, mode="window_kv", window_size=5, chunk_size=1)
    expected = golden("s3r_stream_window")["cache_tokens_after_frame"].tolist()
    counts = []
    for i in range(8):
        figures(network, golden_images()[:, i : i + 1], cache)
        cache.settle()
        counts.append(cache.stats().live_tokens)
    assert counts == expected
