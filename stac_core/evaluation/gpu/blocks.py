"""Between the products of a transformer block: kernels against float64, then time beside compiled PyTorch."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from stac_core.evaluation.gpu.measure import median_ms, poisoned_memory
from stac_core.kernels import to_heads_torch
from stac_core.kernels.judge import Verdict
from stac_core.kernels.judge_blocks import judge_attend_within, judge_gelu, judge_to_heads, random_product
from stac_core.kernels.select import BlockKernels

FRAME, HEADS, DIM, WIDEN = 1041, 16, 64, 4  # of the full-size network; hidden channels of an MLP per channel
SMALL = 30  # tokens of a frame
CHUNKS = (4, 1)


def check(name: str, kernels: BlockKernels, device: torch.device) -> list[dict[str, object]]:
    """Twice-rule, poisoned outputs."""
    frame, awkward = _frame(device), [(2, 37, 3, 24), (1, 65, 2, 128), (1, 1, 1, 4)]
    rows: list[dict[str, object]] = []
    for shape in [(3, frame, HEADS, DIM), (1, 2 * frame, HEADS, DIM), *awkward]:
        for dtype in (torch.bfloat16, torch.float16):
            with poisoned_memory():
                verdicts = list(_verdicts(kernels, shape, dtype, device))
            case = f"{'×'.join(map(str, shape))} {dtype}"
            rows += [
                {"backend": name, "case": case, **verdict._asdict(), "passed": verdict.passed}
                for verdict in verdicts
            ]
    return rows


def _verdicts(
    kernels: BlockKernels, shape: tuple[int, int, int, int], dtype: torch.dtype, device: torch.device
) -> Iterator[Verdict]:
    product = random_product(shape, dtype, device)
    yield from judge_to_heads(kernels.to_heads, product)
    yield judge_attend_within(kernels.attend_within, *kernels.to_heads(*product))
    yield judge_attend_within(kernels.attend_within, *_views(product.qkv, product.heads))
    yield judge_gelu(kernels.gelu_, product.qkv)


def time_all(kernels: BlockKernels, device: torch.device) -> list[dict[str, object]]:
    """A chunk and a single frame of the full-size network, by hand and as the compiler has it."""
    rows: list[dict[str, object]] = []
    for frames in CHUNKS:
        for what, works in _works(kernels, frames, device).items():
            for variant, work in works.items():
                ms = median_ms(work, device, alone=True)
                rows.append({"variant": what, "by": variant, "frames": frames, "ms": ms})
    return rows


def _works(
    kernels: BlockKernels, frames: int, device: torch.device
) -> dict[str, dict[str, Callable[[], object]]]:
    compiled = torch.compile if device.type == "cuda" else _as_it_is
    product = random_product((frames, _frame(device), HEADS, DIM), torch.bfloat16, device)
    views = _views(product.qkv, HEADS)
    hidden = torch.randn(frames, _frame(device), WIDEN * HEADS * DIM, device=device).bfloat16()
    return {
        "to_heads": {
            "kernel": partial(kernels.to_heads, *product),
            "PyTorch": partial(compiled(to_heads_torch.to_heads, dynamic=True), *product),
        },
        "attend_within": {
            "kernel": partial(kernels.attend_within, *views),
            "PyTorch": partial(F.scaled_dot_product_attention, *views),
        },
        "gelu": {
            "kernel": partial(kernels.gelu_, hidden),
            "PyTorch": partial(compiled(F.gelu, dynamic=True), hidden),
        },
    }


def _as_it_is(function: Callable[..., object], dynamic: bool) -> Callable[..., object]:
    return function


def _views(qkv: Tensor, heads: int) -> Tensor:
    """q, k and v [3, B, heads, T, D] where they lie in a product."""
    return qkv.unflatten(-1, (3, heads, -1)).permute(2, 0, 3, 1, 4)


def _frame(device: torch.device) -> int:
    return FRAME if device.type == "cuda" else SMALL
