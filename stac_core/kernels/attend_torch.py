"""Attention with key mass in plain PyTorch: the specification, and a path for any device."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from stac_core.kernels.attend import (
    AnySegment,
    Attended,
    Segment,
    check_attend,
    decode_keys,
    decode_segments,
    part_of,
    sample_queries,
)

BLOCK = 512  # queries or keys per step: the product of one step stays near the processor
DECODED = 4096  # keys per step of fused attention, which is slow on few, where they are stored as codes


def explicit(q: Tensor, segments: Sequence[AnySegment], subsample: float, dtype: torch.dtype) -> Attended:
    """The contract word for word, every intermediate in one dtype, nothing fused. Slow; judges the others."""
    decoded = decode_segments(segments, dtype)
    keys = torch.cat([s.keys.to(dtype) for s in decoded], 1)
    values = torch.cat([s.values.to(dtype) for s in decoded], 1)
    bias = torch.cat([_bias(s).to(dtype) for s in decoded], 1)
    logits = q.to(dtype) @ keys.mT / math.sqrt(q.shape[-1]) + bias[:, None]  # [rows, M, N]
    weights = logits.softmax(-1).nan_to_num(0)  # a row whose keys are all hidden attends to nothing
    rows, stride, scale = sample_queries(q.shape[1], subsample)
    key_mass = weights[:, : rows * stride : stride].sum(1) * scale
    lengths = [s.length for s in segments]
    return Attended(weights @ values, logits.logsumexp(-1), list(key_mass.split(lengths, 1)))


def attend(q: Tensor, segments: Sequence[AnySegment], mass: bool = False, subsample: float = 1.0) -> Attended:
    """Fused attention per segment, joined by lse; the mass from a second product of the sampled queries."""
    check_attend(q, segments, subsample)
    out, lse = _join([_attend_segment(q, part) for s in segments for part in _decoded(s, q.dtype)])
    key_mass = None
    if mass:
        rows, stride, scale = sample_queries(q.shape[1], subsample)
        sampled = slice(0, rows * stride, stride)
        key_mass = [_segment_mass(q[:, sampled], s, lse[:, sampled]).mul_(scale) for s in segments]
    return Attended(out, lse, key_mass)


def _decoded(segment: AnySegment, dtype: torch.dtype) -> Iterator[Segment]:
    """A segment as numbers, in parts: of codes never many are decoded at a time. None where it is empty."""
    if isinstance(segment, Segment):
        yield from [segment] if segment.length else []
        return
    for start in range(0, segment.length, DECODED):
        yield from decode_segments([part_of(segment, start, start + DECODED)], dtype)


def _attend_segment(q: Tensor, segment: Segment) -> tuple[Tensor, Tensor]:
    """out [rows, M, D] and lse [rows, M] over one segment, by the fused kernel that reports lse."""
    keys, values, bias = segment.keys, segment.values, segment.bias
    if q.device.type == "cpu":
        mask = None if bias is None else bias[None, :, None].expand(1, -1, q.shape[1], -1)
        out, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
            q[None], keys[None], values[None], attn_mask=mask
        )
        lse = lse[0] if bias is None else _hidden_rows_to_minus_inf(lse[0], bias)
        return out[0], lse
    if q.device.type == "cuda" and q.dtype != torch.float32 and bias is None:
        out, lse, *_ = torch.ops.aten._scaled_dot_product_flash_attention(q[None], keys[None], values[None])
        return out[0], lse[0]
    return _attend_unfused(q, segment)


def _attend_unfused(q: Tensor, segment: Segment) -> tuple[Tensor, Tensor]:
    """For devices and inputs without a fused kernel: float32, one block of queries at a time."""
    keys, values = segment.keys.float(), segment.values.float()
    out = torch.empty_like(q)
    lse = torch.empty(q.shape[:2], device=q.device)
    for start in range(0, q.shape[1], BLOCK):
        rows = slice(start, start + BLOCK)
        logits = torch.baddbmm(_bias(segment)[:, None], q[:, rows].float(), keys.mT, alpha=_scale(q))
        lse[:, rows] = logits.logsumexp(-1)
        out[:, rows] = logits.sub_(_finite(lse[:, rows])[..., None]).exp_() @ values
    return out, lse


def _join(parts: list[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    """Attention over the union of segments from attention over each."""
    if len(parts) == 1:
        return parts[0]
    lse = torch.stack([part_lse for _, part_lse in parts]).logsumexp(0)
    out = sum(o.float() * (part_lse - _finite(lse)).exp()[..., None] for o, part_lse in parts)
    return out.to(parts[0][0].dtype), lse  # type: ignore[union-attr]


def _segment_mass(q: Tensor, segment: AnySegment, lse: Tensor) -> Tensor:
    """Column sums [rows, N] of exp(logits − lse).

    Bias and lse ride along as two more channels of the product, so that each block is touched
    three times only: product, exponential, sum.
    """
    minus_lse = -lse.masked_fill(lse.isneginf(), math.inf)  # a fully hidden row gives exp(−inf) = 0
    queries = torch.cat([q.float() * _scale(q), minus_lse[..., None], torch.ones_like(lse)[..., None]], -1).mT
    key_mass = torch.empty(q.shape[0], segment.length, device=q.device)
    for start in range(0, segment.length, BLOCK):
        block = part_of(segment, start, start + BLOCK)
        keys = decode_keys(block, q.dtype).float()
        bias = torch.zeros(1, 1, device=q.device) if block.bias is None else block.bias
        bias = bias.expand(keys.shape[:2])
        augmented = torch.cat([keys, torch.ones_like(bias)[..., None], bias[..., None]], -1)
        torch.sum((augmented @ queries).exp_(), -1, out=key_mass[:, start : start + BLOCK])
    return key_mass


def _scale(q: Tensor) -> float:
    return 1 / math.sqrt(q.shape[-1])


def _bias(segment: Segment) -> Tensor:
    if segment.bias is not None:
        return segment.bias
    return torch.zeros(segment.keys.shape[:2], device=segment.keys.device)


def _finite(lse: Tensor) -> Tensor:
    """lse with 0 for −inf, so that subtracting it from −inf stays −inf instead of NaN."""
    return lse.masked_fill(lse.isneginf(), 0)


def _hidden_rows_to_minus_inf(lse: Tensor, bias: Tensor) -> Tensor:
    """The fused CPU kernel reports 0 where every key is hidden."""
    return lse.masked_fill(bias.isneginf().all(-1)[:, None], -math.inf)
