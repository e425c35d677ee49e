"""Judge an implementation of `slots`: rows read like the reference's, stored bytes equal to them.

The reference works on the host, which rounds every division correctly. On a GPU PyTorch divides by a constant
by multiplying with its inverse, and a scale that is off by its last bit is another byte. Used by the tests
and by `benchmark_gpu`.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

import torch
from torch import Tensor

from stac_core.kernels import slots_torch
from stac_core.kernels.judge import Verdict
from stac_core.kernels.quantization import Codec
from stac_core.kernels.random_slots import SlotProblem
from stac_core.kernels.slots import RowSlots, SlotKernels, SlotPage

HOST = torch.device("cpu")


class Moved(NamedTuple):
    """What one backend made of a problem."""

    read: RowSlots
    figures: Tensor
    saved: SlotPage
    written: list[SlotPage]  # the whole store after that


def move(kernels: SlotKernels, problem: SlotProblem) -> Moved:
    """Every operation once; the store of the problem changes."""
    store, slots, factor, content, held, coded = problem
    read, figures = kernels.read_slots(store, slots, factor), kernels.read_figures(store, slots)
    saved = kernels.save_slots(store, slots[slots >= 0])
    kernels.write_slots(store, slots, content, held.flatten().nonzero()[:, 0], coded, factor)
    return Moved(read, figures, saved, list(store.pages))


def judge_slots(problem: SlotProblem, got: Moved) -> list[Verdict]:
    """One verdict for each operation on a problem that is still as it was, on the host."""
    codec, true = problem.store.codec, move(slots_torch, problem.copy_to(HOST))
    numbers = (torch.cat([read.keys, read.values]) for read in (got.read, true.read))
    written = [
        pair
        for mine, theirs in zip(got.written, true.written, strict=True)
        for pair in zip(mine.fields, theirs.fields, strict=True)
    ]
    return [
        Verdict("read", _difference(*numbers), _rounding(codec)),
        _same("figures", [(got.read.figures, true.figures), (got.figures, true.figures)]),
        _same("saved", zip(got.saved.fields, true.saved.fields, strict=True)),
        _same("written", written),
    ]


def _rounding(codec: Codec) -> float:
    """Sums of codes may be rounded once less; numbers are read as they are."""
    return 0.0 if codec.exact else 2 * torch.finfo(codec.dtype).eps


def _difference(got: Tensor, true: Tensor) -> float:
    """The largest one of numbers that codes add up to, which may be small by cancelling."""
    if not got.numel():
        return 0.0
    return float(((got.cpu() - true).abs() / (4 + true.abs())).max())


def _same(what: str, pairs: Iterable[tuple[Tensor, Tensor]]) -> Verdict:
    """`error` is how many bytes differ."""
    return Verdict(what, float(sum(_differing_bytes(*pair) for pair in pairs)), 0.0)


def _differing_bytes(got: Tensor, true: Tensor) -> int:
    if (got.shape, got.dtype) != (true.shape, true.dtype):
        return max(1, true.nbytes)
    mine, theirs = (x.cpu().reshape(-1).view(torch.uint8) for x in (got, true))
    return int((mine != theirs).sum())
