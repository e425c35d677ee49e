"""Voxel merge: every backend decides like the reference; then time and bandwidth."""

from __future__ import annotations

from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from stac_core.evaluation.gpu.measure import Ceilings, median_ms, poisoned_memory
from stac_core.kernels.random_merges import RULES, decisive, empty_state, in_16_bits, random_tokens
from stac_core.kernels.voxel_merge import RowState, RowTokens, VoxelMerge
from stac_core.kernels.voxel_merge_rows import group_by_row
from stac_core.kernels.voxel_merge_torch import voxel_merge as reference

PIVOTS, BUFFER, DIM = 4, 8, 64
TOKENS_PER_ROW = 10  # 4 frames of 1041 tokens fall into about 400 voxels


def check(name: str, merge: VoxelMerge, device: torch.device, rows: int) -> list[dict[str, object]]:
    """Three calls in a row on fresh random tokens: equal counts and members, floats within 1e-4.

    The tokens of the second one have 16 bits.
    """
    seed = int(torch.randint(2**31, ()))
    state = _to(empty_state(rows, PIVOTS, BUFFER, DIM), device)
    results: list[dict[str, object]] = []
    for call in range(3):
        tokens = _to(random_tokens(rows, rows * TOKENS_PER_ROW, DIM, seed + call), device)
        tokens = decisive(state, in_16_bits(tokens) if call == 1 else tokens)
        with poisoned_memory():
            got, counts = merge(state, tokens, RULES)
        expected, true_counts = reference(state, tokens, RULES)
        same = torch.equal(counts, true_counts) and torch.equal(got.members, expected.members)
        error = _largest_difference(got, expected) if same else float("inf")
        case = f"{rows} rows, call {call}, seed {seed}"
        results.append(
            {"backend": name, "case": case, "what": "merge", "error": error, "allowed": 1e-4,
             "passed": error <= 1e-4}
        )  # fmt: skip
        state = expected
    return results


class Problem(NamedTuple):
    """One timed merge."""

    state: RowState
    tokens: RowTokens

    @property
    def bytes(self) -> int:
        """State read and written once, tokens read once."""
        return 2 * sum(part.nbytes for part in self.state) + sum(part.nbytes for part in self.tokens)


def problem(rows: int, device: torch.device) -> Problem:
    """The third chunk of a stream that looks at the same voxels, tokens spread evenly over the rows.

    They have 16 bits, as a stream hands them over.
    """
    state = _to(empty_state(rows, PIVOTS, BUFFER, DIM), device)
    directions = torch.randn(rows, 3, DIM, device=device)
    for _ in range(2):
        state, _ = reference(state, _even_tokens(directions), RULES)
    return Problem(state, in_16_bits(_even_tokens(directions)))


def _even_tokens(directions: Tensor) -> RowTokens:
    """Like `random_tokens`, made on the device, and no row gets many more than the others."""
    rows, kinds, dim = directions.shape
    count, device = rows * TOKENS_PER_ROW, directions.device
    row = torch.randint(rows, (count,), device=device)
    noise = torch.randn(count, dim, device=device) * torch.rand(count, 1, device=device)
    keys = directions[row, torch.randint(kinds, (count,), device=device)] + noise
    score = torch.rand(count, device=device) ** 2
    return group_by_row(row, rows, keys, torch.randn(count, dim, device=device), score)


def time_all(
    backends: dict[str, VoxelMerge], rows: int, ceilings: Ceilings, device: torch.device
) -> list[dict[str, object]]:
    """Merge one chunk into rows that have seen two; also with the same tokens in 32 bits."""
    state, tokens = problem(rows, device)
    longer = tokens._replace(keys=tokens.keys.float(), values=tokens.values.float())
    problems = {16: Problem(state, tokens), 32: Problem(state, longer)}
    return [row for bits, timed in problems.items() for row in _time(backends, timed, bits, ceilings, device)]


def _time(
    backends: dict[str, VoxelMerge], timed: Problem, bits: int, ceilings: Ceilings, device: torch.device
) -> list[dict[str, object]]:
    """The reference with its launches, which are part of what it costs; kernels alone."""
    state, tokens, moved = timed.state, timed.tokens, timed.bytes
    times = {"torch": median_ms(partial(reference, state, tokens, RULES), device, 5)}
    for name, merge in backends.items():
        times[name] = median_ms(partial(merge, state, tokens, RULES), device, 20, alone=True)
    return [
        {
            "backend": name,
            "token_bits": bits,
            "rows": len(state.weight),
            "tokens": len(tokens.order),
            "ms": ms,
            "speed_up": times["torch"] / ms,
            "tb_per_s": moved / ms / 1e9,
            "of_roofline": moved / ms * 1e3 / ceilings.copy_bytes_per_s,
        }
        for name, ms in times.items()
    ]


def _largest_difference(got: RowState, expected: RowState) -> float:
    """Over what is present; the rest has no meaning. NaN stays NaN."""
    largest = [torch.zeros((), device=expected.members.device)]
    for name, mine, theirs in zip(got._fields, got, expected, strict=True):
        present = expected.buffer_score.isfinite() if name.startswith("buffer") else expected.members > 0
        if bool(present.any()):
            difference = (mine[present] - theirs[present]).abs() / (1 + theirs[present].abs())
            largest.append(difference.max())
    return float(torch.stack(largest).max())


def _to(parts: RowState | RowTokens, device: torch.device):  # type: ignore[no-untyped-def]
    return type(parts)(*(part.to(device) for part in parts))
