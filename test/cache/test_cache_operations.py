"""How much a pass asks of the device, kernels apart: on a GPU every operation and every look takes time."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from cache.worlds_of_tokens import KERNELS, Walk, feed, parity, small_network
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes

from stac_core.cache.stream_cache import StreamCache
from stac_core.evaluation.gpu.waits import LOOKS
from stac_core.kernels import select

FRAMES = 24  # that fill the memory
MOVING = ("read_slots", "read_figures", "save_slots", "write_slots")


class Counting(TorchDispatchMode):
    """Operations that are no mere views, by name, and the keys or values that they write."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.found: Counter[str] = Counter()
        self.written = 0  # vectors as wide as a head
        self._row = dim * torch.float32.itemsize  # however wide the words that it is moved in

    def __torch_dispatch__(self, function, types, arguments=(), named=None):
        out = function(*arguments, **(named or {}))
        views = [a.alias_info for a in function._schema.returns]
        viewed = any(info is not None and not info.is_write for info in views)
        if not viewed and "empty" not in function._opname:
            self.found[function._opname] += 1
            if isinstance(out, torch.Tensor) and out.ndim and out.shape[-1] * out.itemsize == self._row:
                self.written += out.nbytes // self._row
        return out


class CountingLists(TorchFunctionMode):
    """Lists made of tensors, which show as no operation on a CPU: looks as well."""

    def __init__(self, found: Counter[str]) -> None:
        super().__init__()
        self._found = found

    def __torch_function__(self, function, types, arguments=(), named=None):
        self._found["tolist"] += function is torch.Tensor.tolist
        return function(*arguments, **(named or {}))


def without_kernels(wrap) -> select.Kernels:
    """All hand-written operations wrapped, by their names."""
    kernels = {name: wrap(name, getattr(KERNELS, name)) for name in (*select.OPERATIONS, "highest", "take")}
    slots = SimpleNamespace(**{name: wrap(name, getattr(KERNELS.slots, name)) for name in MOVING})
    return replace(KERNELS, **kernels, slots=slots)


def filled(layers: int, chunk: int, kernels: select.Kernels) -> tuple[StreamCache, Walk]:
    """A stream whose memory has filled."""
    walk = Walk(small_network(layers=layers), length=6.0, pace=0.5)
    cache = StreamCache(
        parity(chunk_size=chunk, voxel_buf_cap=3, retrieve_buf=True, voxel_num=200), walk.network, kernels
    )
    for first in range(0, FRAMES, chunk):
        feed(cache, walk, first, chunk)
    return cache, walk


def counted(layers: int, chunk: int) -> tuple[Counting, Walk]:
    """One pass of a stream whose memory has filled."""
    taken: list[torch.Tensor] = []

    def wrap(name, kernel):
        def call(*arguments, **named):
            with _disable_current_modes():
                out = kernel(*arguments, **named)
            if name == "take":
                taken.append(out)
            return out

        return call

    cache, walk = filled(layers, chunk, without_kernels(wrap))
    q, k, v, places = walk.frames(FRAMES, chunk)
    counting = Counting(walk.network.width // walk.network.heads)
    taken.clear()
    with counting, CountingLists(counting.found):
        cache.begin(chunk, walk.tokens)
        for i in range(layers):
            cache.attend(i, q[i, None], k[i, None], v[i, None])
        cache.settle(places)
    counting.written += sum(out[..., 0].numel() for out in taken)
    stats = cache.stats()
    assert stats.retrieved_tokens and stats.merged and stats.anchors
    return counting, walk


@pytest.mark.parametrize("chunk", [1, 2])
def test_a_pass_takes_few_operations_and_looks(chunk):
    found = counted(2, chunk)[0].found
    assert sum(found.values()) < 185, found
    assert sum(found[name] for name in (*LOOKS, "tolist")) < 20, found  # most at what the host has itself


def test_a_layer_adds_nothing_but_the_writing_of_its_keys_and_values():
    more = counted(8, 2)[0].found
    more.subtract(counted(2, 2)[0].found)
    assert sum(more.values()) <= 6 * 4, more


def test_keys_and_values_are_copied_no_more_than_it_takes():
    """The chunk's into the window, what stays there to its front; of anchors and leaving tokens, those that
    stay to the new anchors, and the others to where they are merged from."""
    counting, walk = counted(2, chunk := 2)
    config, lanes = parity(), walk.network.layers * walk.network.heads
    frames = chunk + config.window_size + config.hh_size + chunk
    assert counting.written == 2 * frames * walk.tokens * lanes
