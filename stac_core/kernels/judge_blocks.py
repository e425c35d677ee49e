"""Judge the kernels of transformer blocks by the twice-rule of `judge.py`, on random inputs."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from stac_core.kernels import few_rows_torch, to_heads_torch
from stac_core.kernels.attend import Segment
from stac_core.kernels.attend_torch import explicit
from stac_core.kernels.attend_within import AttendWithin
from stac_core.kernels.few_rows import FewRows, Residual
from stac_core.kernels.gelu import Gelu
from stac_core.kernels.judge import Verdict, compare
from stac_core.kernels.to_heads import Norm, ToHeads


class Product(NamedTuple):
    """Arguments of `to_heads`."""

    qkv: Tensor
    heads: int
    q_norm: Norm
    k_norm: Norm
    rotary: Tensor


def random_product(
    shape: tuple[int, int, int, int], dtype: torch.dtype, device: torch.device, seed: int = 0
) -> Product:
    """shape: B, T, heads, D. Channels have offsets, so that norms have something to take away."""
    batch, tokens, heads, dim = shape
    g = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=g)

    qkv = (normal(batch, tokens, 3 * heads * dim) + 2 * normal(3 * heads * dim)).to(device, dtype)
    q_norm, k_norm = (
        Norm((1 + 0.3 * normal(dim)).to(device), normal(dim).to(device), eps) for eps in (1e-5, 1e-2)
    )
    angles = 3 * normal(tokens, dim)
    return Product(qkv, heads, q_norm, k_norm, torch.stack([angles.cos(), angles.sin()]).to(device))


def judge_to_heads(to_heads: ToHeads, product: Product) -> list[Verdict]:
    """One verdict each for q, k and v."""
    exact = to_heads_torch.explicit(*product, torch.float64)
    plain, got = to_heads_torch.to_heads(*product), to_heads(*product)
    dtype = product.qkv.dtype
    results = zip("qkv", got, exact, plain, strict=True)
    return [compare(what, mine, true, theirs, dtype) for what, mine, true, theirs in results]


class Map(NamedTuple):
    """Arguments of `few_rows`."""

    x: Tensor
    weight: Tensor
    bias: Tensor
    norm: Norm | None = None
    gelu: bool = False
    residual: Residual | None = None


def random_map(rows: int, width: int, outputs: int, around: str, device: torch.device, seed: int = 0) -> Map:
    """around: names of what is done besides, of norm, gelu, residual. Rows have offsets for a norm."""
    g = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=g).to(device)

    x, weight, bias = normal(rows, width), normal(outputs, width) / width**0.5, normal(outputs)
    norm = Norm(1 + 0.3 * normal(width), normal(width), 1e-5)
    residual = Residual(normal(rows, outputs), normal(outputs))
    return Map(
        x + 30 * normal(rows, 1) if "norm" in around else x, weight, bias,
        norm if "norm" in around else None, "gelu" in around, residual if "residual" in around else None,
    )  # fmt: skip


def judge_few_rows(few_rows: FewRows, given: Map) -> Verdict:
    """Against float64."""
    exact = few_rows_torch.explicit(*given, torch.float64)
    return compare("mapped", few_rows(*given), exact, few_rows_torch.few_rows(*given), torch.float32)


def judge_gelu(gelu_: Gelu, x: Tensor) -> Verdict:
    """Against float64."""
    return compare("activated", gelu_(x.clone()), F.gelu(x.double()), F.gelu(x), x.dtype)


def judge_attend_within(attend_within: AttendWithin, q: Tensor, k: Tensor, v: Tensor) -> Verdict:
    """Against the formula in float64, and unfused in the dtype of q."""
    rows = [x.flatten(0, 1) for x in (q, k, v)]
    exact, plain = (
        explicit(rows[0], [Segment(*rows[1:])], 1.0, dtype).out for dtype in (torch.float64, q.dtype)
    )
    return compare("out", attend_within(q, k, v).flatten(0, 1), exact, plain, q.dtype)
