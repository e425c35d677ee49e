"""Maps of features on a GPU: convolutions by the library, without bias; all that follows one in one launch.

Maps are channels-last in memory and stay so, hence a program takes a few cells with many channels each.
What depends on the image's size is no part of what is compiled.
"""

# mypy: disable-error-code="no-untyped-def"
# (Triton gives the arguments of a kernel their types when it compiles it)

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor, nn

from stac_core.network.maps import UV_WEIGHT, Uv

MOST_CHANNELS, NUMBERS, WARPS = 256, 2048, 4  # of one program


class TritonMaps:
    """The contract of `maps.py` without gradients, in float32."""

    def normalise(self, norm: nn.LayerNorm, tokens: Tensor) -> Tensor:
        frames, count, width = tokens.shape
        if tokens.stride(2) != 1:
            tokens = tokens.contiguous()
        out = tokens.new_empty(frames, count, width, dtype=norm.weight.dtype)
        with torch.cuda.device_of(out):  # Triton launches on the current device
            _normalise_kernel[(count, frames)](
                tokens, norm.weight, norm.bias, out, *tokens.stride()[:2], norm.eps,
                WIDTH=width, ROOM=triton.next_power_of_2(width), num_warps=WARPS,
            )  # fmt: skip
        return out

    def convolve(
        self, conv: nn.Module, x: Tensor, *added: Tensor, uv: Uv | None = None, rectify: bool = False
    ) -> Tensor:
        y = self.begin(conv, x)
        frames, channels, rows, columns = y.shape
        cells = frames * rows * columns
        first, second = (*map(_channels_last, added), None, None)[:2]
        fixed = constants(channels)
        with torch.cuda.device_of(y):
            _finish_kernel[(triton.cdiv(cells, fixed["CELLS"]), triton.cdiv(channels, fixed["CHANNELS"]))](
                y, conv.bias, first, second, *_tables(uv), cells, rows, columns, channels,
                UV_WEIGHT, RECTIFY=rectify, **fixed, num_warps=WARPS,
            )  # fmt: skip
        return y

    def begin(self, conv: nn.Module, x: Tensor) -> Tensor:
        assert isinstance(conv, nn.Conv2d | nn.ConvTranspose2d) and not isinstance(conv.padding, str)
        return _channels_last(
            torch.convolution(
                x, conv.weight, None, conv.stride, conv.padding, conv.dilation, conv.transposed,
                conv.output_padding, conv.groups,
            )
        )  # fmt: skip

    def enlarge(self, conv: nn.Module, begun: Tensor, size: tuple[int, int], uv: Uv | None = None) -> Tensor:
        frames, channels, *old = begun.shape
        out = begun.new_empty(frames, *size, channels).permute(0, 3, 1, 2)
        cells = frames * size[0] * size[1]
        fixed = constants(channels)
        with torch.cuda.device_of(out):
            _enlarge_kernel[(triton.cdiv(cells, fixed["CELLS"]), triton.cdiv(channels, fixed["CHANNELS"]))](
                begun, conv.bias, *_tables(uv), out, cells, *size, *old, channels,
                *map(_step, old, size), UV_WEIGHT, **fixed, num_warps=WARPS,
            )  # fmt: skip
        return out


def constants(channels: int) -> dict[str, int]:
    """Of both kernels over maps: how many channels of how many cells a program takes."""
    at_once = min(MOST_CHANNELS, triton.next_power_of_2(channels))
    return {"CHANNELS": at_once, "CELLS": NUMBERS // at_once}


def _channels_last(x: Tensor) -> Tensor:
    return x.contiguous(memory_format=torch.channels_last)


def _tables(uv: Uv | None) -> tuple[Tensor | None, Tensor | None]:
    """Of x [columns, C / 2] and of y [rows, C / 2] without gaps, as which they have been made."""
    return (None, None) if uv is None else (uv.of_x[:, 0].T.contiguous(), uv.of_y[:, :, 0].T.contiguous())


def _step(old: int, new: int) -> float:
    """From cell to cell, in cells of the smaller map, whose corners lie on those of the larger one."""
    return (old - 1) / (new - 1) if new > 1 else 0.0


@triton.jit
def _normalise_kernel(
    tokens, weight, bias, out, frame_stride, token_stride, eps, WIDTH: tl.constexpr, ROOM: tl.constexpr
):
    token, frame = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64)
    at = tl.arange(0, ROOM)
    inside = at < WIDTH
    x = tl.load(tokens + (frame * frame_stride + token * token_stride) + at, mask=inside, other=0.0).to(
        tl.float32
    )
    x -= tl.sum(x, 0) / WIDTH
    x = tl.where(inside, x, 0.0)
    x *= tl.rsqrt(tl.sum(x * x, 0) / WIDTH + eps)
    x = x * tl.load(weight + at, mask=inside, other=0.0) + tl.load(bias + at, mask=inside, other=0.0)
    tl.store(out + (frame * tl.num_programs(0) + token) * WIDTH + at, x, mask=inside)


