"""One step by stages of the method, on the device's own time line, each held against the roofline."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode

import stac_core.session
from stac_core.cache.stream_cache import StreamCache
from stac_core.config import NetworkConfig
from stac_core.device import Stopwatch
from stac_core.network.causal_vggt import CausalVGGT
from stac_core.network.execution import WithoutPast
from stac_core.session import StreamSession

MASS_SHARE = 0.25  # of the queries are scored in the benchmark's streams
STAGES = (
    "image preparation", "image encoder", "frame blocks", "global blocks", "keys into the cache", "attention",
    "camera head", "dense heads", "token positions", "settle: commit", "settle: score", "settle: place",
    "settle: retrieve", "settle: evict", "settle: merge", "between the stages",
)  # fmt: skip


class StageClock:
    """Time per stage; a stage inside another counts for itself only. Taking moments never waits."""

    def __init__(self, device: torch.device) -> None:
        self._watch = Stopwatch(device)
        self._labels = ["between the stages"]  # of the stretch after each moment
        self._stages = list(self._labels)  # entered and not yet left

    def timed(self, stage: str, work: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(work)
        def run(*arguments: Any, **named: Any) -> Any:
            self._stages.append(stage)
            self._moment()
            try:
                return work(*arguments, **named)
            finally:
                self._stages.pop()
                self._moment()

        return run

    def _moment(self) -> None:
        self._watch.mark()
        self._labels.append(self._stages[-1])

    def milliseconds(self) -> dict[str, float]:
        """Of every stage, in the order of `STAGES`; together they are the whole step."""
        self._watch.mark()
        spent = dict.fromkeys(STAGES, 0.0)
        for stage, ms in zip(self._labels, self._watch.milliseconds(), strict=True):
            spent[stage] += ms
        return spent


def time_stages(
    session: StreamSession, images: list[Any], device: torch.device, repeats: int
) -> dict[str, float]:
    """Milliseconds of each stage, mean over some steps of a stream whose memory has filled."""
    total = dict.fromkeys(STAGES, 0.0)
    for _ in range(repeats):
        clock = StageClock(device)
        undo = _attach(clock, session)
        try:
            session.step(images)
            for stage, ms in clock.milliseconds().items():
                total[stage] += ms / repeats
        finally:
            for put_back in undo:
                put_back()
    return total


def _attach(clock: StageClock, session: StreamSession) -> list[Callable[[], None]]:
    """Put the clock around every stage; → how to take it off again."""
    network, cache = session._network, session._cache
    assert isinstance(cache, StreamCache)
    aggregator, spatial = network.aggregator, cache._spatial
    assert spatial is not None  # the stream has begun
    places: list[tuple[str, Any, str]] = [
        ("image preparation", stac_core.session, "prepare_images"),
        ("image encoder", aggregator.patch_embed, "forward"),
        *(("frame blocks", block, "forward") for block in aggregator.frame_blocks),
        *(("global blocks", block, "forward") for block in aggregator.global_blocks),
        ("keys into the cache", cache, "attend"),
        ("camera head", network.camera_head, "forward"),
        ("dense heads", network.depth_head, "forward"),
        ("dense heads", network.point_head, "forward"),
        ("token positions", stac_core.session, "positions_of"),
        ("settle: commit", cache, "_commit"),
        ("settle: score", cache._live, "_score"),
        ("settle: place", cache, "_place"),
        ("settle: place", spatial, "enter"),
        ("settle: retrieve", cache, "_retrieve"),
        ("settle: evict", cache, "_forget"),
        ("settle: merge", spatial, "insert"),
    ]
    undo = [_replace(owner, name, clock.timed(stage, getattr(owner, name))) for stage, owner, name in places]
    timed = replace(cache._kernels, attend=clock.timed("attention", cache._kernels.attend))
    return [*undo, _replace(cache, "_kernels", timed)]


def _replace(owner: Any, name: str, new: Any) -> Callable[[], None]:
    own = vars(owner)
    before = own.get(name)
    setattr(owner, name, new)
    return lambda: setattr(owner, name, before) if before is not None else delattr(owner, name)


@functools.cache
def flop_by_stage(config: NetworkConfig, chunk: int, shape: tuple[int, int]) -> dict[str, float]:
    """Arithmetic of one step (a multiply-add is 2), counted on tensors without contents; the depth head only.

    Attention looks at one pinned frame, two of heavy hitters, four of the window, the chunk and two
    retrieved; the queries that are scored cost half as much again.
    """
    with torch.device("meta"):
        network = CausalVGGT(config)
    network.to("meta").requires_grad_(False)
    height, width = shape
    tokens = config.special_tokens + (height // config.patch_size) * (width // config.patch_size)
    empty = functools.partial(torch.empty, device="meta")
    frames, layers = empty(chunk, tokens, config.width), empty(1, chunk, tokens, 2 * config.width)
    aggregator = network.aggregator
    across = (4 + 2 * MASS_SHARE) * config.layers * config.width
    return {
        "image encoder": _flop(lambda: aggregator.patch_embed(empty(chunk, 3, height, width))),
        "frame blocks": config.layers * _flop(lambda: aggregator.frame_blocks[0](frames)),
        "global blocks": config.layers
        * _flop(lambda: aggregator.global_blocks[0](frames.flatten(0, 1)[None], lambda q, k, v: q)),
        "attention": across * (chunk * tokens) * ((1 + 2 + 4 + chunk + 2) * tokens),
        "camera head": _flop(lambda: network.camera_head(empty(1, chunk, 2 * config.width), WithoutPast())),
        "dense heads": _flop(lambda: network.depth_head([layers] * 4, height, width)),
    }


@torch.no_grad()
def _flop(work: Callable[[], object]) -> float:
    with FlopCounterMode(display=False) as counter:
        work()
    return float(counter.get_total_flops())
