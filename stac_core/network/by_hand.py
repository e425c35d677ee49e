"""Blocks with hand-written kernels, in place of what the compiler would make there.

Of blocks in 16 bits the compiler keeps what joins two products; norm and rotation of heads, attention within
frames and the activation are kernels. Compiled pieces see rows, whatever frames they are of: one variant
serves one frame and several, within frames and across them. The camera head stays in 32 bits and has few
rows, whose weights take longer to read than to multiply: there one kernel multiplies and does what stands
before and behind.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from itertools import chain
from typing import cast

import torch
from torch import Tensor, nn

from stac_core.kernels.few_rows import FEW, FewRows, Residual
from stac_core.kernels.gelu import Gelu
from stac_core.kernels.select import BlockKernels
from stac_core.kernels.to_heads import Norm, ToHeads
from stac_core.network.blocks import Block, LayerNorm
from stac_core.network.borders import FirstProduct, join
from stac_core.network.causal_vggt import CausalVGGT
from stac_core.network.compiled import Backend, compiled


def use_kernels(network: CausalVGGT, kernels: BlockKernels, backend: Backend = "inductor") -> None:
    """After `compile_blocks`; `restore` takes both back."""
    product, widen, narrow, joined = (
        compiled(piece, backend) for piece in (Block.product, Block.widen, Block.narrow, join)
    )
    for blocks in _chains(network):
        firsts = [FirstProduct(block, product) for block in blocks]
        ends = [partial(first.after, block, joined) for block, first in zip(blocks, firsts[1:], strict=False)]
        for block, first, end in zip(blocks, firsts, [*ends, partial(narrow, blocks[-1])], strict=True):
            block.attend_within = kernels.attend_within
            block.before = partial(_before, first, kernels.to_heads, block)  # type: ignore[method-assign]
            block.after = partial(_after, widen, kernels.gelu_, end, block)  # type: ignore[method-assign]
    use_few_rows(network, kernels.few_rows)


def use_few_rows(network: CausalVGGT, few_rows: FewRows) -> None:
    """In the camera head alone, where it is in 32 bits; of more rows it stays as it is now."""
    modulation, trunk = _camera_head(network)
    if modulation.weight.dtype != torch.float32:
        return
    modulation.forward = partial(_linear_of_few, few_rows, modulation.forward, modulation)  # type: ignore[method-assign]
    for block in trunk:
        block.before = partial(_before_of_few, few_rows, block.before, block)  # type: ignore[method-assign]
        block.after = partial(_after_of_few, few_rows, block.after, block)  # type: ignore[method-assign]


def restore(network: CausalVGGT) -> None:
    """Blocks as they are without kernels and without a compiler."""
    for module in network.modules():
        if isinstance(module, Block):
            for piece in ("before", "attend_within", "after"):
                module.__dict__.pop(piece, None)
    modulation, _ = _camera_head(network)
    modulation.__dict__.pop("forward", None)


def _chains(network: CausalVGGT) -> list[list[Block]]:
    """Blocks in 16 bits; each is given what the one before has returned."""
    aggregator = network.aggregator
    encoder, frames, scene = (
        list(cast(Sequence[Block], blocks))
        for blocks in (aggregator.patch_embed.blocks, aggregator.frame_blocks, aggregator.global_blocks)
    )
    chains = [encoder, list(chain.from_iterable(zip(frames, scene, strict=True)))]
    return [blocks for blocks in chains if blocks[0].attn.qkv.weight.dtype in (torch.bfloat16, torch.float16)]


def _camera_head(network: CausalVGGT) -> tuple[nn.Linear, list[Block]]:
    """Its large linear layer outside the trunk, and the trunk."""
    head = network.camera_head
    return cast(nn.Linear, head.poseLN_modulation[1]), list(cast(Sequence[Block], head.trunk))


def _before(
    first: FirstProduct, to_heads: ToHeads, block: Block, x: Tensor, rotary: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """`Block.before` with a kernel behind its compiled product, where heads are normed."""
    attn, product = block.attn, first(x.flatten(0, 1)).unflatten(0, x.shape[:2])
    if rotary is None:
        q, k, v = attn.split(product)
        return q, k, v
    return to_heads(product, attn.heads, _norm(attn.q_norm), _norm(attn.k_norm), rotary)


def _after(
    widen: Callable[[Block, Tensor, Tensor], tuple[Tensor, Tensor]],
    gelu_: Gelu,
    narrow: Callable[[Tensor, Tensor], Tensor],
    block: Block,
    x: Tensor,
    attended: Tensor,
) -> Tensor:
    """`Block.after` with a kernel between two compiled pieces."""
    rows, hidden = widen(block, x.flatten(0, 1), attended.flatten(0, 1))
    return narrow(rows, gelu_(hidden)).unflatten(0, x.shape[:2])


def _linear_of_few(
    few_rows: FewRows, otherwise: Callable[[Tensor], Tensor], linear: nn.Linear, x: Tensor
) -> Tensor:
    """`nn.Linear.forward` in one kernel."""
    return few_rows(x, linear.weight, linear.bias) if _are_few(x) else otherwise(x)


def _before_of_few(
    few_rows: FewRows,
    otherwise: Callable[[Tensor, Tensor | None], tuple[Tensor, Tensor, Tensor]],
    block: Block,
    x: Tensor,
    rotary: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """`Block.before` in one kernel, where queries and keys are neither normed nor rotated."""
    if not _are_few(x):
        return otherwise(x, rotary)
    attn = block.attn
    q, k, v = attn.split(few_rows(x, attn.qkv.weight, attn.qkv.bias, _norm(block.norm1)))
    return q, k, v


def _after_of_few(
    few_rows: FewRows,
    otherwise: Callable[[Tensor, Tensor], Tensor],
    block: Block,
    x: Tensor,
    attended: Tensor,
) -> Tensor:
    """`Block.after` in three kernels."""
    if not _are_few(x):
        return otherwise(x, attended)
    proj, mlp = block.attn.proj, block.mlp
    x = few_rows(attended, proj.weight, proj.bias, residual=Residual(x, block.ls1.gamma))
    hidden = few_rows(x, mlp.fc1.weight, mlp.fc1.bias, _norm(block.norm2), gelu=True)
    return few_rows(hidden, mlp.fc2.weight, mlp.fc2.bias, residual=Residual(x, block.ls2.gamma))


def _are_few(x: Tensor) -> bool:
    """Rows for a kernel, which knows no gradients."""
    return 0 < x.shape[:-1].numel() <= FEW and not torch.is_grad_enabled()


def _norm(norm: nn.Module) -> Norm:
    assert isinstance(norm, LayerNorm)
    return Norm(norm.weight, norm.bias, norm.eps)
