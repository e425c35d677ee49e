"""Attention with key mass: every backend checked, then timed against PyTorch's flash attention."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from stac_core.evaluation.gpu.measure import Ceilings, median_ms, poisoned_memory
from stac_core.kernels.attend import CODE_GROUP, AnySegment, Attend, CodedSegment, Codes, Segment
from stac_core.kernels.judge import judge_attend

# rows, queries, keys and bits of each segment, dim, dtype, subsample
CHECKS = [
    (3, 97, ((97, 16),), 64, torch.bfloat16, 1.0),
    (16, 1, ((1025, 16),), 64, torch.float16, 1.0),
    (16, 1025, ((97, 16), (0, 16), (1025, 16)), 64, torch.bfloat16, 0.25),
    (1, 300, ((1025, 16), (33, 16)), 128, torch.float16, 0.5),
    (3, 130, ((97, 16),), 16, torch.bfloat16, 1.0),
    (16, 300, ((1025, 16), (97, 16), (300, 16)), 64, torch.bfloat16, 1.0),
    (16, 300, ((1025, 8), (97, 16), (1025, 8)), 64, torch.bfloat16, 1.0),
    (16, 260, ((1041, 8), (2082, 8), (97, 8), (260, 16), (1025, 4)), 64, torch.bfloat16, 0.25),
    (3, 130, ((97, 4), (33, 8)), 128, torch.float16, 0.5),
    (2, 97, ((1025, 4),), 16, torch.float16, 1.0),
]
SMALL_CHECKS = [
    (2, 33, ((65, 16), (0, 16), (7, 8)), 64, torch.bfloat16, 1.0),
    (1, 300, ((40, 4),), 16, torch.float16, 0.5),
]
FAR = 100.0  # added to logits or taken away, so that their exponentials are not what float32 holds
# Tokens of a frame at 518×392, and what single frames and chunks of four attend to, in frames and bits:
# pinned, anchors, window, the chunk itself, retrieved.
FRAME = 1041
LIVE = (("exact", (16, 16, 16, 16, 16)), ("8 bits, retrieved 4", (8, 8, 8, 16, 4)))


@dataclass(frozen=True)
class Size:
    """One timed problem; what is wanted is wanted of the default."""

    rows: int = 16
    queries: int = 4096
    keys: int = 16384
    dim: int = 64

    def flop(self, mass_share: float) -> float:
        """Two products forward, one more for the queries that count for the mass."""
        return (4 + 2 * mass_share) * self.rows * self.queries * self.keys * self.dim


def check(name: str, attend: Attend, device: torch.device) -> list[dict[str, object]]:
    """Fresh random inputs, poisoned outputs, hidden keys; the twice-rule decides."""
    rows = []
    cases = CHECKS if device.type == "cuda" else SMALL_CHECKS
    for case, far in itertools.product(cases, (0.0, FAR)):
        q, segments = random_inputs(*case[:5], device=device)
        for bias in (segment.bias for segment in segments if segment.bias is not None):
            bias[::2] += far
            bias[1::2] -= far
        with poisoned_memory():
            got = attend(q, segments, True, case[5])
        for verdict in judge_attend(q, segments, case[5], got):
            keys = "+".join(f"{n}" if bits == 16 else f"{n} of {bits} bits" for n, bits in case[2])
            shape = f"{case[0]}×{case[1]}×({keys})×{case[3]}" + (" far" if far else "")
            rows.append({"backend": name, "case": shape, **verdict._asdict(), "passed": verdict.passed})
    return rows


def random_inputs(
    rows: int,
    queries: int,
    keys: tuple[tuple[int, int], ...],
    dim: int,
    dtype: torch.dtype,
    device: torch.device,
) -> tuple[Tensor, list[AnySegment]]:
    """Unseeded, so that every run sees other numbers. keys: length and bits; each second one unbiased."""
    q = torch.randn(rows, queries, dim, device=device).to(dtype)
    segments: list[AnySegment] = []
    for i, (n, bits) in enumerate(keys):
        bias = torch.randn(rows, n, device=device)
        bias[:, n // 3 : n // 2] = -math.inf
        kept = None if i % 2 else bias
        if bits == 16:
            k, v = torch.randn(2, rows, n, dim, device=device).to(dtype)
            segments.append(Segment(k, v, kept))
        else:
            factor = torch.rand(rows, dim, device=device) + 0.5
            k, v = (random_codes(rows, n, dim, bits, f, device) for f in (factor, None))
            segments.append(CodedSegment(k, v, kept))
    return q, segments


def random_codes(
    rows: int, n: int, dim: int, bits: int, factor: Tensor | None, device: torch.device
) -> Codes:
    """Any codes are the codes of something; scale and offset make it about as large as noise."""
    codes = torch.randint(0, 256, (rows, n, dim * bits // 8), dtype=torch.uint8, device=device)
    grid = torch.rand(rows, n, 2 * -(-dim // CODE_GROUP), device=device) + 0.5
    grid[..., ::2] *= 4 / 2**bits  # scale
    grid[..., 1::2] *= -2  # offset
    return Codes(codes, grid.half(), bits, dim, factor)


class Baseline:
    """One timed problem, and PyTorch's flash attention without bias and mass that all is held against."""

    def __init__(self, size: Size, ceilings: Ceilings, device: torch.device) -> None:
        self._size, self._ceilings, self._device = size, ceilings, device
        self._ms = float("nan")
        problem = size.rows, size.queries, ((size.keys, 16),), size.dim
        self._q, (segment,) = random_inputs(*problem, torch.bfloat16, device)
        if not isinstance(segment, Segment):
            raise TypeError("random_inputs gives plain numbers for 16 bits")
        self._bare, self._biased = Segment(segment.keys, segment.values), segment

    def time(self) -> list[dict[str, object]]:
        """The baseline itself, first."""
        self._ms = median_ms(_bound_flash(self._q, self._bare), self._device)
        return [_row("PyTorch flash", "plain", self._ms, self._ms, self._size.flop(0), self._ceilings)]

    def time_backend(self, name: str, attend: Attend) -> list[dict[str, object]]:
        """One row per variant; `ratio` is against the baseline."""
        size, retrieved = self._size, self._size.keys // 8
        keys, values = self._bare.keys, self._bare.values
        split: list[AnySegment] = [
            Segment(keys[:, :-retrieved], values[:, :-retrieved]),
            Segment(
                keys[:, -retrieved:].contiguous(),
                values[:, -retrieved:].contiguous(),
                torch.zeros(size.rows, retrieved, device=self._device),
            ),
        ]
        variants: dict[str, tuple[list[AnySegment], bool, float]] = {
            "plain": ([self._bare], False, 1.0),
            "bias": ([self._biased], False, 1.0),
            "bias, mass": ([self._biased], True, 1.0),
            "bias, mass of a quarter": ([self._biased], True, 0.25),
            "two segments, bias, mass": (split, True, 1.0),
        }
        rows = []
        for variant, (segments, mass, share) in variants.items():
            ms = median_ms(_bound(attend, self._q, segments, mass, share), self._device)
            rows.append(_row(name, variant, ms, self._ms, size.flop(share if mass else 0), self._ceilings))
        return rows


