"""Attention over listed segments in Triton: the kernels of `attend_triton.py`, told where keys lie."""

# mypy: disable-error-code="no-untyped-def"
# (Triton gives the arguments of a kernel their types when it compiles it)

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from stac_core.kernels.attend import sample_queries
from stac_core.kernels.attend_listed import Listing
from stac_core.kernels.attend_split_triton import blocks_of
from stac_core.kernels.attend_triton import (
    forward_tile,
    is_hopper,
    mass_tile,
    parts_for,
    sum_columns,
    sweep,
)
from stac_core.kernels.segments_triton import (
    KEYS_LISTED,
    LENGTH_LISTED,
    ROOM_LISTED,
    VALUES_LISTED,
    Kinds,
    listed_pointer,
)

TOKENS, WARPS = 32, 4  # of a program that keeps new tokens


def attend(q: Tensor, k: Tensor, v: Tensor, listed: Tensor, listing: Listing, mass: Tensor | None) -> Tensor:
    """The contract of `attend_listed.py`."""
    with torch.cuda.device_of(q):  # Triton launches on the current device
        _keep(k, v, listed[listing.grows])
        kinds = _kinds(listing)
        tile = forward_tile(q, False, is_hopper(q.device))
        parts = parts_for(q, tile, blocks_of(listing.most_keys, tile.keys))
        out, lse = sweep(q, listed, kinds, tile, parts)
        if mass is not None and listing.subsample is not None:
            counted, stride, scale = sample_queries(q.shape[1], listing.subsample)
            sampled = slice(0, counted * stride, stride)
            tile = mass_tile(q[:, sampled])
            blocks = blocks_of(listing.most_keys, tile.keys)
            blocks += len(listing.biased)  # each segment may end in a part of one
            sum_columns(q[:, sampled], listed, kinds, lse[:, sampled], scale, tile, blocks, mass)
    return out


def _kinds(listing: Listing) -> Kinds:
    """Segments without bias and with it."""
    biased = sum(listing.biased)
    plain = len(listing.biased) - biased
    counted = [(count, bias) for count, bias in ((plain, False), (biased, True)) if count]
    sizes, biases = zip(*counted, strict=True)
    return Kinds((16,) * len(sizes), (False,) * len(sizes), biases, sizes)


def _keep(k: Tensor, v: Tensor, segment: Tensor) -> None:
    """Put new tokens [heads, n, D] where the segment [FIELDS] ends."""
    heads, count, dim = k.shape
    _keep_kernel[(blocks_of(count, TOKENS), heads)](
        k, v, *k.stride()[:2], *v.stride()[:2], segment, count, dim, triton.next_power_of_2(dim), TOKENS,
        num_warps=WARPS,
    )  # fmt: skip


@triton.jit(do_not_specialize=["count"])
def _keep_kernel(
    k_pointer, v_pointer, k_row, k_token, v_row, v_token, segment, count,
    DIM: tl.constexpr, WIDTH: tl.constexpr, TOKENS: tl.constexpr,
):  # fmt: skip
    """A program copies TOKENS tokens of one head."""
    TYPE: tl.constexpr = k_pointer.dtype.element_ty
    row = tl.program_id(1).to(tl.int64)
    keys = listed_pointer(segment + KEYS_LISTED, TYPE)
    values = listed_pointer(segment + VALUES_LISTED, TYPE)
    capacity, length = tl.load(segment + ROOM_LISTED), tl.load(segment + LENGTH_LISTED)
    token, channel = tl.program_id(0) * TOKENS + tl.arange(0, TOKENS), tl.arange(0, WIDTH)
    inside = ((token < count) & (length >= count))[:, None] & (channel[None] < DIM)
    to = (row * capacity + length - count) * DIM + (token[:, None] * DIM + channel[None])
    k_at = k_pointer + row * k_row + (token[:, None].to(tl.int64) * k_token + channel[None])
    v_at = v_pointer + row * v_row + (token[:, None].to(tl.int64) * v_token + channel[None])
    tl.store(keys + to, tl.load(k_at, mask=inside), mask=inside)
    tl.store(values + to, tl.load(v_at, mask=inside), mask=inside)
