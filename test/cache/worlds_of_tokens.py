"""Streams of made-up tokens with places in space: for driving a cache without a network."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import lru_cache

import torch
from tiny import TINY
from torch import Tensor

from stac_core.cache.saved_state import State
from stac_core.cache.stream_cache import StreamCache
from stac_core.cache.token_positions import TokenPositions
from stac_core.config import CacheConfig, NetworkConfig
from stac_core.kernels.select import select_kernels

SPECIAL = 2
KERNELS = select_kernels("torch", "cpu")


def small_network(layers: int = 2, heads: int = 2, dim: int = 16) -> NetworkConfig:
    return replace(
        TINY, layers=layers, heads=heads, width=heads * dim, registers=SPECIAL - 1, encoder_heads=1,
        camera_heads=1, camera_blocks=1, dense_layers=tuple(range(layers)),
    )  # fmt: skip


@dataclass(frozen=True)
class Walk:
    """A camera that walks along a corridor, `pace` per frame, forth and back where `length` is given.

    Keys belong to places: seen again, a place has nearly the same key. So tokens merge as in a real scene.
    """

    network: NetworkConfig
    patches: int = 10
    pace: float = 0.3
    length: float = 0.0  # 0 = never turns back
    noise: float = 0.3
    seed: int = 0

    @property
    def tokens(self) -> int:
        return SPECIAL + self.patches

    def frames(self, first: int, count: int) -> tuple[Tensor, Tensor, Tensor, TokenPositions]:
        """q, k, v [layers, heads, count·tokens, D] and places of some frames; the same whenever asked."""
        parts = [self._frame(i) for i in range(first, first + count)]
        q, k, v = (torch.cat([part[i] for part in parts], 2) for i in range(3))
        points = torch.stack([part[3] for part in parts])
        valid = torch.ones(points.shape[:2], dtype=torch.bool)
        valid[:, :SPECIAL] = False
        return q, k, v, TokenPositions(points, valid, points[-1].mean(0), 1.0)

    @lru_cache(maxsize=4096)  # noqa: B019 (a few walks serve all tests)
    def _frame(self, index: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        n = self.network
        generator = torch.Generator().manual_seed(self.seed * 100003 + index)
        where = index * self.pace
        if self.length:
            where = abs((where + self.length) % (2 * self.length) - self.length)
        points = torch.rand(self.tokens, 3, generator=generator) + torch.tensor([where, 0, 0])
        shape = (n.layers, n.heads, self.tokens, n.width // n.heads)
        cells = points.floor().long()
        place = torch.stack([self._key_of(cell) for cell in cells], 2)
        q, noise, v = torch.randn(3, *shape, generator=generator)
        return q, place + self.noise * noise, v + place, points

    def _key_of(self, cell: Tensor) -> Tensor:
        """The key that all tokens in one unit cell share [layers, heads, D]."""
        n = self.network
        seed = int((cell * torch.tensor([73856093, 19349663, 83492791])).sum()) % (1 << 40)
        return torch.randn(
            n.layers, n.heads, n.width // n.heads, generator=torch.Generator().manual_seed(seed)
        )


def parity(**settings) -> CacheConfig:
    """The published behaviour with small windows, and retrieval from the start."""
    defaults = {
        "window_size": 2, "chunk_size": 2, "hh_size": 1, "retrieval_size": 1, "voxel_size": 0.5,
        "first_retrieval": "pivot", "voxel_num": 4,
    }  # fmt: skip
    return CacheConfig.parity(**{**defaults, **settings})


def feed(
    cache: StreamCache, walk: Walk, first: int, count: int, positions: str = "given", beside: str = ""
) -> Tensor:
    """One chunk through all layers, then settled; → what attention returned [layers, heads, M, D].

    beside: what the chunk before has left to be merged is merged "early" or "late" in this pass.
    """
    q, k, v, places = walk.frames(first, count)
    cache.begin(count, walk.tokens)
    if beside == "early":
        cache.catch_up()
    out = [cache.attend(i, q[i, None], k[i, None], v[i, None])[0] for i in range(walk.network.layers)]
    if beside == "late":
        cache.catch_up()
    cache.settle(places if positions == "given" else None)
    return torch.stack(out)


def run(config: CacheConfig, walk: Walk, frames: int) -> tuple[StreamCache, Tensor]:
    """A whole stream; → the cache, and the attention outputs one after the other."""
    cache = StreamCache(config, walk.network, KERNELS)
    out = [
        feed(cache, walk, first, min(config.chunk_size, frames - first))
        for first in range(0, frames, config.chunk_size)
    ]
    return cache, torch.cat(out, 2)


def numbers(state: State) -> dict[str, Tensor]:
    """Every tensor of a saved state by its path."""
    flat: dict[str, Tensor] = {}
    for name, value in state.items():
        inner = numbers(value) if isinstance(value, dict) else {"": value}
        flat |= {f"{name}/{rest}": tensor for rest, tensor in inner.items()}
    return flat
