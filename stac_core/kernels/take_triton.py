"""Taking rows out of several tensors in Triton: one launch, every row read once and written once.

Whatever rows hold, they are moved as integers, as wide as the rows, the strides and where the parts begin
allow. There are always as many parts, empty ones if need be: more of them compile nothing anew.
"""

# mypy: disable-error-code="no-untyped-def"
# (Triton gives the arguments of a kernel their types when it compiles it)

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import accumulate

import torch
import triton
import triton.language as tl
from torch import Tensor

from stac_core.kernels.launch_triton import check_lanes, check_reachable
from stac_core.kernels.segments_triton import even, odd
from stac_core.kernels.take import MOST_PARTS, check_take

PARTS = tl.constexpr(MOST_PARTS)
WIDEST = 16  # bytes that a thread reads at once
WORDS = {16: torch.int64, 8: torch.int64, 4: torch.int32, 2: torch.int16, 1: torch.int8}  # by alignment
BYTES, MOST_PLACES, WARPS = 8192, 128, 4  # of one program


def take(parts: Sequence[Tensor], places: Tensor) -> Tensor:
    """The contract of `take.py`."""
    check_take(parts, places)
    check_reachable("parts[0]", parts[0])
    (lanes, _, width), (_, m) = parts[0].shape, places.shape
    check_lanes("parts[0]", lanes)
    out = parts[0].new_empty(lanes, m, width)
    if not out.numel():
        return out
    aligned = alignment(parts)
    word = WORDS[aligned]
    words = [part.view(word) for part in parts]
    words += [words[0][:, :0]] * (MOST_PARTS - len(parts))
    firsts = accumulate((part.shape[1] for part in words), initial=0)
    numbers = tuple(
        (odd(first), *(odd(stride * word.itemsize // aligned) for stride in part.stride()[:2]))
        for first, part in zip(firsts, words, strict=False)
    )
    fixed = constants(width * out.itemsize, aligned)
    with torch.cuda.device_of(out):  # Triton launches on the current device
        _take_kernel[(triton.cdiv(m, fixed["PLACES"]), lanes)](
            *words, numbers, places.contiguous(), out.view(word), m, **fixed, num_warps=WARPS
        )
    return out


def alignment(parts: Sequence[Tensor]) -> int:
    """The most bytes, up to `WIDEST`, that all rows begin and end at multiples of."""
    size = parts[0].element_size()
    distances = [size * distance for part in parts for distance in (part.shape[2], *part.stride()[:2])]
    return math.gcd(WIDEST, *distances, *(part.data_ptr() for part in parts))


def constants(row_bytes: int, aligned: int) -> dict[str, int]:
    """Of the kernel: words of a row, how many there is room for, and rows that a program takes."""
    words = row_bytes // WORDS[aligned].itemsize
    room = triton.next_power_of_2(words)
    places = min(MOST_PLACES, max(1, BYTES // (room * WORDS[aligned].itemsize)))
    return {"ALIGNED": aligned, "WORDS": words, "ROOM": room, "PLACES": places}


@triton.jit(do_not_specialize=["a", "b", "c", "d", "places", "count"])
def _take_kernel(
    a, b, c, d, numbers, places, out, count,
    ALIGNED: tl.constexpr, WORDS: tl.constexpr, ROOM: tl.constexpr, PLACES: tl.constexpr,
):  # fmt: skip
    """numbers: of each part its first place, then its strides in pieces of ALIGNED bytes."""
    WORD: tl.constexpr = out.dtype.element_ty.primitive_bitwidth // 8
    UNIT: tl.constexpr = ALIGNED // WORD
    lane = tl.program_id(1).to(tl.int64)
    at = tl.program_id(0) * PLACES + tl.arange(0, PLACES)
    inside = at < count
    at += lane * count
    place = tl.load(places + at, mask=inside, other=0)
    parts = (a, b, c, d)
    row = a + tl.zeros_like(place)
    for i in tl.static_range(PARTS):
        first, lane_stride, row_stride = even(numbers[i][0]), even(numbers[i][1]), even(numbers[i][2])
        begin = parts[i] + (lane * lane_stride + (place - first) * row_stride) * UNIT
        row = tl.where(place >= first, begin, row)
    row = tl.multiple_of(row, ALIGNED)
    word = tl.arange(0, ROOM)
    mask = inside[:, None] & (word < WORDS)[None]
    words = tl.load(row[:, None] + word[None], mask=mask)
    tl.store(out + ((at * WORDS)[:, None] + word[None]), words, mask=mask)
