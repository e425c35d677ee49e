"""Drive a stream of golden frames through the tiny network; shared by the cache tests."""

from __future__ import annotations

import torch
from tiny import figures, golden_images

from stac_core.cache.stream_cache import StreamCache
from stac_core.config import CacheConfig
from stac_core.kernels.select import select_kernels

KERNELS = select_kernels("torch", "cpu")
FRAMES = 8
ROUNDING = 2e-5


def cache_for(network, **settings):
    return StreamCache(CacheConfig(**settings), network.config, KERNELS)


def stream(network, cache, chunks, images=None):
    """Feed golden frames in chunks of the given sizes → every figure, joined over the frames."""
    images = golden_images(sum(chunks)) if images is None else images
    parts = []
    for chunk in images.split(list(chunks), dim=1):
        parts.append(figures(network, chunk, cache))
        cache.settle()
    return {name: torch.cat([part[name] for part in parts], dim=1) for name in parts[0]}


def assert_equal(actual, expected, tolerance=ROUNDING):
    for name, value in expected.items():
        limit = tolerance * max(1.0, value.abs().max().item())
        assert (actual[name] - value).abs().max().item() <= limit, name
