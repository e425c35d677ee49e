"""Command: what every cache mode costs on a loop through a room, in bytes and in time per step.

    python -m stac_core.evaluation.cache_benchmark                    # bytes at full size, no GPU needed
    python -m stac_core.evaluation.cache_benchmark --shape small --time

The caches are the real ones; the tokens are made up. A camera circles in a box room and looks across it;
keys of one place resemble each other with a cosine of about 0.84, as measured on real scenes (STAC, arXiv
2603.20284). At full size one lane of the 384 (layers × heads) is run and its bytes counted 384
times, because a lane's bytes depend on its own tokens only. Without --time the attention is left out and
scores are random, which decides who is evicted but not how
many; their spread decides how many tokens the gate drops.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from stac_core.cache.memory_model import live_bytes, token_bytes
from stac_core.cache.stream_cache import StreamCache
from stac_core.cache.token_positions import TokenPositions
from stac_core.config import NETWORKS, CacheConfig, NetworkConfig
from stac_core.kernels.attend import Attended, CodedSegment, Segment
from stac_core.kernels.gather_torch import gather
from stac_core.kernels.select import Kernels, select_kernels
from stac_core.kernels.voxel_merge_torch import voxel_merge

ROOM = (6.0, 2.6, 5.0)  # width, height, depth in metres
PLACE = 0.35  # edge of the cells whose tokens resemble each other, two voxels
RADIUS = 1.0  # of the camera's circle
LAP = 200  # frames for one round
LIKENESS = 0.84  # mean cosine of keys in one voxel
CODED: dict[str, Any] = {f"{kind}_bits": 8 for kind in ("pinned", "window", "anchor", "retrieved")}
CODED |= {"buffer_bits": 4, "pivot_bits": 4}
ROWS: dict[str, CacheConfig] = {
    "causal": CacheConfig(mode="causal"),
    "window_kv 1+8": CacheConfig(mode="window_kv", window_size=8),
    "stac, no voxels": CacheConfig(mode="stac", retrieval_size=0),
    "stac": CacheConfig(mode="stac"),
    "stac, parity": CacheConfig.parity(voxel_unit="scene"),
    "stac, voxel 0.10": CacheConfig(mode="stac", voxel_size=0.1),
    "stac, int4 pivots, int8 buffers": CacheConfig(mode="stac", buffer_bits=8, pivot_bits=4),
    "stac, int8 live, int4 store": CacheConfig(mode="stac", **CODED),
    "xstream": CacheConfig(mode="xstream"),
    "xstream, int4": CacheConfig(mode="xstream", anchor_bits=4),
}


@dataclass(frozen=True)
class Shape:
    """Tokens of one frame, and the network they would come from."""

    network: NetworkConfig
    rows: int  # patch grid
    columns: int
    dtype: torch.dtype

    @property
    def tokens(self) -> int:
        return self.network.special_tokens + self.rows * self.columns

    @property
    def lanes(self) -> int:
        return self.network.layers * self.network.heads


SHAPES = {
    "full": Shape(NETWORKS["stream3r"], 28, 37, torch.bfloat16),  # 518×392 pixels
    "small": Shape(NETWORKS["embedded"], 11, 15, torch.float32),  # 210×154 pixels
}


@dataclass(frozen=True)
class Cost:
    """After so many frames."""

    frames: int
    bytes: int
    step_ms: float  # median over the last tenth


class Loop:
    """Tokens of a camera that circles in the room, the same for every mode."""

    def __init__(self, shape: Shape, network: NetworkConfig, device: torch.device) -> None:
        self._shape, self._network, self._device = shape, network, device
        lanes, dim = network.layers * network.heads, network.width // network.heads
        generator = torch.Generator().manual_seed(0)
        # The key of a place is looked up by its cell; neighbouring lanes see shifted tables.
        self._table = torch.randn(4096, dim, generator=generator).to(device, shape.dtype)
        self._shift = torch.arange(lanes, device=device)[:, None] * 97
        self._noise = (1 / LIKENESS - 1) ** 0.5
        v, u = torch.meshgrid(
            torch.linspace(-0.5, 0.5, shape.rows), torch.linspace(-0.65, 0.65, shape.columns), indexing="ij"
        )
        self._rays = torch.stack([u, v, torch.ones_like(u)], -1).reshape(-1, 3).to(device)

    def chunk(self, first: int, count: int) -> tuple[Tensor, Tensor, TokenPositions]:
        """Keys and values [layers, heads, count·tokens, D] and the places of the tokens."""
        seen = [self._look(i) for i in range(first, first + count)]
        points = torch.stack([points for points, _ in seen])
        places = torch.nn.functional.pad(points, (0, 0, self._shape.network.special_tokens, 0))
        valid = torch.ones(places.shape[:2], dtype=torch.bool, device=self._device)
        valid[:, : self._shape.network.special_tokens] = False
        cell = (places / PLACE).floor().long().flatten(0, 1)
        hashed = (cell * torch.tensor([73856093, 19349663, 83492791], device=self._device)).sum(-1)
        keys = self._table[(hashed + self._shift) % len(self._table)]  # [lanes, n, D]
        keys = keys + self._noise * torch.randn_like(keys)
        n = self._network
        keys = keys.unflatten(0, (n.layers, n.heads))
        return (
            keys,
            torch.randn_like(keys),
            TokenPositions(places, valid, points[-1].mean(0), float(seen[0][1].median())),
        )

    def _look(self, index: int) -> tuple[Tensor, Tensor]:
        """Where the rays of one frame meet the walls [patches, 3], and their depth [patches]."""
        angle = torch.tensor(2 * torch.pi * index / LAP, device=self._device)
        sine, cosine = angle.sin(), angle.cos()
        turn = torch.stack(
            [cosine, 0 * sine, sine, 0 * sine, 1 + 0 * sine, 0 * sine, -sine, 0 * sine, cosine]
        )
        rays = self._rays @ turn.view(3, 3).T
        half = torch.tensor(ROOM, device=self._device) / 2
        centre = -RADIUS * torch.stack([sine, 0 * sine, cosine])  # opposite to where it looks
        reach = ((half * rays.sign() - centre) / rays.where(rays.abs() > 1e-9, 1e-9)).amin(-1)
        return centre + reach[:, None] * rays, reach


def measure(
    config: CacheConfig, shape: Shape, stops: Sequence[int], timed: bool, device: torch.device
) -> list[Cost]:
    """Run one mode through the loop; → its cost at each of the ascending `stops`."""
    if not config.rules.bounded and not timed:
        per_frame = (
            shape.lanes
            * shape.tokens
            * token_bytes(16, shape.network.width // shape.network.heads, shape.dtype)
        )
        return [Cost(n, n * per_frame, float("nan")) for n in stops]
    network = shape.network if timed else replace(
        shape.network, layers=1, heads=1, width=shape.network.width // shape.network.heads, encoder_heads=1,
        camera_heads=1, dense_layers=(0,),  # type: ignore[arg-type]
    )  # fmt: skip
    kernels = (
        select_kernels("auto", device)
        if timed
        else Kernels("none", "scores are random", _random_mass, voxel_merge, gather)
    )
    cache = StreamCache(config, network, kernels)
    loop, costs, times = Loop(shape, network, device), [], []
    with tqdm(total=stops[-1], unit="frame", leave=False) as progress:
        while cache.frames_seen < stops[-1]:
            first = cache.frames_seen
            count = min(config.chunk_size, min(n for n in stops if n > first) - first)
            times.append(_step(cache, *loop.chunk(first, count)))
            progress.update(count)
            if cache.frames_seen in stops:
                last = times[-max(1, len(times) // 10) :]
                step = statistics.median(last) if timed else float("nan")
                costs.append(Cost(cache.frames_seen, _bytes(cache, config, shape, timed), step))
    return costs


def _step(cache: StreamCache, keys: Tensor, values: Tensor, places: TokenPositions) -> float:
    """Attention of all layers and settlement of one chunk, in milliseconds."""
    started = _now(keys.device)
    frames, tokens = places.valid.shape
    cache.begin(frames, tokens)
    for layer in range(len(keys)):
        cache.attend(layer, keys[layer, None], keys[layer, None], values[layer, None])
    cache.settle(places)
    return 1e3 * (_now(keys.device) - started)


def _bytes(cache: StreamCache, config: CacheConfig, shape: Shape, timed: bool) -> int:
    """Live cache at its fullest, running chunk and retrieved set included, and the voxel memory."""
    if not config.rules.bounded:
        return cache.stats().bytes
    live = live_bytes(config, shape.network, shape.tokens, shape.dtype)
    voxels = cache.voxels
    if voxels is None:
        return live
    return live + voxels.grid.bytes + voxels.rows.bytes * (1 if timed else shape.lanes)


def _random_mass(
    q: Tensor, segments: Sequence[Segment | CodedSegment], mass: bool = False, subsample: float = 1.0
) -> Attended:
    """In place of attention where only bytes count."""
    masses = [torch.randn(len(q), s.length, device=q.device).exp() for s in segments] if mass else None
    return Attended(q, q[..., 0].float(), masses)


def _now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def main(arguments: list[str] | None = None) -> int:
    """Print one row per mode; returns the exit status."""
    parser = argparse.ArgumentParser(
        "cache_benchmark", description=__doc__.splitlines()[0] if __doc__ else ""
    )
    parser.add_argument("--shape", choices=tuple(SHAPES), default="full")
    parser.add_argument("--frames", type=int, nargs="+", default=[100, 300, 1000, 3000])
    parser.add_argument("--rows", nargs="+", choices=tuple(ROWS), default=list(ROWS), metavar="ROW")
    parser.add_argument("--time", action="store_true", help="run the attention of all lanes too, and time it")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    given = parser.parse_args(arguments)
    shape, stops = SHAPES[given.shape], sorted(given.frames)
    per_frame = (
        shape.lanes * shape.tokens * token_bytes(16, shape.network.width // shape.network.heads, shape.dtype)
    )
    print(
        f"{given.shape}: {shape.tokens} tokens per frame, {per_frame / 2**20:.1f} MiB per frame uncompressed"
    )
    print(
        "| mode | " + " | ".join(f"N = {n}: GiB (factor){', ms' if given.time else ''}" for n in stops) + " |"
    )
    print("|---" * (len(stops) + 1) + "|")
    for name in given.rows:
        with torch.inference_mode():
            costs = measure(ROWS[name], shape, stops, given.time, torch.device(given.device))
        cells = [f"{c.bytes / 2**30:.3f} ({c.frames * per_frame / c.bytes:.1f}×)" for c in costs]
        if given.time:
            cells = [f"{cell}, {c.step_ms:.1f}" for cell, c in zip(cells, costs, strict=True)]
        print(f"| {name} | " + " | ".join(cells) + " |", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
