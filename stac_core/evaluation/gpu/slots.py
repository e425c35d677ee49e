"""Moving tokens between slots and rows: what the kernels read, save and write is what the reference does."""

from __future__ import annotations

import torch

from stac_core.evaluation.gpu.measure import poisoned_memory
from stac_core.kernels.judge_slots import judge_slots, move
from stac_core.kernels.random_slots import SlotCase, random_problem
from stac_core.kernels.slots import SlotKernels

# sizes of pages, bits, rows, slots per row, dim, dtype, figures, factor
CASES = [
    SlotCase((3000, 1, 500), 16, 400, 8, 64, torch.bfloat16, 3, True),
    SlotCase((40,), 16, 9, 4, 64, torch.float16, 3, False),
    SlotCase((5, 30, 2), 16, 7, 8, 20, torch.float32, 1, True),
    SlotCase((3000, 5, 700), 8, 400, 8, 64, torch.bfloat16, 5, True),
    SlotCase(range(1, 36), 8, 60, 8, 130, torch.float32, 3, True),
    SlotCase((3000, 2), 4, 700, 4, 64, torch.bfloat16, 3, False),
    SlotCase((1500, 800), 4, 300, 8, 96, torch.float16, 1, True),
    SlotCase((12,), 4, 2, 4, 6, torch.float32, 2, False),
]
SMALL_CASES = [  # Triton's interpreter cuts numbers to bfloat16 where the device rounds them
    SlotCase((5, 30, 2), 16, 7, 8, 20, torch.float32, 3, True),
    SlotCase((9, 12), 8, 5, 4, 64, torch.bfloat16, 3, True),
    SlotCase((12, 4, 3), 4, 5, 4, 6, torch.float16, 1, False),
]


def check(name: str, kernels: SlotKernels, device: torch.device) -> list[dict[str, object]]:
    """Fresh random stores, poisoned outputs: stored bytes equal, numbers read within two roundings."""
    rows = []
    for case in CASES if device.type == "cuda" else SMALL_CASES:
        seed = int(torch.randint(2**31, ()))
        problem = random_problem(case, seed)
        with poisoned_memory():
            got = move(kernels, problem.copy_to(device))
        shape = f"{case.rows}×{case.width}×{case.dim}, {case.bits} bits, {len(case.sizes)} pages, seed {seed}"
        for verdict in judge_slots(problem, got):
            rows.append({"backend": name, "case": shape, **verdict._asdict(), "passed": verdict.passed})
    return rows
