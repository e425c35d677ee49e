"""Attention with key mass by the kernels of `cuda_ext/`: 16-bit numbers, heads of 16, 32, 64 or 128.

Two launches, forward and mass, over all segments; codes become numbers inside the kernels.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from stac_core.kernels import attend_torch
from stac_core.kernels.attend import (
    AnySegment,
    Attended,
    CodedSegment,
    Codes,
    check_attend,
    sample_queries,
)
from stac_core.kernels.cuda_library import check_on_cuda, require

__all__ = ["attend", "require"]

WIDTHS = (16, 32, 64, 128)
MOST_ROWS = 65535  # of a grid of blocks


def attend(q: Tensor, segments: Sequence[AnySegment], mass: bool = False, subsample: float = 1.0) -> Attended:
    """The contract of `attend.py`; ValueError also for widths without a kernel and for odd addresses."""
    check_attend(q, segments, subsample)
    if q.dtype == torch.float32:  # the few tokens of the pose head, which computes in float32
        return attend_torch.attend(q, segments, mass, subsample)
    check_limits(q, segments)
    check_on_cuda("q", q)
    filled = [s for s in segments if s.length]
    keys, values = ([getattr(s, part) for s in filled] for part in ("keys", "values"))
    of_keys = (_stored(keys), _grids(keys), [x.factor if isinstance(x, Codes) else None for x in keys])
    read_by = ([s.bias for s in filled], [_bits(s) for s in filled])
    out, lse = torch.ops.stac.attend_forward(q, *of_keys, _stored(values), _grids(values), *read_by)
    key_mass = None
    if mass:
        rows, stride, scale = sample_queries(q.shape[1], subsample)
        sampled = slice(0, rows * stride, stride)
        columns = torch.ops.stac.attend_mass(q[:, sampled], *of_keys, *read_by, lse[:, sampled], scale)
        key_mass = list(columns.split([s.length for s in segments], 1))
    return Attended(out, lse, key_mass)


def check_limits(q: Tensor, segments: Sequence[AnySegment]) -> None:
    """ValueError where arguments within the contract are beyond these kernels."""
    dim = q.shape[-1]
    if dim not in WIDTHS:
        raise ValueError(f"q: head width {dim}; this backend has kernels for 16, 32, 64 and 128")
    if q.shape[0] > MOST_ROWS:
        raise ValueError(f"q: {q.shape[0]} rows, at most {MOST_ROWS}; attend in several calls")
    _check_aligned("q", q, 16)
    for i, segment in enumerate(segments):
        for name, x in (("keys", segment.keys), ("values", segment.values)):
            if isinstance(x, Codes):
                _check_aligned(f"segments[{i}].{name}.codes", x.codes, 16 if dim >= 32 else 8)
                _check_aligned(f"segments[{i}].{name}.grid", x.grid, 4)
            else:
                _check_aligned(f"segments[{i}].{name}", x, 16)


def _check_aligned(name: str, x: Tensor, size: int) -> None:
    """Kernels read so many bytes at a time."""
    elements = size // x.element_size()
    offset = x.storage_offset()
    if any(number % elements for number in (*x.stride()[:2], offset)):
        where = f"strides {x.stride()} and offset {offset}"
        raise ValueError(
            f"{name}: tokens must begin at multiples of {size} bytes, got {where}; make it contiguous"
        )


def _stored(parts: list[Tensor | Codes]) -> list[Tensor]:
    return [x.codes if isinstance(x, Codes) else x for x in parts]


def _grids(parts: list[Tensor | Codes]) -> list[Tensor | None]:
    return [x.grid if isinstance(x, Codes) else None for x in parts]


def _bits(segment: AnySegment) -> int:
    return segment.keys.bits if isinstance(segment, CodedSegment) else 16
