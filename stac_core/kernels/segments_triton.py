"""Segments of keys and values as arguments of Triton kernels, and how a kernel reads them.

Segments that are read alike (bits, factor, bias) share the code that reads them: a group of segments is a
tuple of arguments, of which a loop picks one at a time. Coded tokens become numbers only in registers.

Triton compiles anew for every divisibility by 16 of every number in such a tuple. Numbers that change while
a stream runs therefore travel as odd ones, see `odd`; what a segment does not have travels as 0.
"""

# mypy: disable-error-code="no-untyped-def"
# (Triton gives the arguments of a kernel their types when it compiles it)

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from stac_core.kernels.attend import CODE_GROUP, AnySegment, CodedSegment, Codes
from stac_core.kernels.attend_listed import FIELDS

LOG2_E = tl.constexpr(1.4426950408889634)  # the GPU has 2ˣ in hardware, so logits are kept in base 2
GROUP = tl.constexpr(CODE_GROUP)
LISTED_FIELDS = tl.constexpr(FIELDS)
KEYS_LISTED, VALUES_LISTED, ROOM_LISTED, LENGTH_LISTED, COLUMN_LISTED, BIAS_LISTED, BIAS_ROW_LISTED = (
    tl.constexpr(i) for i in range(7)
)  # the fields of `attend_listed.py`, in their order
# Places in the arguments of a segment, see `group_segments`.
KEYS_AT, VALUES_AT, BIAS_AT, LENGTH_AT, COLUMN_AT = (tl.constexpr(i) for i in (0, 8, 16, 18, 19))


class Kinds(NamedTuple):
    """How the segments of each group are read; part of the compiled kernel."""

    bits: tuple[int, ...]
    scaled: tuple[bool, ...]  # keys have a factor per channel
    biased: tuple[bool, ...]
    sizes: tuple[int, ...]  # how many segments are read like this


def group_segments(segments: Sequence[AnySegment]) -> tuple[tuple[tuple[Any, ...], ...], Kinds]:
    """Arguments of the kernels: groups of segments that are read alike, and how each is read.

    A segment: keys and values as `_stored` has them, bias and its row stride, length, first column of mass.
    """
    groups: dict[tuple[int, bool, bool], list[tuple[Any, ...]]] = {}
    column = 0
    for segment in segments:
        bits, scaled = 16, False
        if isinstance(segment, CodedSegment):
            bits, scaled = segment.keys.bits, segment.keys.factor is not None
        bias = (
            segment.bias if segment.bias is None or segment.bias.stride(1) == 1 else segment.bias.contiguous()
        )
        shift = (0, odd(0)) if bias is None else (bias, odd(bias.stride(0)))
        argument = (
            *_stored(segment.keys), *_stored(segment.values), *shift, odd(segment.length), odd(column)
        )  # fmt: skip
        groups.setdefault((bits, scaled, bias is not None), []).append(argument)
        column += segment.length
    bits, scaled, biased = zip(*groups, strict=True)
    kinds = Kinds(bits, scaled, biased, tuple(map(len, groups.values())))
    return tuple(tuple(group) for group in groups.values()), kinds


def odd(number: int) -> int:
    """Neither 1 nor divisible by 16; `even` in a kernel takes it back."""
    return 2 * number + 3


def _stored(tokens: Tensor | Codes) -> tuple[Tensor | int, ...]:
    """What is stored per token, its grid, the factor per channel, each with its strides.

    A scale and its offset are one word of the grid, so that a token's come with one load.
    """
    if not isinstance(tokens, Codes):
        return tokens, *tokens.stride()[:2], 0, 0, 0, 0, 0
    grid = tokens.grid
    if grid.storage_offset() % 2 or any(stride % 2 for stride in grid.stride()[:2]):
        grid = grid.clone(memory_format=torch.contiguous_format)  # which may be contiguous as it is
    words = grid.view(torch.int32)
    factor = (0, 0) if tokens.factor is None else (tokens.factor, tokens.factor.stride(0))
    return (
        tokens.codes, *tokens.codes.stride()[:2], words, odd(words.stride(0)), words.stride(1), *factor
    )  # fmt: skip


@triton.jit
def even(odd):
    return (odd - 3) >> 1


@triton.jit
def pick(group, i, FIELD: tl.constexpr):
    """One field of the i-th segment of a group, by a number known only at run time."""
    picked = group[0][FIELD]
    for j in tl.static_range(1, len(group)):
        picked = tl.where(i == j, group[j][FIELD], picked)
    return picked