@triton.jit
def _constant_of_cells(bias, of_x, of_y, row, column, channel, channels, weight):
    """Bias and, of cells in rows and columns, where they lie: [cells, channels], or broadcast to it."""
    known = (channel < channels)[None]
    value = tl.zeros_like(channel).to(tl.float32)[None]
    if bias is not None:
        value += tl.load(bias + channel[None], mask=known, other=0.0)
    if of_x is not None:
        half = channels // 2
        is_x = (channel < half)[None]
        x = tl.load(of_x + (column * half)[:, None] + channel[None], mask=is_x, other=0.0)
        y = tl.load(of_y + (row * half - half)[:, None] + channel[None], mask=known & ~is_x, other=0.0)
        value += weight * (x + y)  # one of them is 0
    return value


@triton.jit(do_not_specialize=["cells", "rows", "columns"])
def _finish_kernel(
    x, bias, first, second, of_x, of_y, cells, rows, columns, channels, weight,
    RECTIFY: tl.constexpr, CHANNELS: tl.constexpr, CELLS: tl.constexpr,
):  # fmt: skip
    """x [cells, channels] is overwritten by what comes of it."""
    cell = tl.program_id(0) * CELLS + tl.arange(0, CELLS)
    channel = tl.program_id(1) * CHANNELS + tl.arange(0, CHANNELS)
    inside = (cell < cells)[:, None] & (channel < channels)[None]
    place = (cell.to(tl.int64) * channels)[:, None] + channel[None]
    value = tl.load(x + place, mask=inside)
    row, column = cell // columns % rows, cell % columns
    value += _constant_of_cells(bias, of_x, of_y, row, column, channel, channels, weight)
    if first is not None:
        value += tl.load(first + place, mask=inside)
    if second is not None:
        value += tl.load(second + place, mask=inside)
    if RECTIFY:
        value = tl.maximum(value, 0.0, propagate_nan=tl.PropagateNan.ALL)
    tl.store(x + place, value, mask=inside)


@triton.jit(do_not_specialize=["cells", "rows", "columns", "old_rows", "old_columns"])
def _enlarge_kernel(
    x, bias, of_x, of_y, out, cells, rows, columns, old_rows, old_columns, channels, row_step, column_step,
    weight, CHANNELS: tl.constexpr, CELLS: tl.constexpr,
):  # fmt: skip
    """x [frames, old rows, old columns, channels] → out [cells, channels]."""
    cell = tl.program_id(0) * CELLS + tl.arange(0, CELLS)
    channel = tl.program_id(1) * CHANNELS + tl.arange(0, CHANNELS)
    inside = (cell < cells)[:, None] & (channel < channels)[None]
    row, column = cell // columns % rows, cell % columns
    y, z = row * row_step, column * column_step
    top, left = y.to(tl.int32), z.to(tl.int32)
    down, right = (y - top)[:, None], (z - left)[:, None]  # how far the cell is from there
    below = tl.where(top + 1 < old_rows, old_columns * channels, 0)[:, None]
    beside = tl.where(left + 1 < old_columns, channels, 0)[:, None]
    corner = (cell // (columns * rows) * old_rows + top) * old_columns + left
    source = x + ((corner.to(tl.int64) * channels)[:, None] + channel[None])
    upper = (1 - right) * tl.load(source, mask=inside) + right * tl.load(source + beside, mask=inside)
    source += below
    lower = (1 - right) * tl.load(source, mask=inside) + right * tl.load(source + beside, mask=inside)
    value = (1 - down) * upper + down * lower
    value += _constant_of_cells(bias, of_x, of_y, row, column, channel, channels, weight)
    tl.store(out + ((cell.to(tl.int64) * channels)[:, None] + channel[None]), value, mask=inside)