def live_inputs(
    chunk: int, bits: tuple[int, ...], device: torch.device, frame: int = FRAME
) -> tuple[Tensor, list[AnySegment]]:
    """Queries and segments of a step of so many frames; as in a stream, only retrieved tokens have a bias."""
    keys = tuple((n * frame, b) for n, b in zip((1, 2, 4, chunk, 2), bits, strict=True))
    q, segments = random_inputs(16, chunk * frame, keys, 64, torch.bfloat16, device)
    return q, [*(replace(segment, bias=None) for segment in segments[:-1]), segments[-1]]


def time_frames(
    storage: str,
    bits: tuple[int, ...],
    backends: dict[str, Attend],
    ceilings: Ceilings,
    device: torch.device,
    frame: int = FRAME,
) -> list[dict[str, object]]:
    """One layer of one step as a stream asks for it: five segments, the mass of a quarter of the queries.

    `ratio` is against flash attention over as many keys in one piece, without bias and mass.
    """
    rows = []
    for chunk in (1, 4):
        q, segments = live_inputs(chunk, bits, device, frame)
        whole = sum(segment.length for segment in segments)
        _, (joined,) = random_inputs(16, 1, ((whole, 16),), 64, torch.bfloat16, device)
        if not isinstance(joined, Segment):
            raise TypeError("random_inputs gives plain numbers for 16 bits")
        baseline = median_ms(_bound_flash(q, joined), device)
        flop = Size(16, q.shape[1], whole, 64).flop(0.25)
        for name, attend in backends.items():
            ms = median_ms(_bound(attend, q, segments, True, 0.25), device)
            rows.append(_row(name, f"chunk of {chunk}, {storage}", ms, baseline, flop, ceilings))
    return rows


def flash(q: Tensor, segment: Segment) -> Tensor:
    """PyTorch's own, fastest kernel for the same shapes, without bias and mass."""
    backend = SDPBackend.FLASH_ATTENTION
    with sdpa_kernel(backend):
        return F.scaled_dot_product_attention(q[None], segment.keys[None], segment.values[None])


def _bound_flash(q: Tensor, segment: Segment) -> Callable[[], object]:
    return lambda: flash(q, segment)


def _bound(
    attend: Attend, q: Tensor, segments: Sequence[AnySegment], mass: bool, share: float
) -> Callable[[], object]:
    return lambda: attend(q, segments, mass, share)


def _row(
    backend: str, variant: str, ms: float, baseline: float, flop: float, ceilings: Ceilings
) -> dict[str, object]:
    rate = flop / ms * 1e3
    return {
        "backend": backend,
        "variant": variant,
        "ms": ms,
        "ratio": ms / baseline,
        "tflop_per_s": rate / 1e12,
        "of_roofline": rate / ceilings.matmul_flop_per_s,
    }
