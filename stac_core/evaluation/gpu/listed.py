"""Attention over segments that are listed on the device, as recorded passes have it: against float64."""

from __future__ import annotations

import torch
from torch import Tensor

from stac_core.evaluation.gpu.measure import poisoned_memory
from stac_core.evaluation.gpu.report import Rows
from stac_core.kernels.attend import Segment
from stac_core.kernels.attend_listed import ListedKernels, ListedSegment, Listing, room_to_count, write_list
from stac_core.kernels.attend_torch import explicit
from stac_core.kernels.judge import Verdict, compare, compare_mass

LAYERS, SPARE = 2, 64  # tokens that are not there yet
CASES = [  # heads, queries, tokens of each segment and which grows, width of a head, share for the mass
    (16, 1041, (1041, 2082, 2100, 1025), 2, 64, torch.bfloat16, 0.25),
    (16, 2082, (97, 1041, 2082, 0), 2, 64, torch.bfloat16, 0.25),
    (3, 300, (33, 0, 300, 70), 2, 64, torch.float16, 1.0),
    (16, 4, (131,), 0, 128, torch.float32, None),
    (16, 1, (9,), 0, 128, torch.float32, None),
]
SMALL_CASES = [(2, 30, (7, 33, 40, 5), 2, 16, torch.bfloat16, 1.0), (1, 2, (9,), 0, 16, torch.float32, None)]


def check(name: str, kernels: ListedKernels, device: torch.device) -> Rows:
    """Fresh random inputs, poisoned outputs, the last segment of several with a bias; twice-rule."""
    rows: Rows = []
    for case in CASES if device.type == "cuda" else SMALL_CASES:
        for verdict in judge(kernels, case, device):
            heads, queries, lengths, _, dim, dtype, share = case
            about = f"{heads}×{queries}×({'+'.join(map(str, lengths))})×{dim} {dtype} ρ {share}"
            rows.append({"backend": name, "case": about, **verdict._asdict(), "passed": verdict.passed})
    return rows


def judge(kernels: ListedKernels, case: tuple, device: torch.device) -> list[Verdict]:
    """Output, mass, and how many of the new tokens are not where they belong."""
    heads, queries, lengths, grows, dim, dtype, share = case
    biased = tuple(len(lengths) > 1 and i == len(lengths) - 1 for i in range(len(lengths)))
    segments = [
        _random_segment(heads, n, dim, dtype, bias, device) for n, bias in zip(lengths, biased, strict=True)
    ]
    listing = Listing(biased, grows, share, sum(lengths) + SPARE)
    listed = torch.from_numpy(write_list(segments, LAYERS)).to(device)
    q, k, v = (
        torch.randn(queries, 3, heads, dim, device=device).to(dtype).permute(1, 2, 0, 3).unbind()
    )  # as they lie in a product
    with poisoned_memory():
        lanes = None if share is None else room_to_count(LAYERS * heads, q, share)
        counted = None if lanes is None else lanes.of(slice(heads, None))
        out = kernels.attend(q, k, v, listed[1], listing, counted)
        mass = torch.empty(LAYERS * heads, listing.most_keys, device=device)
        if lanes is not None:
            kernels.sum_mass(lanes, listed[0], listing, mass)
    seen = [_of_layer(segment, 1, heads) for segment in segments]
    astray = sum(
        int((stored[:, -queries:] != new).sum())
        for stored, new in ((seen[grows].keys, k), (seen[grows].values, v))
    )
    exact, plain = (explicit(q, seen, share or 1.0, precise) for precise in (torch.float64, dtype))
    verdicts = [compare("out", out, exact.out, plain.out, dtype), Verdict("kept", float(astray), 0.0)]
    if lanes is not None and exact.key_mass is not None and plain.key_mass is not None:
        true, theirs = (torch.cat(masses, 1) for masses in (exact.key_mass, plain.key_mass))
        verdicts.append(compare_mass("mass", mass[heads:, : sum(lengths)], true, theirs, exact.lse, dtype))
    return verdicts


def _random_segment(
    heads: int, length: int, dim: int, dtype: torch.dtype, biased: bool, device: torch.device
) -> ListedSegment:
    lanes, capacity = LAYERS * heads, length + SPARE
    keys, values = (torch.randn(lanes, capacity, dim, device=device).to(dtype) for _ in range(2))
    bias: Tensor | None = None
    if biased:
        bias = torch.randn(lanes, capacity, device=device)
        bias[:, length // 3 : length // 2] = -torch.inf
    return ListedSegment(keys, values, length, bias)


def _of_layer(segment: ListedSegment, layer: int, heads: int) -> Segment:
    lanes = slice(layer * heads, (layer + 1) * heads)
    bias = None if segment.bias is None else segment.bias[lanes, : segment.length]
    return Segment(segment.keys[lanes, : segment.length], segment.values[lanes, : segment.length], bias)
