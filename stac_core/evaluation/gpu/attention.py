"""Attention with key mass: every backend checked, then timed against PyTorch's flash attention."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from stac_core.evaluation.gpu.measure import Ceilings, median_ms, poison_new_memory, stop_poisoning
from stac_core.kernels.attend import Attend, Segment
from stac_core.kernels.judge import judge_attend

# rows, queries, keys of each segment, dim, dtype, subsample
CHECKS = [
    (3, 97, (97,), 64, torch.bfloat16, 1.0),
    (16, 1, (1025,), 64, torch.float16, 1.0),
    (16, 1025, (97, 0, 1025), 64, torch.bfloat16, 0.25),
    (1, 300, (1025, 33), 128, torch.float16, 0.5),
    (3, 130, (97,), 16, torch.bfloat16, 1.0),
]
SMALL_CHECKS = [(2, 33, (65, 0, 7), 64, torch.bfloat16, 1.0), (1, 300, (40,), 16, torch.float16, 0.5)]


@dataclass(frozen=True)
class Size:
    """One timed problem; the issue's own is the default."""

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
    for case in CHECKS if device.type == "cuda" else SMALL_CHECKS:
        q, segments = random_inputs(*case[:5], device=device)
        poison_new_memory()
        got = attend(q, segments, True, case[5])
        stop_poisoning()
        for verdict in judge_attend(q, segments, case[5], got):
            shape = f"{case[0]}×{case[1]}×{'+'.join(map(str, case[2]))}×{case[3]}"
            rows.append({"backend": name, "case": shape, **verdict._asdict(), "passed": verdict.passed})
    return rows


def random_inputs(
    rows: int, queries: int, keys: tuple[int, ...], dim: int, dtype: torch.dtype, device: torch.device
) -> tuple[Tensor, list[Segment]]:
    """Unseeded, so that every run sees other numbers; every second segment without a bias."""
    q = torch.randn(rows, queries, dim, device=device).to(dtype)
    segments = []
    for i, n in enumerate(keys):
        k, v = torch.randn(2, rows, n, dim, device=device).to(dtype)
        bias = torch.randn(rows, n, device=device)
        bias[:, n // 3 : n // 2] = -math.inf
        segments.append(Segment(k, v, None if i % 2 else bias))
    return q, segments


def time_all(
    backends: dict[str, Attend], size: Size, ceilings: Ceilings, device: torch.device
) -> list[dict[str, object]]:
    """One row per backend and variant; `ratio` is against flash attention without bias and mass."""
    dtype = torch.bfloat16
    q, (segment,) = random_inputs(size.rows, size.queries, (size.keys,), size.dim, dtype, device)
    bare = Segment(segment.keys, segment.values)
    retrieved = size.keys // 8
    split = [
        Segment(segment.keys[:, :-retrieved], segment.values[:, :-retrieved]),
        Segment(
            segment.keys[:, -retrieved:].contiguous(),
            segment.values[:, -retrieved:].contiguous(),
            torch.zeros(size.rows, retrieved, device=device),
        ),
    ]
    baseline = median_ms(lambda: flash(q, bare), device)
    rows = [_row("PyTorch flash", "plain", baseline, baseline, size.flop(0), ceilings)]
    variants = {
        "plain": ([bare], False, 1.0),
        "bias, mass": ([segment], True, 1.0),
        "bias, mass of a quarter": ([segment], True, 0.25),
        "two segments, bias, mass": (split, True, 1.0),
    }
    for name, attend in backends.items():
        for variant, (segments, mass, share) in variants.items():
            ms = median_ms(_bound(attend, q, segments, mass, share), device)
            flop = size.flop(share if mass else 0)
            rows.append(_row(name, variant, ms, baseline, flop, ceilings))
    return rows


def flash(q: Tensor, segment: Segment) -> Tensor:
    """PyTorch's own, fastest kernel for the same shapes, without bias and mass."""
    backend = SDPBackend.FLASH_ATTENTION
    with sdpa_kernel(backend):
        return F.scaled_dot_product_attention(q[None], segment.keys[None], segment.values[None])


def _bound(
    attend: Attend, q: Tensor, segments: list[Segment], mass: bool, share: float
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
