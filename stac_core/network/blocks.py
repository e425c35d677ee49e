"""Attention, MLP and the residual block that every part of the network is made of.

Precision follows the weights: norms, layer scales and the residual stream stay in float32; linear
layers and the attention product run in the dtype of the linear weights, or in autocast's where a
caller has enabled it.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from stac_core.network.rope import rotate

Attend = Callable[[Tensor, Tensor, Tensor], Tensor]  # q, k, v [B, heads, T, D] -> like q


class LayerNorm(nn.LayerNorm):
    """LayerNorm in the dtype of its weights, which is float32 whatever the linear layers run in."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.to(self.weight.dtype))


class LayerScale(nn.Module):
    """A learned factor per channel on a residual branch."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.gamma


class Mlp(nn.Module):
    """Linear, exact GELU, linear."""

    def __init__(self, width: int, hidden: int, out: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(width, hidden)
        self.fc2 = nn.Linear(hidden, out)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.widen(x)))

    def widen(self, x: Tensor) -> Tensor:
        """Up to the activation: [..., hidden]."""
        return self.fc1(x.to(self.fc1.weight.dtype))


class Attention(nn.Module):
    """The linear maps around multi-head attention; who sees whom is decided in between."""

    def __init__(self, width: int, heads: int, qk_norm: bool) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width)
        self.q_norm: nn.Module = LayerNorm(width // heads) if qk_norm else nn.Identity()
        self.k_norm: nn.Module = LayerNorm(width // heads) if qk_norm else nn.Identity()
        self.proj = nn.Linear(width, width)

    def project(self, x: Tensor, rotary: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
        """x [B, T, width] → q, k, v [B, heads, T, D]; rotary [2, T, D] turns q and k, once normalised."""
        q, k, v = self.split(self.product(x))
        q, k = self.q_norm(q), self.k_norm(k)
        if rotary is not None:
            q, k = rotate(q, rotary), rotate(k, rotary)
        return q.to(v.dtype), k.to(v.dtype), v

    def product(self, x: Tensor) -> Tensor:
        """Its linear map: q, k and v of all heads side by side [B, T, 3 · width]."""
        return self.qkv(x.to(self.qkv.weight.dtype))

    def split(self, product: Tensor) -> Tensor:
        """q, k and v of all heads apart [3, B, heads, T, D]."""
        return product.unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)


class Block(nn.Module):
    """Pre-norm transformer block with layer scale."""

    attend_within: Attend = staticmethod(F.scaled_dot_product_attention)

    def __init__(
        self, width: int, heads: int, mlp_ratio: float, *, eps: float = 1e-5, qk_norm: bool = False
    ) -> None:
        super().__init__()
        self.norm1 = LayerNorm(width, eps=eps)
        self.attn = Attention(width, heads, qk_norm)
        self.ls1 = LayerScale(width)
        self.norm2 = LayerNorm(width, eps=eps)
        self.mlp = Mlp(width, int(width * mlp_ratio), width)
        self.ls2 = LayerScale(width)

    def forward(self, x: Tensor, attend: Attend | None = None, rotary: Tensor | None = None) -> Tensor:
        """x [B, T, width] → the same shape; without `attend` every token sees all T tokens."""
        attended = (attend or self.attend_within)(*self.before(x, rotary))
        return self.after(x, attended.transpose(1, 2).flatten(2))

    def before(self, x: Tensor, rotary: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
        """Everything up to the attention: q, k, v [B, heads, T, D]."""
        return self.attn.project(self.norm1(x), rotary)

    def product(self, x: Tensor) -> Tensor:
        """Its first part: q, k and v of all heads side by side [B, T, 3 · width], not yet normed."""
        return self.attn.product(self.norm1(x))

    def after(self, x: Tensor, attended: Tensor) -> Tensor:
        """Everything from the attention on: attended [B, T, width], all heads side by side, and x joined."""
        x, hidden = self.widen(x, attended)
        hidden = F.gelu(hidden)
        return self.narrow(x, hidden)

    def widen(self, x: Tensor, attended: Tensor) -> tuple[Tensor, Tensor]:
        """Its first part: x with what was attended, and the MLP up to its activation [B, T, hidden]."""
        x = x + self.ls1(self.attn.proj(attended))
        return x, self.mlp.widen(self.norm2(x))

    def narrow(self, x: Tensor, hidden: Tensor) -> Tensor:
        """Its last part: the MLP from its activation on, and x joined."""
        return x + self.ls2(self.mlp.fc2(hidden))
