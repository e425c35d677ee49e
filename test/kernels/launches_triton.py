"""What Triton would compile for a stream whose chunks and memory vary; print one JSON line per pass.

Run as a script, outside Triton's interpreter, by `test_kernels_attend_split.py`. Nothing is launched: of
every launch only that is kept by which Triton tells whether it has compiled such a kernel before.
"""

from __future__ import annotations

import json
from unittest import mock

import torch
from triton.backends.compiler import GPUTarget
from triton.compiler import make_backend
from triton.runtime.jit import JITFunction, create_function_from_signature

from stac_core.kernels import attend_triton
from stac_core.kernels.attend import Segment

HEADS, TOKENS, LONGEST = 16, 1041, 12 * 1041
PASSES = [  # frames of the chunk and of the past, the retrieved tokens
    (4, 0, 0), (4, 4, 0), (4, 9, 300),
    (1, 0, 0), (1, 1, 0), (2, 7, 0), (1, 3, 1), (1, 8, 16), (3, 9, 2082), (1, 12, 999),
]  # fmt: skip


def launches(frames: int, past: int, retrieved: int) -> list[str]:
    """One pass of a layer: the kernels, as far as Triton tells them apart."""
    seen = []

    def note(kernel: JITFunction, *arguments: object, grid: object, warmup: bool, **options: object) -> None:
        backend = make_backend(GPUTarget("cuda", 90, 32))
        bind = create_function_from_signature(kernel.signature, kernel.params, backend)
        _, specialisation, _ = bind(*arguments, **options)
        seen.append(f"{kernel.__name__} {specialisation} {sorted(options.items())}")

    def segment(tokens: int, bias: bool = False) -> Segment:
        long = torch.empty(2, HEADS, LONGEST, 64, dtype=torch.bfloat16)
        return Segment(*long[:, :, :tokens], torch.zeros(HEADS, tokens) if bias else None)

    q = torch.empty(HEADS, frames * TOKENS, 64, dtype=torch.bfloat16)
    lengths = [n for n in (past * TOKENS, frames * TOKENS) if n]
    segments = [*map(segment, lengths), *([segment(retrieved, True)] if retrieved else [])]
    with (
        mock.patch.object(JITFunction, "run", note),
        mock.patch.object(attend_triton, "multiprocessors", lambda _: 132),
        mock.patch.object(attend_triton, "is_hopper", lambda _: True),
        mock.patch.object(attend_triton, "check_reachable"),
    ):
        attend_triton.attend(q, segments, True, 0.25)
    return seen


if __name__ == "__main__":
    for one in PASSES:
        print(json.dumps(launches(*one)), flush=True)