@triton.jit
def length_of(groups, g: tl.constexpr, i, SIZES: tl.constexpr, LISTED: tl.constexpr):
    """Tokens of the i-th segment of the g-th group."""
    return _number_of(groups, g, i, SIZES, LISTED, LENGTH_LISTED, LENGTH_AT)


@triton.jit
def column_of(groups, g: tl.constexpr, i, SIZES: tl.constexpr, LISTED: tl.constexpr):
    """First column of its mass."""
    return _number_of(groups, g, i, SIZES, LISTED, COLUMN_LISTED, COLUMN_AT)


@triton.jit
def _number_of(
    groups, g: tl.constexpr, i, SIZES: tl.constexpr, LISTED: tl.constexpr,
    LISTED_AT: tl.constexpr, AT: tl.constexpr,
):  # fmt: skip
    if LISTED:
        number = tl.load(_listed(groups, g, i, SIZES) + LISTED_AT).to(tl.int32)
    else:
        number = even(pick(groups[g], i, AT))
    return number


@triton.jit
def tokens_of(
    groups, g: tl.constexpr, i,
    SIZES: tl.constexpr, LISTED: tl.constexpr, DIM: tl.constexpr, TYPE: tl.constexpr,
):  # fmt: skip
    """Keys and values of a segment, each the eight fields of `_stored`."""
    if LISTED:
        at = _listed(groups, g, i, SIZES)
        row_stride = tl.load(at + ROOM_LISTED) * DIM
        keys = (listed_pointer(at + KEYS_LISTED, TYPE), row_stride, DIM, 0, 0, 0, 0, 0)
        values = (listed_pointer(at + VALUES_LISTED, TYPE), row_stride, DIM, 0, 0, 0, 0, 0)
    else:
        keys, values = _pick_tokens(groups[g], i, KEYS_AT), _pick_tokens(groups[g], i, VALUES_AT)
    return keys, values


@triton.jit
def bias_of(groups, g: tl.constexpr, i, SIZES: tl.constexpr, LISTED: tl.constexpr, BIASED: tl.constexpr):
    """Where it begins, its row stride."""
    if LISTED:
        at = _listed(groups, g, i, SIZES)
        if BIASED[g]:
            begin = tl.load(at + BIAS_LISTED).to(tl.pointer_type(tl.float32))
            bias = begin, tl.load(at + BIAS_ROW_LISTED)
        else:
            bias = 0, 0
    else:
        bias = pick(groups[g], i, BIAS_AT), even(pick(groups[g], i, BIAS_AT + 1))
    return bias


@triton.jit
def _listed(listed, g: tl.constexpr, i, SIZES: tl.constexpr):
    """Where a segment stands in the list of `attend_listed.py`."""
    before = 0
    for h in tl.static_range(g):
        before += SIZES[h]
    return listed + (before + i) * LISTED_FIELDS


@triton.jit
def listed_pointer(at, TYPE: tl.constexpr):
    """Where a dense buffer begins, by its field in the list."""
    return tl.multiple_of(tl.load(at).to(tl.pointer_type(TYPE)), 16)


@triton.jit
def _pick_tokens(group, i, FIRST: tl.constexpr):
    """The eight fields of `_stored`."""
    return (
        pick(group, i, FIRST), pick(group, i, FIRST + 1), pick(group, i, FIRST + 2),
        pick(group, i, FIRST + 3), pick(group, i, FIRST + 4), pick(group, i, FIRST + 5),
        pick(group, i, FIRST + 6), pick(group, i, FIRST + 7),
    )  # fmt: skip


@triton.jit
def from_token(keys, values, bias, begin, BITS: tl.constexpr, BIASED: tl.constexpr):
    """Keys, values and bias of a segment without the tokens before `begin`."""
    if BIASED:
        bias = (bias[0] + begin, bias[1])
    return _from_token(keys, begin, BITS), _from_token(values, begin, BITS), bias


@triton.jit
def _from_token(stored, begin, BITS: tl.constexpr):
    pointer, row_stride, token_stride, grid, grid_row, grid_token, factor, factor_row = stored
    begin = tl.cast(begin, tl.int64)
    pointer += begin * token_stride
    if BITS < 16:
        grid += begin * grid_token
    return pointer, row_stride, token_stride, grid, grid_row, grid_token, factor, factor_row


