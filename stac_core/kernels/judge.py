"""Judge an implementation of `attend` fairly: against float64, by the error plain PyTorch makes.

The twice-rule: a kernel may be at most twice as far from the exact result as PyTorch computing the
same formula, unfused, in the kernel's own precision. Used by the tests and by `benchmark_gpu`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from stac_core.kernels.attend import AnySegment, Attended
from stac_core.kernels.attend_torch import explicit


class Verdict(NamedTuple):
    """Largest absolute errors against float64, and what the twice-rule allows."""

    what: str
    error: float
    allowed: float

    @property
    def passed(self) -> bool:
        return self.error <= self.allowed  # NaN fails


def judge_attend(q: Tensor, segments: Sequence[AnySegment], subsample: float, got: Attended) -> list[Verdict]:
    """One verdict each for out, lse and, where it was asked for, the mass of every segment."""
    exact = explicit(q, segments, subsample, torch.float64)
    plain = explicit(q, segments, subsample, q.dtype)
    shift = max((_largest(s.bias) for s in segments if s.bias is not None), default=0.0)
    verdicts = [
        compare("out", got.out, exact.out, plain.out, q.dtype),
        compare("lse", got.lse, exact.lse, plain.lse, q.dtype, shift),
    ]
    if got.key_mass is not None and exact.key_mass is not None and plain.key_mass is not None:
        for i, masses in enumerate(zip(got.key_mass, exact.key_mass, plain.key_mass, strict=True)):
            verdicts.append(compare_mass(f"mass {i}", *masses, exact.lse, q.dtype))
    return verdicts


def compare_mass(
    what: str, got: Tensor, exact: Tensor, plain: Tensor, exact_lse: Tensor, dtype: torch.dtype
) -> Verdict:
    """Mass is exp(logit − lse) of a rounded lse."""
    term = max(1.0, _largest(exact_lse)) * _largest(exact)
    return compare(what, got, exact, plain, dtype, term)


def compare(
    what: str, got: Tensor, exact: Tensor, plain: Tensor, dtype: torch.dtype, term: float = 0.0
) -> Verdict:
    """term: size of the float32 numbers that the result is made from, where they may cancel or multiply."""
    error, plain_error = (_largest_difference(x.double(), exact) for x in (got, plain))
    # On tiny inputs the plain result can be exact by luck; one rounding of everything is always allowed.
    rounding = torch.finfo(dtype).eps * _largest(exact) + torch.finfo(torch.float32).eps * term
    return Verdict(what, error, 2 * plain_error + rounding)


def _largest(x: Tensor) -> float:
    finite = x[x.isfinite()]
    return float(finite.abs().max()) if finite.numel() else 0.0


def _largest_difference(a: Tensor, b: Tensor) -> float:
    same_infinity = a.isinf() & (a == b)
    difference = (a - b).masked_fill(same_infinity, 0).abs()
    return float(difference.max()) if difference.numel() else 0.0
