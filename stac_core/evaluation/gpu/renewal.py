"""Renewing anchors: the highest scores and their rows are the reference's; then time and bandwidth."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from stac_core.evaluation.gpu.measure import Ceilings, median_ms, poisoned_memory
from stac_core.kernels.highest import FindHighest
from stac_core.kernels.highest_torch import highest as reference_highest
from stac_core.kernels.select import Kernels
from stac_core.kernels.take import Take
from stac_core.kernels.take_torch import take as reference_take

LANES, FRAME, ANCHORS, LEAVING = 384, 1041, 2, 4  # of the full-size network: layers times heads; frames
DIM = 64
SMALL = (3, 30)  # lanes and tokens of a frame


def random_scores(lanes: int, n: int, device: torch.device) -> Tensor:
    """Many of them equal, some −∞, zeros of both signs."""
    score = torch.randn(lanes, n, device=device).mul(20).round().div(7)
    return score.masked_fill(torch.rand(lanes, n, device=device) < 0.1, -torch.inf)


def random_parts(lanes: int, lengths: tuple[int, ...], width: int, device: torch.device) -> list[Tensor]:
    """Random bits as bfloat16 in the midst of longer buffers."""
    return [
        torch.randint(-(2**15), 2**15, (lanes, n + 9, width), dtype=torch.int16, device=device)[:, 5 : n + 5]
        .view(torch.bfloat16)
        for n in lengths
    ]  # fmt: skip


def check_highest(name: str, highest: FindHighest, device: torch.device) -> list[dict[str, object]]:
    """Fresh random scores, poisoned outputs; `error` is how many places are not the reference's.

    It works on the host, whose sort surely takes zeros of both signs for equal.
    """
    lanes, frame = _shape(device)
    n, rows = (ANCHORS + LEAVING) * frame, []
    for columns, budget in ((n, ANCHORS * frame), (n, 0), (n, n), (frame + 1, n), (9000, 4097), (1, 1)):
        score = random_scores(lanes, columns, device)
        expected = reference_highest(score.cpu(), budget, True)
        with poisoned_memory():
            got = highest(score, budget, True)
            alone = highest(score, budget)
        assert got.rest is not None and expected.rest is not None
        pairs = [(got.places, expected.places), (got.rest, expected.rest), (alone.places, expected.places)]
        case = f"{budget} of {lanes}×{columns}"
        rows.append(_row(name, case, "highest", sum(_different(*pair) for pair in pairs)))
    return rows


def check_take(name: str, take: Take, device: torch.device) -> list[dict[str, object]]:
    """Fresh random bits, poisoned outputs; `error` is how many bytes are not the reference's."""
    lanes, frame = _shape(device)
    rows = []
    for lengths, width in (
        ((ANCHORS * frame, LEAVING * frame), DIM),
        ((frame,), DIM),
        ((0, frame, 3, 1), 2),
        ((7, 0, frame), 5),
        ((frame, frame), 1),
    ):
        parts = random_parts(lanes, lengths, width, device)
        places = torch.randint(sum(lengths), (lanes, ANCHORS * frame), device=device)
        expected = reference_take(parts, places)
        with poisoned_memory():
            got = take(parts, places)
        rows.append(_row(name, f"{lanes}×{lengths}×{width}", "take", _different(got, expected)))
    return rows


def time_all(
    backends: dict[str, Kernels], ceilings: Ceilings, device: torch.device
) -> list[dict[str, object]]:
    """One chunk of the full-size network; bytes = what is read and written, once each."""
    lanes, frame = _shape(device)
    n, budget = (ANCHORS + LEAVING) * frame, ANCHORS * frame
    score = torch.rand(lanes, n, device=device)
    parts = [torch.randn(lanes, f * frame, DIM, device=device).bfloat16() for f in (ANCHORS, LEAVING)]
    places = reference_highest(score, budget).places
    moved = {"highest": score.nbytes + lanes * n * 8, "take": places.nbytes + 2 * places.numel() * DIM * 2}
    rows: list[dict[str, object]] = []
    for name, kernels in backends.items():
        if name != "torch" and kernels.take is reference_take:
            continue  # it has none of its own
        works: dict[str, Callable[[], object]] = {
            "highest": partial(kernels.highest, score, budget, True),
            "take": partial(kernels.take, parts, places),
        }
        for what, work in works.items():
            ms = median_ms(work, device, alone=True)
            rate = moved[what] / ms * 1e3
            rows.append(
                {"backend": name, "variant": what, "ms": ms, "tb_per_s": rate / 1e12,
                 "of_roofline": rate / ceilings.copy_bytes_per_s}
            )  # fmt: skip
    return rows


def _shape(device: torch.device) -> tuple[int, int]:
    return (LANES, FRAME) if device.type == "cuda" else SMALL


def _different(got: Tensor, expected: Tensor) -> int:
    if (got.shape, got.dtype) != (expected.shape, expected.dtype):
        return max(1, expected.numel())
    mine, theirs = (x.contiguous().view(torch.int16) for x in (got.to(expected.device), expected))
    return int((mine != theirs).sum())


def _row(name: str, case: str, what: str, error: int) -> dict[str, object]:
    return {"backend": name, "case": case, "what": what, "error": float(error), "allowed": 0.0,
            "passed": error == 0}  # fmt: skip
