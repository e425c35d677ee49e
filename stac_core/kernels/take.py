"""Contract of taking rows out of tensors that are numbered as if they lay side by side.

`take_torch.take` is the specification in code.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor

from stac_core.kernels.checks import check_tensor

MOST_PARTS = 4
LIKE = "parts[0]"  # whose device all arguments share


class Take(Protocol):
    """One implementation of the contract."""

    def __call__(self, parts: Sequence[Tensor], places: Tensor) -> Tensor:
        """Row p of a lane is the p-th of all its parts, one part after the other.

        parts: one to four, [lanes, n_i, w] each, of one dtype; rows without gaps, otherwise any strides.
        places [lanes, m] int64: at least 0 and less than the n_i together, which nobody checks.
        → [lanes, m, w] without gaps. ValueError naming the argument that does not fit.
        """


def check_take(parts: Sequence[Tensor], places: Tensor) -> None:
    """Raise ValueError for the first argument outside the contract, before anything is launched."""
    if not 1 <= len(parts) <= MOST_PARTS:
        raise ValueError(f"parts: expected 1 to {MOST_PARTS}, got {len(parts)}")
    if parts[0].ndim != 3:
        raise ValueError(f"parts[0]: expected [lanes, n, w], got shape {list(parts[0].shape)}")
    (lanes, _, width), dtype, device = parts[0].shape, parts[0].dtype, parts[0].device
    for i, part in enumerate(parts):
        n = part.shape[1] if part.ndim == 3 else 0
        check_tensor(f"parts[{i}]", part, [lanes, n, width], dtype, device, LIKE)
        if width > 1 and part.stride(2) != 1:
            raise ValueError(f"parts[{i}]: rows must be contiguous, got strides {part.stride()}")
    m = places.shape[-1] if places.ndim else 0
    check_tensor("places", places, [lanes, m], torch.int64, device, LIKE)
