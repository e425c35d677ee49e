"""What Triton kernels have in common: where they can run, tiles, a product for all types."""

# mypy: disable-error-code="no-untyped-def"
# (Triton gives the arguments of a kernel their types when it compiles it)

from __future__ import annotations

import functools
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

MAX_DIM = 128  # widest head that attention has tiles for
MOST_ROWS = 65535  # of programs, along the second and the third axis of a grid
REGISTERS, MOST_REGISTERS = 65536, 255  # of a multiprocessor; of a thread
# Triton's interpreter multiplies the bit patterns of bfloat16; widening is exact, so nothing else changes
WIDEN = tl.constexpr(bool(triton.knobs.runtime.interpret))


class Tile(NamedTuple):
    """Block sizes and launch parameters; fixed rather than tuned at run time, so that runs repeat."""

    queries: int
    keys: int
    warps: int
    stages: int
    registers: int | None = None  # of a thread, at most

    @property
    def at_once(self) -> int:
        """Blocks of threads that a multiprocessor runs together, as far as its registers go."""
        return REGISTERS // (32 * self.warps * (self.registers or MOST_REGISTERS))


def require(device_type: str) -> None:
    """Raise RuntimeError where Triton cannot run; its interpreter makes any device possible."""
    if device_type != "cuda" and not triton.knobs.runtime.interpret:
        raise RuntimeError(f"the device is {device_type!r} and TRITON_INTERPRET is not set")


def check_reachable(name: str, x: Tensor) -> None:
    """ValueError naming the argument where no kernel could read it."""
    if x.device.type != "cuda" and not triton.knobs.runtime.interpret:
        raise ValueError(f"{name}: is on {x.device}, the triton backend computes on CUDA devices")


def check_queries(q: Tensor) -> None:
    """ValueError where attention could not read them, or has no tiles for heads as wide or so many rows."""
    if q.shape[-1] > MAX_DIM:
        raise ValueError(f"q: head width {q.shape[-1]} is more than the {MAX_DIM} this backend has tiles for")
    if (rows := max(q.shape[:-2])) > MOST_ROWS:
        raise ValueError(f"q: {rows} rows, at most {MOST_ROWS}; attend in several calls")
    check_reachable("q", q)


def check_lanes(name: str, lanes: int) -> None:
    """ValueError naming the argument that has more of them than a grid."""
    if lanes > MOST_ROWS:
        raise ValueError(f"{name}: {lanes} lanes, at most {MOST_ROWS}; take some at a time")


@functools.cache
def is_hopper(device: torch.device) -> bool:
    """Whose matrix instructions read their operands from shared memory."""
    return device.type == "cuda" and torch.cuda.get_device_capability(device)[0] == 9


@functools.cache
def multiprocessors(device: torch.device) -> int:
    """1 in Triton's interpreter, which runs one block after the other."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1


def blocks_of(count: int, size: int) -> int:
    """Blocks of a size that hold so many; Triton's own `cdiv` takes far longer on the host."""
    return -(-count // size)


@functools.cache
def tile_width(dim: int) -> int:
    """Channels of a tile: a power of two, and no fewer than a matrix instruction takes."""
    return max(16, triton.next_power_of_2(dim))


@triton.jit
def product(a, b, add_to=None):
    """a @ b with float32 accumulation, added to what is given; float32 is not rounded to tf32."""
    if WIDEN:
        a, b = a.to(tl.float32), b.to(tl.float32)
    return tl.dot(a, b, add_to, input_precision="ieee")
