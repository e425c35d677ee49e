"""Segments stored as codes, made by the codec of the cache."""

from __future__ import annotations

import math

import torch

from stac_core.kernels.attend import CodedSegment, Codes, Segment
from stac_core.kernels.quantization import Codec


def coded(x: torch.Tensor, bits: int, factor: torch.Tensor | None = None) -> Codes:
    """x [rows, N, D] as the cache stores it."""
    dim = x.shape[-1]
    codec = Codec(bits, dim, torch.float32)
    return Codes(*codec.encode(x if factor is None else x / factor[:, None]), bits, dim, factor)


def random_segments(dim: int, bits: int, seed: int, dtype: torch.dtype):
    g = torch.Generator().manual_seed(seed)
    k, v, k2, v2 = torch.randn(4, 3, 97, dim, generator=g)
    k[..., 1] *= 5  # an outlier channel
    bias = torch.randn(3, 97, generator=g)
    bias[:, 30:40] = -math.inf
    segment = CodedSegment(coded(k, bits, k.abs().amax(1)), coded(v, bits), bias)
    return torch.randn(3, 70, dim, generator=g).to(dtype), [segment, Segment(k2.to(dtype), v2.to(dtype))]
