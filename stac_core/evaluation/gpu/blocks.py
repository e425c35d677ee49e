"""Kernels of transformer blocks against float64, then time beside PyTorch, compiled between products."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from stac_core.evaluation.gpu.measure import Ceilings, median_ms, poisoned_memory
from stac_core.kernels import few_rows_torch, to_heads_torch
from stac_core.kernels.few_rows import FEW, FewRows
from stac_core.kernels.judge import Verdict
from stac_core.kernels.judge_blocks import (
    Map,
    judge_attend_within,
    judge_few_rows,
    judge_gelu,
    judge_to_heads,
    random_map,
    random_product,
)
from stac_core.kernels.select import BlockKernels

FRAME, HEADS, DIM, WIDEN = 1041, 16, 64, 4  # of the full-size network; hidden channels of an MLP per channel
SMALL = 30  # tokens of a frame
CHUNKS = (4, 1)
SHARP = 60  # makes queries so long that float32 does not hold the exponentials of logits
CAMERA_WIDTH, SMALL_WIDTH = 2048, 64
CAMERA_BLOCK = {  # channels of both sides per channel, what is done besides: the products of a camera head
    "qkv": (1, 3, "norm"),
    "proj": (1, 1, "residual"),
    "fc1": (1, WIDEN, "norm gelu"),
    "fc2": (WIDEN, 1, "residual"),
}
UNCACHED = 2**28  # bytes that no cache holds


def check(name: str, kernels: BlockKernels, device: torch.device) -> list[dict[str, object]]:
    """Twice-rule, poisoned outputs."""
    frame, awkward = _frame(device), [(2, 37, 3, 24), (1, 65, 2, 128), (1, 1, 1, 4)]
    rows: list[dict[str, object]] = []
    for shape in [(3, frame, HEADS, DIM), (1, 2 * frame, HEADS, DIM), *awkward]:
        for dtype in (torch.bfloat16, torch.float16):
            with poisoned_memory():
                verdicts = list(_verdicts(kernels, shape, dtype, device))
            case = f"{'×'.join(map(str, shape))} {dtype}"
            rows += [_row(name, case, verdict) for verdict in verdicts]
    return rows + list(_check_few_rows(name, kernels.few_rows, device))


def _check_few_rows(name: str, few_rows: FewRows, device: torch.device) -> Iterator[dict[str, object]]:
    """The products of a camera head, and awkward ones."""
    width = _camera_width(device)
    products = [(width * k, width * n, around) for k, n, around in CAMERA_BLOCK.values()]
    products += [(37, 5, "norm gelu residual"), (513, 33, "residual"), (1, 1, "")]
    for rows, (k, n, around) in itertools.product((*CHUNKS, 3, FEW), products):
        given = random_map(rows, k, n, around, device)
        with poisoned_memory():
            verdict = judge_few_rows(few_rows, given)
        yield _row(name, f"{rows}×{k}→{n} {around}", verdict)


def _row(name: str, case: str, verdict: Verdict) -> dict[str, object]:
    return {"backend": name, "case": case, **verdict._asdict(), "passed": verdict.passed}


def _verdicts(
    kernels: BlockKernels, shape: tuple[int, int, int, int], dtype: torch.dtype, device: torch.device
) -> Iterator[Verdict]:
    product = random_product(shape, dtype, device)
    yield from judge_to_heads(kernels.to_heads, product)
    q, k, v = kernels.to_heads(*product)
    for sharp in (1, SHARP):
        yield judge_attend_within(kernels.attend_within, q * sharp, k, v)
    yield judge_attend_within(kernels.attend_within, *_views(product.qkv, product.heads))
    yield judge_gelu(kernels.gelu_, product.qkv)


def time_all(kernels: BlockKernels, ceilings: Ceilings, device: torch.device) -> list[dict[str, object]]:
    """A chunk and a single frame of the full-size network, by hand and as the compiler has it."""
    rows: list[dict[str, object]] = []
    for frames in CHUNKS:
        for what, works in _works(kernels, frames, device).items():
            for variant, work in works.items():
                ms = median_ms(work, device, alone=True)
                rows.append({"variant": what, "by": variant, "frames": frames, "ms": ms})
        rows += _time_few_rows(kernels.few_rows, frames, ceilings, device)
    return rows


def _time_few_rows(
    few_rows: FewRows, frames: int, ceilings: Ceilings, device: torch.device
) -> Iterator[dict[str, object]]:
    """The products of a camera head; bytes = the weight, which comes from memory every time."""
    width = _camera_width(device)
    for what, (k, n, around) in CAMERA_BLOCK.items():
        given = random_map(frames, width * k, width * n, around, device)
        for variant, kernel in {"kernel": few_rows, "PyTorch": few_rows_torch.few_rows}.items():
            ms = median_ms(partial(_call_next, kernel, _uncached(given)), device, alone=True)
            rate = given.weight.nbytes / ms * 1e3
            yield {
                "variant": what, "by": variant, "frames": frames, "ms": ms, "tb_per_s": rate / 1e12,
                "of_roofline": rate / ceilings.copy_bytes_per_s,
            }  # fmt: skip


def _uncached(given: Map) -> Iterator[Map]:
    """The same with other weights in turn, more than a cache holds."""
    copies = UNCACHED // given.weight.nbytes if given.weight.device.type == "cuda" else 1
    weights = [given.weight.clone() for _ in range(copies)]
    return (given._replace(weight=weight) for weight in itertools.cycle(weights))


def _call_next(few_rows: FewRows, given: Iterator[Map]) -> Tensor:
    return few_rows(*next(given))


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


def _camera_width(device: torch.device) -> int:
    return CAMERA_WIDTH if device.type == "cuda" else SMALL_WIDTH


def _frame(device: torch.device) -> int:
    return FRAME if device.type == "cuda" else SMALL
