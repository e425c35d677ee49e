"""Contract of attention over segments that are listed on the device, so that it can be recorded.

A CUDA graph launches its kernels with the arguments they were recorded with. The past of a stream moves and
grows from pass to pass, so these kernels are told by a list in the device's memory where it lies: the list is
written anew before each pass, its place stays. New keys and values are first put behind those of one segment.
No layer waits for the mass that keys receive: what that takes is kept, to compute it for all layers at once.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from stac_core.kernels.attend import sample_queries

FIELDS = 8  # of a segment in the list: where keys and values lie, tokens that there is room for, tokens,
# first column of the mass, where the bias lies and how far apart its rows; one is spare
KEYS_FIELD, VALUES_FIELD, ROOM_FIELD, LENGTH_FIELD, COLUMN_FIELD, BIAS_FIELD, BIAS_ROW_FIELD = range(7)
ALIGNMENT = 16  # bytes


@dataclass(frozen=True)
class ListedSegment:
    """Part of buffers that hold all lanes (layer by layer, head by head); kept exactly, not as codes."""

    keys: Tensor  # [lanes, capacity, D], dense
    values: Tensor  # like keys
    length: int  # tokens
    bias: Tensor | None = None  # [lanes, ≥ length] float32, −inf hides a key


@dataclass(frozen=True)
class Listing:
    """What does not change from pass to pass: a recording is made for it."""

    biased: tuple[bool, ...]  # of each segment; the biased ones come last
    grows: int  # which segment takes the new tokens
    subsample: float | None  # share of the queries that count for the mass; None = no mass is asked for
    most_keys: int  # of all segments together


class Counted(NamedTuple):
    """What the mass is computed from, of some or all lanes; attention fills it in."""

    q: Tensor  # [lanes, ≤ n, D] the queries that count, those of `sample_queries`
    lse: Tensor  # [lanes, n] float32, of all queries

    @property
    def stride(self) -> int:
        """Every how many-th query counts."""
        return self.lse.shape[1] // self.q.shape[1]

    def of(self, lanes: slice) -> Counted:
        return Counted(self.q[lanes], self.lse[lanes])


def room_to_count(lanes: int, q: Tensor, subsample: float) -> Counted:
    """For queries like these [heads, n, D] in so many lanes."""
    queries, dim = q.shape[1:]
    count = sample_queries(queries, subsample).rows
    return Counted(q.new_zeros(lanes, count, dim), q.new_zeros(lanes, queries, dtype=torch.float32))


class ListedAttend(Protocol):
    """One implementation: no host memory is read and nothing is waited for."""

    def __call__(
        self, q: Tensor, k: Tensor, v: Tensor, listed: Tensor, listing: Listing, counted: Counted | None
    ) -> Tensor:
        """q, k, v [heads, n, D]; listed [segments, FIELDS] of one layer → [heads, n, D].

        k and v become the last n tokens of the segment that grows, whose length already counts them; where
        it has fewer, as in a list of zeros, they are not kept. counted: of this layer, to be filled in.
        Every argument must fit: nothing is checked.
        """


class ListedMass(Protocol):
    """Likewise, once all layers have been answered."""

    def __call__(self, counted: Counted, listed: Tensor, listing: Listing, mass: Tensor) -> None:
        """counted: of all lanes, layer by layer; listed [segments, FIELDS] of the first layer.

        mass [lanes, ≥ most_keys] float32 takes what each key receives, segment after segment.
        """


class ListedKernels(NamedTuple):
    attend: ListedAttend
    sum_mass: ListedMass


def write_list(segments: Sequence[ListedSegment | None], layers: int) -> NDArray[np.int64]:
    """Where the segments of every layer lie [layers, segments, FIELDS]; None = empty.

    ValueError for buffers that the kernels could not read.
    """
    listed = np.zeros((layers, len(segments), FIELDS), np.int64)
    layer, column = np.arange(layers), 0
    for at, segment in enumerate(segments):
        listed[:, at, COLUMN_FIELD] = column
        if segment is None:
            continue
        lanes, capacity, _ = segment.keys.shape
        for field, buffer in ((KEYS_FIELD, segment.keys), (VALUES_FIELD, segment.values)):
            _check_dense(buffer)
            listed[:, at, field] = buffer.data_ptr() + layer * (buffer.nbytes // layers)
        listed[:, at, ROOM_FIELD], listed[:, at, LENGTH_FIELD] = capacity, segment.length
        if segment.bias is not None:
            _check_bias(segment.bias, lanes, segment.length)
            row_bytes = segment.bias.stride(0) * segment.bias.itemsize
            listed[:, at, BIAS_FIELD] = segment.bias.data_ptr() + layer * (lanes // layers * row_bytes)
            listed[:, at, BIAS_ROW_FIELD] = segment.bias.stride(0)
        column += segment.length
    return listed


def _check_bias(bias: Tensor, lanes: int, length: int) -> None:
    fits = bias.ndim == 2 and bias.shape[0] == lanes and bias.shape[1] >= length
    if not fits or bias.dtype != torch.float32 or (length > 1 and bias.stride(1) != 1):
        raise ValueError(
            f"a bias of shape {list(bias.shape)}, strides {bias.stride()} and {bias.dtype} is not "
            f"[{lanes}, at least {length}] torch.float32 with contiguous rows"
        )


def _check_dense(buffer: Tensor) -> None:
    lane_bytes = buffer.nbytes // max(1, len(buffer))
    if not buffer.is_contiguous() or buffer.data_ptr() % ALIGNMENT or lane_bytes % ALIGNMENT:
        raise ValueError(
            f"a buffer of shape {list(buffer.shape)} and strides {buffer.stride()} at {buffer.data_ptr():#x} "
            f"is not dense, or its lanes do not begin at multiples of {ALIGNMENT} bytes"
        )
