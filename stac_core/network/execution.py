"""How a network runs: operation by operation, compiled, or compiled and recorded. Decided here alone.

Compiled are the pieces of every block around its attention: norms, rotary embedding, layer scales and
residuals become part of few kernels, the matrix products stay the library's. Shapes are left open, so that
neither a shorter chunk nor another image size compiles again. Hand-written kernels, where there are any, take
the place of what the compiler would make (`by_hand.py`). The dense heads, too large to be compiled in
reasonable time, have kernels for all between their convolutions.
"""

from __future__ import annotations

import importlib
import logging
import time
from types import MethodType

import torch
import torch.nn.functional as F
from torch import Tensor

from stac_core.config import KernelConfig
from stac_core.kernels.few_rows import FEW
from stac_core.kernels.select import select_kernels
from stac_core.network.blocks import Block
from stac_core.network.by_hand import restore, use_kernels
from stac_core.network.causal_vggt import CausalVGGT
from stac_core.network.compiled import Backend, compiled
from stac_core.network.dense_head import DenseHead
from stac_core.network.maps import TorchMaps
from stac_core.network.recorded import CudaTape, RecordedForward
from stac_core.settings import in_one_line

EAGER, COMPILED, RECORDED = "eager", "compiled", "recorded"
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


def compile_blocks(network: CausalVGGT, backend: Backend = "inductor") -> None:
    """All blocks share two compiled functions; each kind of block is a variant of them."""
    before, after = (compiled(piece, backend) for piece in (Block.before, Block.after))
    for block in _blocks(network):
        block.before, block.after = MethodType(before, block), MethodType(after, block)  # type: ignore[method-assign]


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
    restore(network)
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
