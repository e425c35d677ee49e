"""What Triton would compile for a stream whose chunks and memory vary; print it as JSON, by what is called.

Run as a script, outside Triton's interpreter, by `test_kernels_launches.py`. Nothing is launched: of
every launch only that is kept by which Triton tells whether it has compiled such a kernel before.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from unittest import mock

import torch
from triton.backends.compiler import GPUTarget
from triton.compiler import make_backend
from triton.runtime.jit import JITFunction, create_function_from_signature

from stac_core.config import NETWORKS
from stac_core.kernels import (
    attend_triton,
    attend_within_triton,
    few_rows_triton,
    gather_triton,
    gelu_triton,
    highest_triton,
    launch_triton,
    slots_triton,
    take_triton,
    to_heads_triton,
)
from stac_core.kernels.attend import Segment
from stac_core.kernels.few_rows import Residual
from stac_core.kernels.gather import Page, Wanted
from stac_core.kernels.quantization import Codec
from stac_core.kernels.slots import Factor, SlotPage, Store
from stac_core.kernels.to_heads import Norm
from stac_core.network.dense_head import DenseHead, depth_activation
from stac_core.network.maps_triton import TritonMaps

HEADS, TOKENS, LONGEST = 16, 1041, 12 * 1041
PASSES = [  # frames of the chunk and of the past, the retrieved tokens
    (4, 0, 0), (4, 4, 0), (4, 9, 300),
    (1, 0, 0), (1, 1, 0), (2, 7, 0), (1, 3, 1), (1, 8, 16), (3, 9, 2082), (1, 12, 999),
]  # fmt: skip
BLOCKS = [(7, 15), (1, 15), (4, 1041), (1, 1041), (2, 1040), (3, 16), (1, 1)]  # frames, tokens of each
STORES = [(1, 8, 40), (2, 9, 41), (3, 16, 64), (9, 1000, 2082), (35, 17, 300)]  # pages, rows, wanted tokens

ANCHORS = [  # anchors, leaving tokens, budget
    (16, 1, 1), (0, 1041, 1000), (1041, 1041, 2082), (2082, 4164, 2082), (2082, 1, 2083), (9000, 64, 512),
]  # fmt: skip
FRAMES = [(1,), (2,), (4,), (8,), (3,), (7,), (5,), (6,)]
HEADS_OVER = [(7, 3, 5), (1, 3, 5), (4, 28, 37), (1, 28, 37), (5, 37, 16), (2, 1, 2)]  # frames, patches


@contextmanager
def noted() -> Iterator[list[str]]:
    """Launches inside `with`, none of which takes place."""
    seen: list[str] = []

    def note(kernel: JITFunction, *arguments: object, grid: object, warmup: bool, **options: object) -> None:
        backend = make_backend(GPUTarget("cuda", 90, 32))
        bind = create_function_from_signature(kernel.signature, kernel.params, backend)
        _, specialisation, _ = bind(*arguments, **options)
        seen.append(f"{kernel.__name__} {specialisation} {sorted(options.items())}")

    with (
        mock.patch.object(JITFunction, "run", note),
        mock.patch.object(attend_triton, "multiprocessors", lambda _: 132),
        mock.patch.object(attend_triton, "is_hopper", lambda _: True),
        mock.patch.object(launch_triton, "check_reachable"),
        mock.patch.object(gather_triton, "check_reachable"),
        mock.patch.object(highest_triton, "check_reachable"),
        mock.patch.object(slots_triton, "check_reachable"),
        mock.patch.object(take_triton, "check_reachable"),
        mock.patch.object(to_heads_triton, "check_reachable"),
        mock.patch.object(gelu_triton, "check_reachable"),
        mock.patch.object(few_rows_triton, "check_reachable"),
    ):
        yield seen


def attend_pass(frames: int, past: int, retrieved: int) -> None:
    """One pass of a layer."""

    def segment(tokens: int, bias: bool = False) -> Segment:
        long = torch.empty(2, HEADS, LONGEST, 64, dtype=torch.bfloat16)
        return Segment(*long[:, :, :tokens], torch.zeros(HEADS, tokens) if bias else None)

    q = torch.empty(HEADS, frames * TOKENS, 64, dtype=torch.bfloat16)
    lengths = [n for n in (past * TOKENS, frames * TOKENS) if n]
    segments = [*map(segment, lengths), *([segment(retrieved, True)] if retrieved else [])]
    attend_triton.attend(q, segments, True, 0.25)


def use_store(pages: int, rows: int, wanted: int) -> None:
    """All that is done with the slots of a store of 4 bits."""
    codec, lanes = Codec(4, 64, torch.bfloat16), 3
    fields = [torch.zeros(5, c.width, dtype=c.dtype) for c in codec.columns for _ in range(2)]
    store = Store([SlotPage(Page(*fields), torch.zeros(5, 3))] * pages, codec, 3)
    slots = torch.zeros(rows, 8, dtype=torch.int64)
    factor = Factor(torch.zeros(lanes, 64), torch.zeros(rows, dtype=torch.int64))
    content = slots_triton.read_slots(store, slots, factor)
    slots_triton.read_figures(store, slots)
    slots_triton.save_slots(store, slots.flatten())
    places, coded = torch.zeros(rows, dtype=torch.int64), torch.zeros(rows, 8, dtype=torch.bool)
    slots_triton.write_slots(store, slots, content, places, coded, factor)
    kind = Wanted(
        [page.tokens for page in store.pages], 4, torch.zeros(lanes, wanted, dtype=torch.int64),
        torch.zeros(lanes, wanted),
    )  # fmt: skip
    gather_triton.gather([kind], wanted, 64, torch.bfloat16, factor.of_lane)


def renew_anchors(anchors: int, leaving: int, budget: int) -> None:
    """Who stays and who leaves, and what is stored of them: numbers, codes and grids of codes."""
    score = torch.zeros(3, anchors + leaving)
    highest_triton.highest(score, budget)
    stay, leave = highest_triton.highest(score, budget, rest=True)
    assert leave is not None
    for dtype, width in ((torch.bfloat16, 64), (torch.uint8, 64), (torch.float16, 2)):
        own, window = (torch.zeros(3, 10_000, width, dtype=dtype) for _ in range(2))
        parts = [own[:, :anchors], window[:, anchors % 7 :][:, :leaving]]
        take_triton.take(parts if anchors else parts[1:], stay)
        take_triton.take(parts, leave[:, : budget + 1])


def pass_block(frames: int, tokens: int) -> None:
    """What is between the products of an encoder, a frame and a global block."""
    encoded = torch.zeros(frames, tokens, 3, HEADS, 64, dtype=torch.bfloat16)
    attend_within_triton.attend_within(*encoded.permute(2, 0, 3, 1, 4))
    norm = Norm(torch.ones(64), torch.zeros(64), 1e-5)
    for batch, length in ((frames, tokens), (1, frames * tokens)):
        qkv = torch.zeros(batch, length, 3 * HEADS * 64, dtype=torch.bfloat16)
        heads = to_heads_triton.to_heads(qkv, HEADS, norm, norm, torch.zeros(2, length, 64))
        attend_within_triton.attend_within(*heads)
        gelu_triton.gelu_(torch.zeros(batch, length, 4 * HEADS * 64, dtype=torch.bfloat16))


def pass_camera_block(frames: int) -> None:
    """The products of a full-size camera head."""
    width = 2 * HEADS * 64
    norm = Norm(torch.ones(width), torch.zeros(width), 1e-5)
    x = torch.zeros(1, frames, width)
    residual = Residual(x, norm.weight)
    few_rows_triton.few_rows(x, torch.empty(3 * width, width), torch.zeros(3 * width), norm)
    few_rows_triton.few_rows(x, torch.empty(width, width), norm.bias, residual=residual)
    hidden = few_rows_triton.few_rows(
        x, torch.empty(4 * width, width), torch.zeros(4 * width), norm, gelu=True
    )
    few_rows_triton.few_rows(hidden, torch.empty(width, 4 * width), norm.bias, residual=residual)


@torch.inference_mode()
def dense_head(frames: int, rows: int, columns: int) -> None:
    """The full-size depth head, without contents."""
    row = NETWORKS["stream3r"]
    with torch.device("meta"):
        head = DenseHead(row, 1, depth_activation).to(memory_format=torch.channels_last)
        layers = [torch.empty(1, frames, rows * columns + 5, 2 * row.width) for _ in range(4)]
    head.maps = TritonMaps()
    head(layers, rows * row.patch_size, columns * row.patch_size)


CALLS = {
    "passes": (attend_pass, PASSES), "stores": (use_store, STORES), "anchors": (renew_anchors, ANCHORS),
    "blocks": (pass_block, BLOCKS), "heads": (dense_head, HEADS_OVER), "camera": (pass_camera_block, FRAMES),
}  # fmt: skip


def launched_by(call: Callable[..., None], case: tuple[int, ...]) -> list[str]:
    with noted() as seen:
        call(*case)
    return seen


if __name__ == "__main__":
    series = CALLS.items()
    print(json.dumps({of: [launched_by(call, case) for case in cases] for of, (call, cases) in series}))
