"""Fetching retrieved tokens: every backend brings what the reference brings; then time and bandwidth."""

from __future__ import annotations

from functools import partial

import torch

from stac_core.evaluation.gpu.measure import Ceilings, median_ms, poisoned_memory
from stac_core.kernels.gather import Gather, Page, Wanted
from stac_core.kernels.gather_torch import gather as reference

DIM = 64
TOLERANCE = 2 * torch.finfo(torch.bfloat16).eps  # the kernels may contract products and sums
LANES, BUDGET = 384, 2082  # of the full-size network: layers times heads, two frames
STORES = {"16 bits": (16, 16), "pivots 4 bits, buffers 8": (4, 8)}


def random_wanted(bits: int, slots: int, pages: int, lanes: int, n: int, device: torch.device) -> Wanted:
    """A store of random content in some pages; every lane wants up to n tokens, in no order."""
    store = []
    for _ in range(pages):
        size = max(1, slots // pages)
        if bits == 16:
            keys, values = torch.randn(2, size, DIM, device=device).bfloat16()
            store.append(Page(keys, values))
            continue
        codes = torch.randint(0, 256, (2, size, DIM * bits // 8), dtype=torch.uint8, device=device)
        grid = torch.rand(2, size, 2, device=device).half()
        store.append(Page(codes[0], codes[1], grid[0], grid[1]))
    total = sum(len(page.keys) for page in store)
    chosen = torch.randint(0, total, (lanes, n), device=device)
    absent = torch.arange(n, device=device) >= torch.randint(n // 2, n + 1, (lanes, 1), device=device)
    members = torch.randint(1, 50, (lanes, n), device=device).float()
    return Wanted(store, bits, chosen.masked_fill(absent, -1), members.masked_fill(absent, 0))


def check(name: str, gather: Gather, device: torch.device) -> list[dict[str, object]]:
    """Fresh random stores, poisoned outputs: lengths equal, numbers within two roundings."""
    results: list[dict[str, object]] = []
    for case, bits in STORES.items():
        kinds = [random_wanted(b, 300, pages, 5, 40, device) for b, pages in zip(bits, (3, 35), strict=True)]
        factor = torch.rand(5, DIM, device=device) + 0.5
        expected = reference(kinds, 64, DIM, torch.bfloat16, factor)
        with poisoned_memory():
            got = gather(kinds, 64, DIM, torch.bfloat16, factor)
        error = float("inf")
        if torch.equal(got.length, expected.length) and torch.equal(got.bias.isinf(), expected.bias.isinf()):
            pairs = (
                (got.keys, expected.keys),
                (got.values, expected.values),
                (got.bias.exp(), expected.bias.exp()),
            )
            errors = [((a - b).abs() / (1 + b.abs())).max().float() for a, b in pairs]
            error = float(torch.stack(errors).max())  # NaN stays NaN
        results.append(
            {"backend": name, "case": case, "what": "gather", "error": error, "allowed": TOLERANCE,
             "passed": error <= TOLERANCE}
        )  # fmt: skip
    return results


def time_all(
    backends: dict[str, Gather], ceilings: Ceilings, device: torch.device, small: bool = False
) -> list[dict[str, object]]:
    """What one retrieval of the full-size network fetches; bytes = what is read and written, once each."""
    lanes, budget, slots = (4, 30, 500) if small else (LANES, BUDGET, 2_000_000)
    rows: list[dict[str, object]] = []
    for storage, bits in STORES.items():
        kinds = [random_wanted(b, slots, 4, lanes, budget, device) for b in bits]
        factor = torch.rand(lanes, DIM, device=device)
        length = reference(kinds, budget, DIM, torch.bfloat16, factor).length
        read = int(length.sum()) * (DIM * bits[0] // 8 * 2 + 12)  # almost all are of the first kind
        moved = read + lanes * budget * (DIM * 4 + 4)
        for name, gather in backends.items():
            ms = median_ms(partial(gather, kinds, budget, DIM, torch.bfloat16, factor), device)
            rate = moved / ms * 1e3
            rows.append(
                {"backend": name, "variant": storage, "ms": ms, "tb_per_s": rate / 1e12,
                 "of_roofline": rate / ceilings.copy_bytes_per_s}
            )  # fmt: skip
    return rows
