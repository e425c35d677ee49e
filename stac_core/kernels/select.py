"""Choose the kernels once, in one place; say which and why."""

from __future__ import annotations

import functools
import importlib
import logging
from dataclasses import dataclass, replace

import torch

from stac_core.kernels import highest_torch, slots_torch, take_torch
from stac_core.kernels.attend import Attend
from stac_core.kernels.attend_listed import ListedKernels
from stac_core.kernels.attend_within import AttendWithin
from stac_core.kernels.few_rows import FewRows
from stac_core.kernels.gather import Gather
from stac_core.kernels.gelu import Gelu
from stac_core.kernels.highest import FindHighest
from stac_core.kernels.slots import SlotKernels
from stac_core.kernels.take import Take
from stac_core.kernels.to_heads import ToHeads
from stac_core.kernels.voxel_merge import VoxelMerge

log = logging.getLogger(__name__)

OPERATIONS = ("attend", "voxel_merge", "gather")
OF_TRITON = ("slots", "highest", "take", "attend_listed")  # CUDA has none of these, nor of those for blocks
OF_BLOCKS = ("to_heads", "attend_within", "gelu", "few_rows")
CURES = {
    "torch": "it needs nothing but PyTorch",
    "triton": "install triton next to PyTorch and run on a CUDA device",
    "cuda": "build it with `pip install ./cuda_ext --no-build-isolation` and run on a CUDA device",
}


@dataclass(frozen=True)
class BlockKernels:
    """What stands between the matrix products of a transformer block in 16 bits; in 32 those of few rows."""

    to_heads: ToHeads
    attend_within: AttendWithin
    gelu_: Gelu
    few_rows: FewRows


@dataclass(frozen=True)
class Kernels:
    """The operations that have hand-written kernels, all of one backend."""

    backend: str
    reason: str
    attend: Attend
    voxel_merge: VoxelMerge
    gather: Gather
    # of PyTorch also where a backend has none of its own
    slots: SlotKernels = slots_torch
    highest: FindHighest = highest_torch.highest
    take: Take = take_torch.take
    listed: ListedKernels | None = None  # of Triton alone
    blocks: BlockKernels | None = None  # None: blocks are left to PyTorch, which may compile them


def select_kernels(backend: str, device: torch.device | str) -> Kernels:
    """`auto` takes the fastest backend that loads on the device; an explicit one loads or raises.

    Raises RuntimeError with the cause and the cure when an explicit backend cannot run, ValueError
    for a name that is no backend. The choice of `auto` is logged once per device type.
    """
    return _select(backend, torch.device(device).type)


@functools.cache
def _select(backend: str, device_type: str) -> Kernels:
    if backend == "auto":
        return _select_auto(device_type)
    if backend not in CURES:
        names = ", ".join(map(repr, ("auto", *CURES)))
        raise ValueError(f"kernels.backend = {backend!r}: choose one of {names}")
    try:
        return _load(backend, device_type, "asked for")
    except (ImportError, OSError, RuntimeError) as cause:
        raise RuntimeError(f"kernels.backend = {backend!r} cannot run: {cause}; {CURES[backend]}") from cause


def _select_auto(device_type: str) -> Kernels:
    kernels = None
    refusals: list[str] = []
    for backend in ("triton", "cuda") if device_type == "cuda" else ():
        try:
            kernels = _load(backend, device_type, "; ".join(["the fastest that loads", *refusals]))
            break
        except (ImportError, OSError, RuntimeError) as cause:
            refusals.append(f"{backend}: {cause}")
    if kernels is None:
        why = "; ".join(refusals) or f"hand-written kernels need a CUDA device, this is {device_type!r}"
        kernels = _load("torch", device_type, why)
    log.info("kernels: %s (%s)", kernels.backend, kernels.reason)
    return kernels


def _load(backend: str, device_type: str, reason: str) -> Kernels:
    """Import one backend; its module raises RuntimeError from `require` where it cannot run."""
    modules = {op: importlib.import_module(f"stac_core.kernels.{op}_{backend}") for op in OPERATIONS}
    if backend != "torch":
        modules["attend"].require(device_type)
    kernels = Kernels(backend, reason, **{op: getattr(module, op) for op, module in modules.items()})
    if backend != "triton":
        return kernels
    slots, highest, take, listed = (
        importlib.import_module(f"stac_core.kernels.{op}_triton") for op in OF_TRITON
    )
    to_heads, attend_within, gelu, few_rows = (
        importlib.import_module(f"stac_core.kernels.{op}_triton") for op in OF_BLOCKS
    )
    return replace(
        kernels,
        slots=slots,
        highest=highest.highest,
        take=take.take,
        listed=ListedKernels(listed.attend, listed.sum_mass),
        blocks=BlockKernels(to_heads.to_heads, attend_within.attend_within, gelu.gelu_, few_rows.few_rows),
    )
