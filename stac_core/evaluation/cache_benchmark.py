"""Command: what every cache mode costs on a loop through a room, in bytes and in time per step.

    python -m stac_core.evaluation.cache_benchmark                     # full size in bytes, small in both
    python -m stac_core.evaluation.cache_benchmark --shape full --rows stac --frames 300 --parts

The caches are the real ones; the tokens are made up (`cache_benchmark_loop.py`). Where nothing is timed, one
lane of the layers × heads is run and its bytes counted as often as there are lanes, because what a lane
allocates depends on its own tokens only; attention is left out and scores are random, which decides who is
evicted but not how many. A step is the attention of all layers and the settlement of one chunk; on a CPU
it is measured in CPU time, so that other processes disturb it little. The time of `causal` is that of the
last steps before each mark: the ones before only fill its memory. Whether a step stays as quick as early on
is asked of a second, young stream that takes turns with the last tenth of the first, so that both meet the
same machine.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from stac_core.cache.memory_model import live_bytes, token_bytes
from stac_core.cache.stream_cache import StreamCache
from stac_core.cache.token_positions import TokenPositions
from stac_core.command import status_of
from stac_core.config import NETWORKS, CacheConfig, NetworkConfig
from stac_core.device import choose_device
from stac_core.evaluation.cache_benchmark_loop import Loop
from stac_core.kernels.attend import Attended, CodedSegment, Segment
from stac_core.kernels.select import Kernels, select_kernels
from stac_core.worlds.config import check_count

CODED: dict[str, Any] = {f"{kind}_bits": 8 for kind in ("pinned", "window", "anchor")}
CODED |= {"retrieved_bits": 4}  # what comes from the store, where 4 bits are the default, has no more
ROWS: dict[str, CacheConfig] = {
    "causal": CacheConfig(mode="causal"),
    "window_kv 1+8": CacheConfig(mode="window_kv", window_size=8),
    "stac, no voxels": CacheConfig(mode="stac", retrieval_size=0),
    "stac": CacheConfig(mode="stac"),
    "stac, parity": CacheConfig.parity(voxel_unit="scene"),
    "stac, voxel 0.10": CacheConfig(mode="stac", voxel_size=0.1),
    "stac, 16-bit store": CacheConfig(mode="stac", buffer_bits=16, pivot_bits=16),
    "stac, int8 live, int4 store": CacheConfig(mode="stac", **CODED),
    "xstream": CacheConfig(mode="xstream"),
    "xstream, int4": CacheConfig(mode="xstream", anchor_bits=4),
}
FRAMES = [100, 300, 1000, 3000]
SAMPLES = 3  # steps of an unbounded cache that are timed before each mark
EARLY = (200, 500)  # frames that the last tenth of a run is held against


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

    @property
    def frame_bytes(self) -> int:
        """Of keys and values as they are."""
        dim = self.network.width // self.network.heads
        return self.lanes * self.tokens * token_bytes(16, dim, self.dtype)


SHAPES = {
    "full": Shape(NETWORKS["stream3r"], 28, 37, torch.bfloat16),  # 518×392 pixels
    "small": Shape(NETWORKS["embedded"], 9, 12, torch.float32),  # 168×126 pixels
}


@dataclass(frozen=True)
class Cost:
    """After so many frames."""

    frames: int
    bytes: int
    step_ms: float  # median over the last tenth; NaN where nothing is timed
    parts: dict[str, int] = field(default_factory=dict)  # bytes by what holds them
    slots: float = 0.0  # of the voxel memory in use, per voxel, layer and head


@dataclass(frozen=True)
class Run:
    """One mode on its way through the loop."""

    costs: list[Cost]
    steps: list[tuple[int, float]]  # first frame and milliseconds of each timed step
    early: list[float] = field(default_factory=list)  # milliseconds of a young stream's steps, see `EARLY`

    def steadiness(self) -> tuple[float, float] | None:
        """95th percentile of the step times over frames 200 … 500 and over the last tenth.

        None where the run is shorter than twice that.
        """
        last = self.costs[-1].frames
        late = [ms for frame, ms in self.steps if frame >= 0.9 * last]
        if last < 2 * EARLY[1] or len(self.early) < 20 or len(late) < 20:
            return None
        return tuple(statistics.quantiles(times, n=20)[-1] for times in (self.early, late))  # type: ignore[return-value]


def measure(
    config: CacheConfig,
    shape: Shape,
    stops: Sequence[int],
    device: torch.device,
    timed: bool = False,
    whole: bool = False,
) -> Run:
    """Run one mode through the loop; costs at each of the ascending `stops`.

    timed: run the attention, of all lanes. whole: run all lanes also where nothing is timed.
    """
    if not (timed or whole or (config.rules.voxels and config.retrieval_size)):
        return Run([Cost(n, _constant_bytes(config, shape, n), float("nan")) for n in stops], [])
    whole = timed or whole
    stream, young = (_Stream(config, shape, device, timed, whole) for _ in range(2))
    cache, chunk, bounded = stream.cache, config.chunk_size, config.rules.bounded
    costs: list[Cost] = []
    steps: list[tuple[int, float]] = []
    early: list[float] = []
    with tqdm(total=stops[-1], unit="frame", leave=False, disable=None) as progress:
        while cache.frames_seen < stops[-1]:
            first = cache.frames_seen
            stop = min(n for n in stops if n > first)
            count = min(chunk, stop - first)
            stream.attends = timed and (bounded or first >= stop - SAMPLES * chunk)
            elapsed = stream.step(count)
            if stream.attends and count == chunk:
                steps.append((first, elapsed))
                if bounded and first >= max(0.9 * stops[-1], EARLY[1]):
                    early += young.early_step(chunk)
            progress.update(count)
            if cache.frames_seen == stop:
                parts = _parts(cache, config, shape, whole)
                recent_from = min(0.9 * stop, stop - SAMPLES * chunk)
                recent = [ms for frame, ms in steps if frame >= recent_from]
                step_ms = statistics.median(recent) if recent else float("nan")
                costs.append(Cost(stop, sum(parts.values()), step_ms, parts, _slots(cache)))
    return Run(costs, steps, early)


class _Stream:
    """One cache on its way through the loop."""

    def __init__(
        self, config: CacheConfig, shape: Shape, device: torch.device, timed: bool, whole: bool
    ) -> None:
        network = shape.network if whole else _one_lane(shape.network)
        kernels = select_kernels("auto" if timed else "torch", device)
        self._attention = _Attention(kernels if timed else None, device)
        self.cache = StreamCache(config, network, replace(kernels, attend=self._attention))
        self._loop = Loop(shape.rows, shape.columns, network, shape.dtype, device)
        self._network = network if whole else None

    @property
    def attends(self) -> bool:
        """Whether attention is run, or left out."""
        return self._attention.on

    @attends.setter
    def attends(self, on: bool) -> None:
        self._attention.on = on

    def step(self, frames: int) -> float:
        """The next frames, at most a chunk → milliseconds."""
        return _step(self.cache, self._network, *self._loop.chunk(self.cache.frames_seen, frames))

    def early_step(self, frames: int) -> list[float]:
        """The next of the frames `EARLY`, after all before these → milliseconds, none when they are over."""
        self.attends = True
        while self.cache.frames_seen < EARLY[0]:
            self.step(frames)
        return [self.step(frames)] if self.cache.frames_seen < EARLY[1] else []


class _Attention:
    """The attention of the kernels, or nothing where only bytes count."""

    def __init__(self, kernels: Kernels | None, device: torch.device) -> None:
        self._kernels, self.on = kernels, False
        self._random = torch.Generator(device).manual_seed(0)

    def __call__(
        self,
        q: Tensor,
        segments: Sequence[Segment | CodedSegment],
        mass: bool = False,
        subsample: float = 1.0,
    ) -> Attended:
        if self.on and self._kernels:
            return self._kernels.attend(q, segments, mass, subsample)
        masses = [self._mass(len(q), segment.length) for segment in segments] if mass else None
        return Attended(q, q[..., 0].float(), masses)

    def _mass(self, heads: int, keys: int) -> Tensor:
        return torch.randn(heads, keys, generator=self._random, device=self._random.device).exp()


def _step(
    cache: StreamCache, network: NetworkConfig | None, keys: Tensor, values: Tensor, places: TokenPositions
) -> float:
    """One chunk, with the pose head's tokens where its network is given; → milliseconds."""
    started = _now(keys.device)
    frames, tokens = places.valid.shape
    cache.begin(frames, tokens)
    for layer in range(len(keys)):
        cache.attend(layer, keys[layer, None], keys[layer, None], values[layer, None])
    if network:
        heads = network.camera_heads
        camera = torch.zeros(1, heads, frames, 2 * network.width // heads, device=keys.device)
        for iteration in range(network.camera_iterations):
            for layer in range(network.camera_blocks):
                cache.attend_camera(iteration, layer, camera, camera, camera)
    cache.settle(places)
    return 1e3 * (_now(keys.device) - started)


def _constant_bytes(config: CacheConfig, shape: Shape, frames: int) -> int:
    """Of a cache whose bytes follow from the settings."""
    if not config.rules.bounded:
        return frames * shape.frame_bytes
    return live_bytes(config, shape.network, shape.tokens, shape.dtype)


def _parts(cache: StreamCache, config: CacheConfig, shape: Shape, whole: bool) -> dict[str, int]:
    """Allocated bytes by what holds them; of the voxel memory one lane may stand for all."""
    if not config.rules.bounded:
        return {"live": _constant_bytes(config, shape, cache.frames_seen)}
    stats = cache.stats()
    live = stats.live_bytes if whole else live_bytes(config, shape.network, shape.tokens, shape.dtype)
    parts, voxels = {"live": live}, cache.voxels
    if voxels is None:
        return parts
    lanes = 1 if whole else shape.lanes
    for name, kind in voxels.rows.kinds.items():
        used = kind.pool.slots_used * kind.pool.slot_bytes
        parts |= {name: used * lanes, f"{name} spare": (kind.pool.bytes - used) * lanes}
        parts[f"{name} table"] = kind.table.bytes * lanes
    parts["grid"] = voxels.grid.bytes
    rest = voxels.rows.bytes * lanes + voxels.grid.bytes - sum(parts.values()) + live
    return parts | {"key scale": rest}


def _slots(cache: StreamCache) -> float:
    """Slots in use per voxel and lane."""
    if cache.voxels is None:
        return 0.0
    rows = cache.voxels.grid.count * cache.voxels.rows.lanes
    return (cache.voxels.pivots + cache.voxels.buffered) / max(1, rows)


def _one_lane(network: NetworkConfig) -> NetworkConfig:
    dim = network.width // network.heads
    return replace(network, layers=1, heads=1, width=dim, encoder_heads=1, camera_heads=1,
                   dense_layers=(0,))  # type: ignore[arg-type]  # fmt: skip


def _now(device: torch.device) -> float:
    """Seconds: of this process's work on a CPU, of the clock on a GPU."""
    if device.type != "cuda":
        return time.process_time()
    torch.cuda.synchronize(device)
    return time.perf_counter()


def print_table(name: str, rows: Sequence[str], stops: Sequence[int], timed: bool, parts: bool,
                device: torch.device) -> None:  # fmt: skip
    """One table, each row as soon as it is measured; afterwards what does not fit in it."""
    shape = SHAPES[name]
    mib = shape.frame_bytes / 2**20
    print(f"\n{name} shape: {shape.tokens} tokens per frame, {mib:.1f} MiB per frame uncompressed")
    heads = [f"N = {n}: GiB (factor){', ms' if timed else ''}" for n in stops]
    print("| mode | " + " | ".join(heads) + " |\n" + "|---" * (len(stops) + 1) + "|")
    notes = []
    for row in rows:
        with torch.inference_mode():
            run = measure(ROWS[row], shape, stops, device, timed)
        cells = [f"{c.bytes / 2**30:.3f} ({c.frames * shape.frame_bytes / c.bytes:.1f}×)" for c in run.costs]
        if timed:
            cells = [f"{cell}, {c.step_ms:.1f}" for cell, c in zip(cells, run.costs, strict=True)]
        print(f"| {row} | " + " | ".join(cells) + " |", flush=True)
        if steadiness := run.steadiness():
            early, late = steadiness
            notes.append(
                f"{row}: p95 of a step {early:.1f} ms over frames {EARLY[0]}–{EARLY[1]}, {late:.1f} ms over "
                f"the last tenth ({late / early - 1:+.1%})"
            )
        for cost in (cost for cost in run.costs if parts and cost.parts):
            held = ", ".join(f"{part} {size / 2**20:.1f}" for part, size in cost.parts.items())
            slots = f", {cost.slots:.2f} slots per voxel, layer and head" if cost.slots else ""
            notes.append(f"{row}, N = {cost.frames}{slots}, MiB: {held}")
    print("\n".join(["", *notes]) if notes else "")


def main(arguments: list[str] | None = None) -> int:
    """Print one table per shape; returns the exit status."""
    parser = argparse.ArgumentParser(prog="cache_benchmark", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument(
        "--shape", choices=(*SHAPES, "both"), default="both",
        help="full = 518×392 pixels through the published network, small = 168×126 through the bundled one "
        "(default: both)",
    )  # fmt: skip
    parser.add_argument(
        "--frames", type=int, nargs="+", default=FRAMES, metavar="N",
        help=f"after how many frames costs are told (default: {' '.join(map(str, FRAMES))})",
    )  # fmt: skip
    rows = " ".join(f'"{row}"' if " " in row else row for row in ROWS)
    parser.add_argument(
        "--rows", nargs="+", choices=tuple(ROWS), default=list(ROWS), metavar="ROW",
        help=f"of {rows} (default: all)",
    )  # fmt: skip
    parser.add_argument("--parts", action="store_true", help="also print what holds the bytes")
    parser.add_argument("--device", default="auto", help="auto = cuda where there is one, else cpu (default)")
    given = parser.parse_args(arguments)
    return status_of(parser.prog, lambda: _run(given))


def _run(given: argparse.Namespace) -> int:
    device, stops = choose_device(given.device, "--device"), sorted(set(given.frames))
    check_count("--frames", stops[0], 1)
    for name in SHAPES if given.shape == "both" else [given.shape]:
        timed = name == "small" or device.type == "cuda"  # the full size takes minutes per step on a CPU
        print_table(name, given.rows, stops, timed, given.parts, device)
    return 0


if __name__ == "__main__":
    sys.exit(main())
