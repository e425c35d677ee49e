"""Command: time the Triton kernels over their launch parameters, fastest first (`--sweep` of the benchmark).

What this finds on a device is written into the kernels by hand: they are not tuned at run time, so that
runs repeat.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from unittest import mock

import torch

from stac_core.evaluation.gpu import split
from stac_core.evaluation.gpu.attention import FRAME, Size, flash, random_inputs
from stac_core.evaluation.gpu.measure import Ceilings, median_ms
from stac_core.evaluation.gpu.merging import problem
from stac_core.evaluation.gpu.report import Report, Rows
from stac_core.evaluation.gpu.stages import MASS_SHARE
from stac_core.kernels import attend_triton, mass_triton, voxel_merge_triton
from stac_core.kernels.attend import Segment, sample_queries
from stac_core.kernels.attend_split_triton import MOST_PARTS
from stac_core.kernels.launch_triton import Tile
from stac_core.kernels.random_merges import RULES

REPEATS = 15
Works = dict[Tile, Callable[[], object]]
FORWARD = list(
    itertools.starmap(
        Tile,  # queries, keys, warps, stages
        (
            (128, 64, 8, 3), (128, 64, 8, 2), (128, 64, 8, 4), (128, 64, 4, 2), (128, 64, 4, 3),
            (128, 128, 8, 2), (128, 128, 8, 3), (64, 64, 4, 2), (64, 64, 4, 3), (64, 64, 4, 4),
            (64, 128, 4, 2), (64, 128, 4, 3), (128, 32, 4, 3), (256, 64, 8, 2),
        ),
    )
)  # fmt: skip
MASS = list(
    itertools.starmap(
        Tile,
        (
            (64, 128, 8, 3), (64, 128, 4, 3), (64, 128, 4, 2), (128, 128, 8, 3), (128, 128, 8, 2),
            (128, 64, 4, 3), (128, 64, 4, 2), (64, 64, 4, 3), (64, 64, 4, 4), (64, 256, 8, 3),
            (128, 256, 8, 2), (32, 128, 4, 4),
        ),
    )
)  # fmt: skip
MERGE = (  # tokens, warps, registers
    (4, 1, 80), (4, 1, 96), (8, 1, 80), (8, 1, 96), (8, 1, 104), (8, 1, 112), (8, 1, 128), (8, 1, 168),
    (16, 1, 112), (16, 1, 168), (8, 2, 80), (16, 2, 96),
)  # fmt: skip


def run(
    report: Report,
    ceilings: Ceilings,
    device: torch.device,
    size: Size,
    merge_rows: int,
    parts: Sequence[str],
) -> None:
    """Every kernel that is asked for; `ratio` is against PyTorch's flash attention."""
    q, (segment,) = random_inputs(
        size.rows, size.queries, ((size.keys, 16),), size.dim, torch.bfloat16, device
    )
    assert isinstance(segment, Segment)
    bare = Segment(segment.keys, segment.values)
    baseline = median_ms(partial(flash, q, bare), device)
    if "forward" in parts:
        for name, one in (("with bias", segment), ("without bias", bare)):
            works: Works = {tile: partial(attend_triton._forward, q, [one], tile, 1) for tile in FORWARD}
            work = partial(_tiles, works, baseline, device)
            report.part(f"sweep forward {name}", f"Forward {name}", work)
    if "mass" in parts:
        _, lse = attend_triton._forward(q, [segment])
        for share in (1.0, MASS_SHARE):
            rows, stride, scale = sample_queries(size.queries, share)
            sampled = slice(0, rows * stride, stride)
            arguments = q[:, sampled], [segment], lse[:, sampled], scale
            works = {tile: partial(mass_triton.mass_of, *arguments, tile) for tile in MASS}
            work = partial(_tiles, works, baseline, device)
            report.part(f"sweep mass {share}", f"Mass of {rows} queries", work)
    if "parts" in parts:
        sizes = (FRAME, (1, 2, 3, 4), range(1, MOST_PARTS + 1)) if device.type == "cuda" else split.SMALL
        work = partial(split.time_parts, ceilings, device, *sizes)
        report.part("sweep parts", "Forward by frames of a chunk and parts of the keys", work)
    if "merge" in parts:
        report.part("sweep merge", "Voxel merge", partial(_merges, merge_rows, ceilings, device))


def _tiles(works: Works, baseline: float, device: torch.device) -> Rows:
    rows = []
    for tile, work in works.items():
        ms, error = _try(work, device)
        rows.append({**tile._asdict(), "ms": ms, "ratio": ms / baseline, "error": error})
    return _fastest_first(rows)


def _merges(rows: int, ceilings: Ceilings, device: torch.device) -> Rows:
    """The whole call; the tokens come sorted by row."""
    timed = problem(rows, device)
    results: Rows = []
    for merged, warps, registers in MERGE:
        parameters = {"TOKENS": merged, "WARPS": warps, "REGISTERS": registers}
        with mock.patch.multiple(voxel_merge_triton, **parameters):  # type: ignore[call-overload]
            work = partial(voxel_merge_triton.voxel_merge, timed.state, timed.tokens, RULES)
            ms, error = _try(work, device)
        share = timed.bytes / ms * 1e3 / ceilings.copy_bytes_per_s
        results.append(
            {"tokens": merged, "warps": warps, "registers": registers, "ms": ms, "of_roofline": share,
             "error": error}
        )  # fmt: skip
    return _fastest_first(results)


def _try(work: Callable[[], object], device: torch.device) -> tuple[float, str]:
    """Milliseconds, or NaN and why not."""
    try:
        return median_ms(work, device, REPEATS), ""
    except Exception as error:  # a candidate that asks for too much must not end the sweep
        if device.type == "cuda":
            torch.cuda.synchronize(device)  # raises where the GPU is lost
        return float("nan"), f"{type(error).__name__}: {error}".splitlines()[0][:80]


def _fastest_first(rows: Iterable[dict]) -> Rows:
    return sorted(rows, key=lambda row: (row["ms"] != row["ms"], row["ms"]))
