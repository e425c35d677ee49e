"""How much a pass asks of the device, kernels apart: on a GPU every operation and every look takes time."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from types import SimpleNamespace

import pytest
from cache.worlds_of_tokens import KERNELS, Walk, feed, parity, small_network
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes

from stac_core.cache.stream_cache import StreamCache
from stac_core.evaluation.gpu.waits import LOOKS
from stac_core.kernels import select


class Counting(TorchDispatchMode):
    """Operations that are no mere views, by name."""

    def __init__(self) -> None:
        super().__init__()
        self.found: Counter[str] = Counter()

    def __torch_dispatch__(self, function, types, arguments=(), named=None):
        out = function(*arguments, **(named or {}))
        views = [a.alias_info for a in function._schema.returns]
        if not any(info is not None and not info.is_write for info in views):
            self.found[function._opname] += 1
        return out


def uncounted(kernel):
    def call(*arguments, **named):
        with _disable_current_modes():
            return kernel(*arguments, **named)

    return call


def operations(layers: int, chunk: int) -> Counter[str]:
    """Of one pass of a stream whose memory has filled."""
    kernels = {name: uncounted(getattr(KERNELS, name)) for name in select.OPERATIONS}
    moving = ("read_slots", "read_figures", "save_slots", "write_slots")
    slots = SimpleNamespace(**{name: uncounted(getattr(KERNELS.slots, name)) for name in moving})
    walk = Walk(small_network(layers=layers), length=6.0, pace=0.5)
    cache = StreamCache(
        parity(chunk_size=chunk, voxel_buf_cap=3, retrieve_buf=True),
        walk.network,
        replace(KERNELS, **kernels, slots=slots),
    )
    frames = 24
    for first in range(0, frames, chunk):
        feed(cache, walk, first, chunk)
    walk.frames(frames, chunk)  # what the world is made of does not count
    with Counting() as counting:
        feed(cache, walk, frames, chunk)
    stats = cache.stats()
    assert stats.retrieved_tokens and stats.merged and stats.anchors
    return counting.found


@pytest.mark.parametrize("chunk", [1, 2])
def test_a_pass_takes_few_operations_and_looks(chunk):
    found = operations(2, chunk)
    assert sum(found.values()) < 300, found
    assert sum(found[name] for name in LOOKS) < 21, found


def test_a_layer_adds_nothing_but_the_writing_of_its_keys_and_values():
    more = operations(8, 2)
    more.subtract(operations(2, 2))
    assert sum(more.values()) <= 6 * 4, more
