"""Attention with key mass by the kernels of `cuda_ext/`: float16 and bfloat16, heads of 16, 32, 64 or 128.

Passes and joining of segments are those of `attend_triton.py`.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from stac_core.kernels.attend import Attended, Segment, check_attend, sample_queries
from stac_core.kernels.cuda_library import require

__all__ = ["attend", "require"]


def attend(q: Tensor, segments: Sequence[Segment], mass: bool = False, subsample: float = 1.0) -> Attended:
    """The contract of `attend.py`; the library adds its limits of width, type and alignment."""
    check_attend(q, segments, subsample)
    out, lse = _forward(q, [s for s in segments if s.length])
    key_mass = None
    if mass:
        rows, stride, scale = sample_queries(q.shape[1], subsample)
        sampled = slice(0, rows * stride, stride)
        key_mass = [
            torch.ops.stac.attend_mass(q[:, sampled], s.keys, s.bias, lse[:, sampled], scale)
            for s in segments
        ]
    return Attended(out, lse, key_mass)


def _forward(q: Tensor, segments: Sequence[Segment]) -> tuple[Tensor, Tensor]:
    """One segment after the other; each starts from what the ones before it gave."""
    before: tuple[Tensor | None, Tensor | None] = (None, None)
    for segment in segments[:-1]:
        before = torch.ops.stac.attend_forward(q, segment.keys, segment.values, segment.bias, *before, False)
    end = segments[-1]
    return torch.ops.stac.attend_forward(q, end.keys, end.values, end.bias, *before, True)
