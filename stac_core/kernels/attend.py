"""Contract of attention that also reports how much attention every key received.

    logits = q·kᵀ/√D + bias               bias per key, added after scaling
    lse[m] = log Σₙ exp(logits[m, n])
    out[m] = Σₙ exp(logits[m, n] − lse[m]) v[n]
    key_mass[n] = Σₘ exp(logits[m, n] − lse[m])

A row is one (scene, head). Keys come as a list of segments (pinned, recent, retrieved tokens …) so that
nobody has to copy them next to each other; each is stored as numbers or as codes. Source: STAC (arXiv
2603.20284), section on the decayed attention score. `attend_torch.explicit` is the specification in code.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
CODE_GROUP = 64  # channels that share a scale and an offset
SAMPLE_BLOCK = 128  # subsampled queries come in multiples of this
MOST_SEGMENTS = 8  # kernels take all segments in one launch, as arguments


@dataclass(frozen=True)
class Segment:
    """Keys and values that lie together in memory; the last dimension is contiguous."""

    keys: Tensor  # [rows, N, D]
    values: Tensor  # [rows, N, D]
    bias: Tensor | None = None  # [rows, N] float32, −inf hides a key

    @property
    def length(self) -> int:
        return self.keys.shape[1]


@dataclass(frozen=True)
class Codes:
    """Vectors of `dim` numbers as codes; number = (code · scale + offset) · factor.

    8 bits: one byte per channel; 4 bits: two channels per byte, the even one in the low half. Scale and
    offset hold for 64 channels. The factor per channel takes outliers of keys out. Kernels multiply it in
    where they decode: in front of 16-bit products that is one rounding fewer than scaling the queries.
    Source: XStreamVGGT (arXiv 2601.01204).
    """

    codes: Tensor  # [rows, N, dim · bits / 8] uint8
    grid: Tensor  # [rows, N, 2 · groups] float16: scale and offset of each group
    bits: int
    dim: int
    factor: Tensor | None = None  # [rows, dim] float32

    def decode(self, dtype: torch.dtype) -> Tensor:
        """[rows, N, dim]."""
        codes = self.codes
        if self.bits == 4:
            codes = torch.stack([codes & 15, codes >> 4], -1).flatten(-2)
        precise = torch.promote_types(dtype, torch.float32)
        scale, offset = self.grid.to(precise).unflatten(-1, (-1, 2))[..., None].unbind(-2)  # [.., groups, 1]
        width = min(self.dim, CODE_GROUP)
        codes = F.pad(codes, (0, scale.shape[-2] * width - self.dim)).unflatten(-1, (-1, width))
        numbers = (codes * scale + offset).flatten(-2)[..., : self.dim]
        return (numbers if self.factor is None else numbers * self.factor[:, None]).to(dtype)


@dataclass(frozen=True)
class CodedSegment:
    """A segment whose tokens are read as codes; keys and values have the same bits."""

    keys: Codes
    values: Codes
    bias: Tensor | None = None  # [rows, N] float32, −inf hides a key

    @property
    def length(self) -> int:
        return self.keys.codes.shape[1]

    def decode(self, dtype: torch.dtype) -> Segment:
        return Segment(self.keys.decode(dtype), self.values.decode(dtype), self.bias)


AnySegment = Segment | CodedSegment


class Attended(NamedTuple):
    """Rows whose keys are all hidden have out 0, lse −inf and mass 0."""

    out: Tensor  # [rows, M, D], dtype of q
    lse: Tensor  # [rows, M] float32
    key_mass: list[Tensor] | None  # one [rows, N] float32 per segment, where asked for


class Attend(Protocol):
    """One implementation of the contract. Results do not depend on the run: no atomics anywhere."""

    def __call__(
        self, q: Tensor, segments: Sequence[AnySegment], mass: bool = False, subsample: float = 1.0
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


def decode_segments(segments: Sequence[AnySegment], dtype: torch.dtype) -> list[Segment]:
    """For backends that read numbers only."""
    return [s.decode(dtype) if isinstance(s, CodedSegment) else s for s in segments]


def decode_keys(segment: AnySegment, dtype: torch.dtype) -> Tensor:
    """[rows, N, D] of one segment, for who looks at keys outside of attention."""
    return segment.keys.decode(dtype) if isinstance(segment, CodedSegment) else segment.keys


def part_of(segment: AnySegment, start: int, stop: int) -> AnySegment:
    """Some of the tokens of a segment, as a view."""
    bias = None if segment.bias is None else segment.bias[:, start:stop]
    if isinstance(segment, Segment):
        return Segment(segment.keys[:, start:stop], segment.values[:, start:stop], bias)
    keys, values = (
        replace(x, codes=x.codes[:, start:stop], grid=x.grid[:, start:stop])
        for x in (segment.keys, segment.values)
    )
    return CodedSegment(keys, values, bias)


def check_attend(q: Tensor, segments: Sequence[AnySegment], subsample: float) -> None:
    """Raise ValueError for the first argument outside the contract, before anything is launched."""
    if q.ndim != 3 or 0 in q.shape:
        raise ValueError(f"q: expected a non-empty [rows, queries, dim], got shape {list(q.shape)}")
    if q.dtype not in DTYPES:
        raise ValueError(f"q: expected float32, bfloat16 or float16, got {q.dtype}")
    if q.stride(-1) != 1:
        raise ValueError(f"q: the last dimension must be contiguous, got strides {q.stride()}")
    if not 0 < subsample <= 1:
        raise ValueError(f"subsample = {subsample}: expected a share of the queries in (0, 1]")
    if len(segments) > MOST_SEGMENTS:
        raise ValueError(f"segments: {len(segments)} of them, at most {MOST_SEGMENTS}; join some")
    for i, segment in enumerate(segments):
        _check_dimensions(f"segments[{i}].keys", segment.keys)
        for name, tokens in (("keys", segment.keys), ("values", segment.values)):
            if isinstance(tokens, Codes):
                _check_codes(f"segments[{i}].{name}", tokens, segment.length, q)
            else:
                _check_tokens(f"segments[{i}].{name}", tokens, segment.length, q)
        if isinstance(segment, CodedSegment) and segment.keys.bits != segment.values.bits:
            bits = f"keys have {segment.keys.bits} bits, values {segment.values.bits}"
            raise ValueError(f"segments[{i}]: {bits}; they must be stored alike")
        if segment.bias is not None:
            _check_bias(f"segments[{i}].bias", segment.bias, segment.length, q)
    if not any(segment.length for segment in segments):
        raise ValueError(f"segments: no key to attend to in {len(segments)} segment(s)")


def _check_dimensions(name: str, tokens: Tensor | Codes) -> None:
    """There is a length to compare with."""
    what, stored = (".codes", tokens.codes) if isinstance(tokens, Codes) else ("", tokens)
    if stored.ndim != 3:
        raise ValueError(f"{name}{what}: expected [rows, keys, dim], got shape {list(stored.shape)}")


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


def _check_codes(name: str, x: Codes, length: int, q: Tensor) -> None:
    if x.bits not in (8, 4):
        raise ValueError(f"{name}.bits = {x.bits}: expected 8 or 4")
    dim = q.shape[2]
    if x.dim != dim:
        raise ValueError(f"{name}.dim = {x.dim}: q has a head width of {dim}")
    if x.bits == 4 and dim % 2:
        raise ValueError(f"{name}: codes of 4 bits need an even head width, got {dim}")
    groups = -(-dim // CODE_GROUP)
    parts = {
        "codes": (x.codes, [q.shape[0], length, dim * x.bits // 8], torch.uint8),
        "grid": (x.grid, [q.shape[0], length, 2 * groups], torch.float16),
    }
    if x.factor is not None:
        parts["factor"] = (x.factor, [q.shape[0], dim], torch.float32)
    for part, (tensor, shape, dtype) in parts.items():
        if list(tensor.shape) != shape or tensor.dtype != dtype or tensor.device != q.device:
            got = f"{list(tensor.shape)} of {tensor.dtype} on {tensor.device}"
            raise ValueError(f"{name}.{part}: expected {shape} of {dtype} on {q.device}, got {got}")
        if tensor.stride(-1) != 1:
            raise ValueError(f"{name}.{part}: the last dimension must be contiguous, got {tensor.stride()}")


def _check_bias(name: str, bias: Tensor, length: int, q: Tensor) -> None:
    expected = [q.shape[0], length]
    if list(bias.shape) != expected:
        raise ValueError(f"{name}: expected shape {expected} (one number per key), got {list(bias.shape)}")
    if bias.dtype != torch.float32:
        raise ValueError(f"{name}: expected torch.float32, got {bias.dtype}")
    if bias.device != q.device:
        raise ValueError(f"{name}: is on {bias.device}, q on {q.device}; move them to one device")
