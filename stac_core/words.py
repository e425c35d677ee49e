"""Copying rows of numbers without looking at the numbers.

A copy whose rows do not lie side by side moves one number per step, on a GPU as on a CPU; of sixteen bytes
at a time it takes an eighth of the steps that it takes in 16 bits.
"""

from __future__ import annotations

import torch
from torch import Tensor

WORDS = (torch.complex128, torch.complex64, torch.int32, torch.int16)  # the widest first


def copy_rows(target: Tensor, source: Tensor) -> None:
    """`target.copy_(source)` for tensors of one shape [..., w]; sooner where they also have one dtype."""
    for word in WORDS if target.dtype == source.dtype else ():
        if _consists_of(word, target) and _consists_of(word, source):
            target, source = target.view(word), source.view(word)
            break
    target.copy_(source)


def _consists_of(word: torch.dtype, x: Tensor) -> bool:
    """Whether the rows of x are made of whole words, each where such a word may lie."""
    *steps, within = x.stride()
    counts = (*steps, x.shape[-1], x.storage_offset())
    return within == 1 and all(count * x.itemsize % word.itemsize == 0 for count in counts)
