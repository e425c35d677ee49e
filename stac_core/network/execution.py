"""How a network runs: operation by operation, compiled, or compiled and recorded. Decided here alone.

Compiled are the pieces of every block around its attention: norms, rotary embedding, layer scales and
residuals become part of few kernels, the matrix products stay the library's. Shapes are left open, so that
neither a shorter chunk nor another image size compiles again. In 16 bits hand-written kernels, where there
are any, take the place of what the compiler would make between the products: of norm and rotation of all
heads, of attention within frames, of the activation. The camera head stays in 32 bits and has a few rows
only: there one kernel multiplies and does what stands before and behind. The dense heads, too large to be
compiled in reasonable time, have kernels for all between their convolutions.
"""

from __future__ import annotations

import importlib
import inspect
import logging
import time
from collections.abc import Callable
from functools import partial
from types import MethodType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from stac_core.config import KernelConfig
from stac_core.kernels.few_rows import FEW, FewRows, Residual
from stac_core.kernels.gelu import Gelu
from stac_core.kernels.select import BlockKernels, select_kernels
from stac_core.kernels.to_heads import Norm, ToHeads
from stac_core.network.blocks import Block, LayerNorm
from stac_core.network.causal_vggt import CausalVGGT
from stac_core.network.dense_head import DenseHead
from stac_core.network.maps import TorchMaps
from stac_core.network.recorded import CudaTape, RecordedForward
from stac_core.settings import in_one_line

EAGER, COMPILED, RECORDED = "eager", "compiled", "recorded"
MOST_VARIANTS = 64  # of one piece in one process: widths, precisions, one frame or several, threads
PROBE_PATCHES = (2, 5)  # rows, columns
PROBE_FRAMES = (FEW + 1, 1)  # 9 is no number of heads: equal sizes would be taken for one

logger = logging.getLogger(__name__)


def choose_execution(setting: str, device: torch.device) -> str:
    """auto = recorded on a GPU, eager elsewhere. ValueError for recorded without a GPU."""
    if setting == "auto":
        return RECORDED if device.type == "cuda" else EAGER
    if setting == RECORDED and device.type != "cuda":
        raise ValueError(
            f"model.execution = 'recorded' needs a GPU, this is {device.type!r}; use compiled or eager"
        )
    return setting


def prepare(network: CausalVGGT, setting: str, kernels: KernelConfig | None = None) -> str:
    """Let a network on its device run as `model.execution` says; → what it came to.

    kernels: which may take the place of compiled pieces; as by default where nothing is said.
    Compiles at once, which takes a minute at the first start on a machine and seconds later. What cannot be
    had is a RuntimeError with cause and cure where it was asked for, and a warning under `auto`.
    """
    device = next(network.parameters()).device
    execution = choose_execution(setting, device)
    if execution == EAGER:
        return EAGER
    by_hand = select_kernels((kernels or KernelConfig()).backend, device).blocks
    logger.info("compiling the network: up to a few minutes at the first start, less later")
    started = time.monotonic()
    try:
        compile_blocks(network)
        if by_hand is not None:
            use_kernels(network, by_hand)
        if device.type == "cuda":
            fuse_heads(network)
        if execution == RECORDED:
            record(network)
        probe(network)
    except Exception as cause:  # compilers fail in any way
        undo(network)
        text = f"{execution} execution does not work here ({in_one_line(cause)})"
        if setting != "auto":
            raise RuntimeError(f"model.execution = {setting!r}: {text}; use eager") from cause
        logger.warning("%s: the network runs eagerly, and slower", text)
        return EAGER
    logger.info("%s in %.1f s", execution, time.monotonic() - started)
    return execution


def compile_blocks(network: CausalVGGT, backend: str | Callable[..., Any] = "inductor") -> None:
    """All blocks share two compiled functions; each kind of block is a variant of them."""
    before, after = (_compiled(piece, backend) for piece in (Block.before, Block.after))
    for block in _blocks(network):
        block.before, block.after = MethodType(before, block), MethodType(after, block)  # type: ignore[method-assign]


def use_kernels(
    network: CausalVGGT, kernels: BlockKernels, backend: str | Callable[..., Any] = "inductor"
) -> None:
    """What `compile_blocks` has made of blocks in 16 bits is cut where a kernel comes in between."""
    product, widen, narrow = (
        _compiled(piece, backend) for piece in (Block.product, Block.widen, Block.narrow)
    )
    for block in _blocks(network):
        if block.attn.qkv.weight.dtype in (torch.bfloat16, torch.float16):
            block.attend_within = kernels.attend_within
            block.after = partial(_after, widen, kernels.gelu_, narrow, block)  # type: ignore[method-assign]
            if isinstance(block.attn.q_norm, LayerNorm):
                block.before = partial(_before, product, kernels.to_heads, block)  # type: ignore[method-assign]
    use_few_rows(network, kernels.few_rows)


