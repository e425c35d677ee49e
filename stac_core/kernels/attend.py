"""Contract of attention that also reports how much attention every key received.

    logits = q·kᵀ/√D + bias               bias per key, added after scaling
    lse[m] = log Σₙ exp(logits[m, n])
    out[m] = Σₙ exp(logits[m, n] − lse[m]) v[n]
    key_mass[n] = Σₘ exp(logits[m, n] − lse[m])

A row is one (scene, head). Keys come as a list of segments (live tokens, retrieved tokens) so that
nobody has to copy them next to each other. Source: STAC (arXiv 2603.20284), section on the decayed
attention score. `attend_torch.attend_reference` is the specification in code.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
SAMPLE_BLOCK = 128  # subsampled queries come in multiples of this


@dataclass(frozen=True)
class Segment:
    """Keys and values that lie together in memory; the last dimension is contiguous."""

    keys: Tensor  # [rows, N, D]
    values: Tensor  # [rows, N, D]
    bias: Tensor | None = None  # [rows, N] float32, −inf hides a key

    @property
    def length(self) -> int:
        return self.keys.shape[1]


class Attended(NamedTuple):
    """Rows whose keys are all hidden have out 0, lse −inf and mass 0."""

    out: Tensor  # [rows, M, D], dtype of q
    lse: Tensor  # [rows, M] float32
    key_mass: list[Tensor] | None  # one [rows, N] float32 per segment, where asked for


class Attend(Protocol):
    """One implementation of the contract. Results do not depend on the run: no atomics anywhere."""

    def __call__(
        self, q: Tensor, segments: Sequence[Segment], mass: bool = False, subsample: float = 1.0
    ) -> Attended:
        """q [rows, M, D]; raises ValueError naming the argument that does not fit."""


class QuerySample(NamedTuple):
    """Which queries contribute to the mass: 0, stride, 2·stride, …, weighed by `scale`."""

    rows: int
    stride: int
    scale: float


def sample_queries(queries: int, subsample: float) -> QuerySample:
    """The published rule: about subsample·queries rows, a multiple of 128, at an even stride.

    The last queries − rows·stride queries never count. From 1.0 on every query counts, exactly.
    """
    wanted = max(SAMPLE_BLOCK, int(subsample * queries) // SAMPLE_BLOCK * SAMPLE_BLOCK)
    if subsample >= 1 or wanted >= queries:
        return QuerySample(queries, 1, 1.0)
    return QuerySample(wanted, queries // wanted, queries / wanted)


def check_attend(q: Tensor, segments: Sequence[Segment], subsample: float) -> None:
    """Raise ValueError for the first argument outside the contract, before anything is launched."""
    if q.ndim != 3 or 0 in q.shape:
        raise ValueError(f"q: expected a non-empty [rows, queries, dim], got shape {list(q.shape)}")
    if q.dtype not in DTYPES:
        raise ValueError(f"q: expected float32, bfloat16 or float16, got {q.dtype}")
    if q.stride(-1) != 1:
        raise ValueError(f"q: the last dimension must be contiguous, got strides {q.stride()}")
    if not 0 < subsample <= 1:
        raise ValueError(f"subsample = {subsample}: expected a share of the queries in (0, 1]")
    for i, segment in enumerate(segments):
        _check_tokens(f"segments[{i}].keys", segment.keys, segment.length, q)
        _check_tokens(f"segments[{i}].values", segment.values, segment.length, q)
        if segment.bias is not None:
            _check_bias(f"segments[{i}].bias", segment.bias, segment.length, q)
    if not any(segment.length for segment in segments):
        raise ValueError(f"segments: no key to attend to in {len(segments)} segment(s)")


def _check_tokens(name: str, tokens: Tensor, length: int, q: Tensor) -> None:
    expected = [q.shape[0], length, q.shape[2]]
    if list(tokens.shape) != expected:
        raise ValueError(f"{name}: expected shape {expected} (rows and dim of q), got {list(tokens.shape)}")
    if tokens.dtype != q.dtype:
        raise ValueError(f"{name}: expected {q.dtype} like q, got {tokens.dtype}")
    if tokens.device != q.device:
        raise ValueError(f"{name}: is on {tokens.device}, q on {q.device}; move them to one device")
    if tokens.stride(-1) != 1:
        raise ValueError(f"{name}: the last dimension must be contiguous, got strides {tokens.stride()}")


def _check_bias(name: str, bias: Tensor, length: int, q: Tensor) -> None:
    expected = [q.shape[0], length]
    if list(bias.shape) != expected:
        raise ValueError(f"{name}: expected shape {expected} (one number per key), got {list(bias.shape)}")
    if bias.dtype != torch.float32:
        raise ValueError(f"{name}: expected torch.float32, got {bias.dtype}")
    if bias.device != q.device:
        raise ValueError(f"{name}: is on {bias.device}, q on {q.device}; move them to one device")
