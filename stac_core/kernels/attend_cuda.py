"""Attention with key mass by the kernels of `cuda_ext/`: 16-bit numbers, heads of 16, 32, 64 or 128.

Passes and joining of segments are those of `attend_triton.py`; coded segments are decoded before the launch.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from stac_core.kernels import attend_torch
from stac_core.kernels.attend import (
    AnySegment,
    Attended,
    Segment,
    check_attend,
    decode_segments,
    sample_queries,
)
from stac_core.kernels.cuda_library import require

__all__ = ["attend", "require"]


def attend(q: Tensor, segments: Sequence[AnySegment], mass: bool = False, subsample: float = 1.0) -> Attended:
    """The contract of `attend.py`; the library adds its limits of width and alignment."""
    check_attend(q, segments, subsample)
    if q.dtype == torch.float32:  # the few tokens of the pose head, which computes in float32
        return attend_torch.attend(q, segments, mass, subsample)
    plain = decode_segments(segments, q.dtype)
    out, lse = _forward(q, [s for s in plain if s.length])
    key_mass = None
    if mass:
        rows, stride, scale = sample_queries(q.shape[1], subsample)
        sampled = slice(0, rows * stride, stride)
        key_mass = [
            torch.ops.stac.attend_mass(q[:, sampled], s.keys, s.bias, lse[:, sampled], scale) for s in plain
        ]
    return Attended(out, lse, key_mass)


def _forward(q: Tensor, segments: Sequence[Segment]) -> tuple[Tensor, Tensor]:
    """One segment after the other; each starts from what the ones before it gave."""
    before: tuple[Tensor | None, Tensor | None] = (None, None)
    for segment in segments[:-1]:
        before = torch.ops.stac.attend_forward(q, segment.keys, segment.values, segment.bias, *before, False)
    end = segments[-1]
    return torch.ops.stac.attend_forward(q, end.keys, end.values, end.bias, *before, True)
