"""Attention with split keys: right in any number of parts, and whether the chosen number is the best one."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import partial
from unittest import mock

import torch
from torch import Tensor

from stac_core.evaluation.gpu import attention
from stac_core.evaluation.gpu.attention import FRAME, LIVE, Size, live_inputs
from stac_core.evaluation.gpu.measure import Ceilings, median_ms
from stac_core.evaluation.gpu.report import Rows
from stac_core.kernels import attend_triton
from stac_core.kernels.attend import AnySegment, Attend, Attended
from stac_core.kernels.attend_split_triton import MOST_PARTS

CHECKED, TIMED = (2, 3, MOST_PARTS), (1, 2, 3, 4)  # numbers of parts
SMALL = (3, (1,), (1, 2))  # tokens of a frame, chunks, parts, where nothing is timed


def attend_in(parts: int) -> Attend:
    """The Triton kernels, with the keys of every launch in so many parts."""

    def attend(
        q: Tensor, segments: Sequence[AnySegment], mass: bool = False, subsample: float = 1.0
    ) -> Attended:
        with mock.patch.object(attend_triton, "choose_parts", lambda *_: parts):
            return attend_triton.attend(q, segments, mass, subsample)

    return attend


def check(device: torch.device) -> Rows:
    """All cases of `attention.check`, in parts."""
    rows = []
    for parts in CHECKED if device.type == "cuda" else CHECKED[1:2]:
        for row in attention.check("triton", attend_in(parts), device):
            rows.append({**row, "case": f"{row['case']} in {parts} parts"})
    return rows


def time_parts(
    ceilings: Ceilings,
    device: torch.device,
    frame: int = FRAME,
    chunks: Iterable[int] = (1, 4),
    tried: Iterable[int] = TIMED,
) -> Rows:
    """The forward pass of one layer of a stream, its keys in some numbers of parts and in the chosen one.

    All times are the device's alone; `against_best`: against the best number tried for the same inputs.
    """
    rows = []
    for storage, bits in LIVE:
        for chunk in chunks:
            q, segments = live_inputs(chunk, bits, device, frame)
            chosen = chosen_parts(q, segments)
            works = {
                parts: partial(attend_triton._forward, q, segments, parts=parts)
                for parts in sorted({*tried, chosen})
            }
            times = {parts: median_ms(work, device, alone=True) for parts, work in works.items()}
            flop = Size(16, q.shape[1], sum(s.length for s in segments), 64).flop(0)
            for parts, ms in times.items():
                row = {"chunk": chunk, "storage": storage, "parts": parts, "chosen": parts == chosen}
                rate = flop / ms * 1e3 / ceilings.matmul_flop_per_s
                row |= {"device_ms": ms, "against_best": ms / min(times.values()), "of_roofline": rate}
                rows.append(row)
    return rows


def chosen_parts(q: Tensor, segments: list[AnySegment]) -> int:
    """What `attend` takes for these inputs."""
    with mock.patch.object(attend_triton, "choose_parts", wraps=attend_triton.choose_parts) as choice:
        attend_triton._forward(q, segments)
    return attend_triton.choose_parts(*choice.call_args.args)