@triton.jit
def load_numbers(
    pointer, row, row_stride, token_stride, start, length,
    DIM: tl.constexpr, WIDTH: tl.constexpr, COUNT: tl.constexpr, WHOLE: tl.constexpr = False,
):  # fmt: skip
    """[COUNT, WIDTH] tokens from `start` on; zero beyond the head width and, unless WHOLE, the last token."""
    token, channel = tl.arange(0, COUNT), tl.arange(0, WIDTH)
    first = pointer + row * row_stride + tl.cast(start, tl.int64) * token_stride
    at = first + (token[:, None] * token_stride + channel[None])
    if WHOLE and DIM == WIDTH:
        numbers = tl.load(at)
    else:
        inside = start + token[:, None] < length
        if DIM != WIDTH:
            inside = inside & (channel[None] < DIM)
        numbers = tl.load(at, mask=inside, other=0.0)
    return numbers


@triton.jit
def unpack(pairs):
    """[tokens, n] bytes of two codes each → [tokens, 2n] codes of 4 bits."""
    return tl.reshape(tl.join(pairs & 15, pairs >> 4), (pairs.shape[0], 2 * pairs.shape[1]))


@triton.jit
def decode(codes, words):
    """Codes as float32; words: scale and offset of each, see `_stored`."""
    scale = (words & 0xFFFF).to(tl.int16).to(tl.float16, bitcast=True)
    offset = (words >> 16).to(tl.int16).to(tl.float16, bitcast=True)
    return codes.to(tl.float32) * scale.to(tl.float32) + offset.to(tl.float32)


@triton.jit
def _load_codes(
    stored, row, start, length,
    DIM: tl.constexpr, WIDTH: tl.constexpr, COUNT: tl.constexpr, BITS: tl.constexpr, SCALED: tl.constexpr,
):  # fmt: skip
    """The same for tokens stored as codes, as float32. Channels lie across lanes, as numbers do."""
    pointer, row_stride, token_stride, grid, grid_row, grid_token, factor, factor_row = stored
    token, channel = tl.arange(0, COUNT), tl.arange(0, WIDTH)
    inside = start + token < length
    first = pointer + row * row_stride + tl.cast(start, tl.int64) * token_stride
    if BITS == 8:
        offsets = token[:, None] * token_stride + channel[None]
        codes = tl.load(first + offsets, mask=inside[:, None] & (channel[None] < DIM), other=0)
    else:
        pair = tl.arange(0, WIDTH // 2)
        offsets = token[:, None] * token_stride + pair[None]
        pairs = tl.load(first + offsets, mask=inside[:, None] & (pair[None] < DIM // 2), other=0)
        codes = unpack(pairs)
    first = grid + row * even(grid_row) + tl.cast(start, tl.int64) * grid_token
    if DIM <= GROUP:  # one word per token
        words = tl.load(first + token * grid_token, mask=inside, other=0)[:, None]
    else:
        at = token[:, None] * grid_token + (channel // GROUP)[None]
        words = tl.load(first + at, mask=inside[:, None] & (channel[None] < DIM), other=0)
    numbers = decode(codes, words)
    if SCALED:
        numbers *= tl.load(factor + row * factor_row + channel, mask=channel < DIM, other=0.0)[None]
    if DIM != WIDTH:
        numbers = tl.where(channel[None] < DIM, numbers, 0.0)
    return numbers


@triton.jit
def load_tokens(
    stored, row, start, length,
    DIM: tl.constexpr, WIDTH: tl.constexpr, COUNT: tl.constexpr,
    BITS: tl.constexpr, SCALED: tl.constexpr, TYPE: tl.constexpr, WHOLE: tl.constexpr = False,
):  # fmt: skip
    """The same for tokens stored either way; numbers come out as TYPE."""
    if BITS == 16:
        numbers = load_numbers(stored[0], row, stored[1], stored[2], start, length, DIM, WIDTH, COUNT, WHOLE)
    else:
        numbers = _load_codes(stored, row, start, length, DIM, WIDTH, COUNT, BITS, SCALED).to(TYPE)
    return numbers


@triton.jit
def load_bias(bias, row, token, length, BIASED: tl.constexpr, WHOLE: tl.constexpr = False):
    """[tokens] in base 2; −inf beyond the last token, of which WHOLE says that there are none."""
    pointer, row_stride = bias
    inside = token < length
    if BIASED and WHOLE:
        shift = tl.load(pointer + row * row_stride + token) * LOG2_E
    elif BIASED:
        shift = tl.load(pointer + row * row_stride + token, mask=inside, other=float("-inf")) * LOG2_E
    else:
        shift = tl.where(inside, 0.0, float("-inf"))
    return shift