def _before(
    product: Callable[[Block, Tensor], Tensor], to_heads: ToHeads, block: Block, x: Tensor, rotary: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """`Block.before` with a kernel behind its compiled product."""
    attn = block.attn
    return to_heads(product(block, x), attn.heads, _norm(attn.q_norm), _norm(attn.k_norm), rotary)


def _after(
    widen: Callable[[Block, Tensor, Tensor], tuple[Tensor, Tensor]],
    gelu_: Gelu,
    narrow: Callable[[Block, Tensor, Tensor], Tensor],
    block: Block,
    x: Tensor,
    attended: Tensor,
) -> Tensor:
    """`Block.after` with a kernel between two compiled pieces."""
    x, hidden = widen(block, x, attended)
    return narrow(block, x, gelu_(hidden))


def use_few_rows(network: CausalVGGT, few_rows: FewRows) -> None:
    """In the camera head, in 32 bits: of few rows a kernel makes what pieces, as they are now, do of more."""
    steering = _steering(network)
    if steering.weight.dtype != torch.float32:
        return
    steering.forward = partial(_linear_of_few, few_rows, steering.forward, steering)  # type: ignore[method-assign]
    for module in network.camera_head.trunk:
        block: Any = module
        block.before = partial(_before_of_few, few_rows, block.before, block)
        block.after = partial(_after_of_few, few_rows, block.after, block)


def _steering(network: CausalVGGT) -> nn.Linear:
    """The one large linear layer of the camera head outside its trunk."""
    linear = network.camera_head.poseLN_modulation[1]
    assert isinstance(linear, nn.Linear)
    return linear


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
    product = few_rows(x, attn.qkv.weight, attn.qkv.bias, _norm(block.norm1))
    q, k, v = product.unflatten(-1, (3, attn.heads, -1)).permute(2, 0, 3, 1, 4)
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


def _compiled(piece: Callable[..., Any], backend: str | Callable[..., Any]) -> Callable[..., Any]:
    limit = _allow_variants()
    return torch.compile(piece, backend=backend, fullgraph=True, dynamic=True, **limit)  # type: ignore[call-overload]


def _allow_variants() -> dict[str, int]:
    """What `torch.compile` takes so that no variant is refused; older versions have a setting instead."""
    if "recompile_limit" in inspect.signature(torch.compile).parameters:
        return {"recompile_limit": MOST_VARIANTS}
    dynamo: Any = importlib.import_module("torch._dynamo.config")
    dynamo.recompile_limit = max(MOST_VARIANTS, dynamo.recompile_limit)
    return {}


def fuse_heads(network: CausalVGGT) -> None:
    """All that follows a convolution in one kernel, and the weights in the order that this is for."""
    maps = importlib.import_module("stac_core.network.maps_triton").TritonMaps()  # needs Triton
    for head in _heads(network):
        head.use(maps, torch.channels_last)


def record(network: CausalVGGT) -> None:
    """Replay the network's passes as CUDA graphs from now on."""
    tape = CudaTape(next(network.parameters()).device)
    network.forward = RecordedForward(network, tape)  # type: ignore[method-assign]
    network.foresee = network.forward.foresee  # type: ignore[method-assign]


def undo(network: CausalVGGT) -> None:
    """Back to running operation by operation."""
    for block in _blocks(network):
        for piece in ("before", "attend_within", "after"):
            block.__dict__.pop(piece, None)
    _steering(network).__dict__.pop("forward", None)
    for head in _heads(network):
        head.use(TorchMaps(), torch.contiguous_format)
    stop_recording(network)


def stop_recording(network: CausalVGGT) -> None:
    """Compiled blocks and fused heads stay as they are."""
    for method in ("forward", "foresee"):
        network.__dict__.pop(method, None)


@torch.inference_mode()
def probe(network: CausalVGGT) -> None:
    """Run every kind of piece, first with several frames, then with one; twice, to record and to replay.

    RuntimeError where passes should be recorded and cannot, or where a replay says something else.
    """
    rows, columns = (patches * network.config.patch_size for patches in PROBE_PATCHES)
    device = next(network.parameters()).device
    for frames in PROBE_FRAMES:
        dark, noise = torch.zeros(2, 1, frames, 3, rows, columns, device=device)
        noise.uniform_()
        network(dark, WithoutPast())
        if isinstance(network.forward, RecordedForward):
            network.forward.check(noise, WithoutPast())
        else:
            network(noise, WithoutPast())


class WithoutPast:
    """A context without a past, for passes whose result nobody reads."""

    frames_seen = 1

    def begin(self, frames: int, tokens_per_frame: int) -> None:
        pass

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(q, k, v)

    def attend_camera(self, iteration: int, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(q, k, v)


def _blocks(network: CausalVGGT) -> list[Block]:
    return [module for module in network.modules() if isinstance(module, Block)]


def _heads(network: CausalVGGT) -> list[DenseHead]:
    return [network.depth_head, network.point_head]
