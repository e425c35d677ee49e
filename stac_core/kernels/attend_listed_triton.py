"""Attention over listed segments in Triton: the kernels of `attend_triton.py`, told where keys lie."""

# mypy: disable-error-code="no-untyped-def"
# (Triton gives the arguments of a kernel their types when it compiles it)

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from stac_core.kernels.attend_listed import Counted, Listing
from stac_core.kernels.attend_triton import forward_tile, parts_for, sweep
from stac_core.kernels.launch_triton import Tile, blocks_of, is_hopper
from stac_core.kernels.mass_triton import mass_tile, sum_columns
from stac_core.kernels.segments_triton import (
    KEYS_LISTED,
    LENGTH_LISTED,
    ROOM_LISTED,
    VALUES_LISTED,
    Kinds,
    listed_pointer,
)

TOKENS, WARPS = 32, 4  # of a program that keeps new tokens
ONE_FRAME = 1536  # tokens, at most


def attend(
    q: Tensor, k: Tensor, v: Tensor, listed: Tensor, listing: Listing, counted: Counted | None
) -> Tensor:
    """The contract of `attend_listed.py`."""
    with torch.cuda.device_of(q):  # Triton launches on the current device
        _keep(q, k, v, listed[listing.grows], counted)
        tile = tile_for(q, is_hopper(q.device))
        parts = parts_for(q, tile, blocks_of(listing.most_keys, tile.keys))
        out, _ = sweep(q, listed, _kinds(listing), tile, parts, None if counted is None else counted.lse)
    return out


def tile_for(q: Tensor, hopper: bool) -> Tile:
    """Where there are but the queries of one frame, blocks of half as many, three at once, so that all
    multiprocessors have their part."""
    if hopper and q.dtype != torch.float32 and q.shape[-1] <= 64 and q.shape[1] <= ONE_FRAME:
        return Tile(64, 64, 4, 3, 168)
    return forward_tile(q, False, hopper)


def sum_mass(counted: Counted, listed: Tensor, listing: Listing, mass: Tensor) -> None:
    """The contract of `attend_listed.py`: lanes of all layers are as far apart as heads of one."""
    queries, count, stride = counted.lse.shape[1], counted.q.shape[1], counted.stride
    tile = mass_tile(counted.q)
    blocks = blocks_of(listing.most_keys, tile.keys)
    blocks += len(listing.biased)  # each segment may end in a part of one
    lse = counted.lse[:, : count * stride : stride]
    with torch.cuda.device_of(counted.q):
        sum_columns(counted.q, listed, _kinds(listing), lse, queries / count, tile, blocks, mass)


def _kinds(listing: Listing) -> Kinds:
    """Segments without bias and with it."""
    biased = sum(listing.biased)
    plain = len(listing.biased) - biased
    counted = [(count, bias) for count, bias in ((plain, False), (biased, True)) if count]
    sizes, biases = zip(*counted, strict=True)
    return Kinds((16,) * len(sizes), (False,) * len(sizes), biases, sizes)


def _keep(q: Tensor, k: Tensor, v: Tensor, segment: Tensor, counted: Counted | None) -> None:
    """Put new tokens [heads, n, D] where the segment [FIELDS] ends, and aside those queries that count."""
    heads, count, dim = k.shape
    aside, stride = (q[:, :0], 1) if counted is None else (counted.q, counted.stride)
    queries = aside.shape[1]
    _keep_kernel[(blocks_of(max(count, queries), TOKENS), heads)](
        k, v, *k.stride()[:2], *v.stride()[:2], segment, count,
        q, aside, *q.stride()[:2], *aside.stride()[:2], queries, stride,
        dim, triton.next_power_of_2(dim), TOKENS, counted is not None, num_warps=WARPS,
    )  # fmt: skip


@triton.jit(do_not_specialize=["count", "queries", "stride"])
def _keep_kernel(
    k_pointer, v_pointer, k_row, k_token, v_row, v_token, segment, count,
    q_pointer, aside_pointer, q_row, q_token, aside_row, aside_token, queries, stride,
    DIM: tl.constexpr, WIDTH: tl.constexpr, TOKENS: tl.constexpr, COUNTED: tl.constexpr,
):  # fmt: skip
    """A program copies TOKENS tokens of one head, and as many queries."""
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
    if COUNTED:
        inside = (token < queries)[:, None] & (channel[None] < DIM)
        q_at = q_pointer + row * q_row + (token[:, None].to(tl.int64) * stride * q_token + channel[None])
        aside = aside_pointer + row * aside_row + (token[:, None].to(tl.int64) * aside_token + channel[None])
        tl.store(aside, tl.load(q_at, mask=inside), mask=inside)
