"""Slots of a store read into rows and written back: the same numbers and bytes as the reference."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from stac_core.cache import pages
from stac_core.cache.all_or_nothing import all_or_nothing
from stac_core.cache.slots import SlotPool
from stac_core.evaluation.gpu.measure import poison_new_memory, stop_poisoning
from stac_core.kernels import slots_torch, slots_triton
from stac_core.kernels.gather import Page
from stac_core.kernels.quantization import Codec
from stac_core.kernels.slots import Factor, RowSlots, SlotPage, Store

BACKENDS = {"torch": slots_torch, "triton": slots_triton}


@pytest.fixture(params=BACKENDS)
def backend(request):
    return BACKENDS[request.param]


def random_store(sizes, bits, dim, dtype, figures, generator) -> Store:
    """Pages of these sizes; every third slot is empty."""
    codec, pages = Codec(bits, dim, dtype), []
    for size in sizes:
        keys, values = (codec.encode(torch.randn(size, dim, generator=generator)) for _ in range(2))
        numbers = torch.rand(size, figures, generator=generator) + 0.5
        numbers[::3, -1] = 0
        tokens = Page(*(x.contiguous() for x in (keys[0], values[0], *keys[1:], *values[1:])))
        pages.append(SlotPage(tokens, numbers))
    return Store(pages, codec, figures)


def random_slots(sizes, rows, width, generator) -> torch.Tensor:
    """[rows, width], about half of them nowhere, the others different."""
    total = sum(sizes)
    slots = torch.randint(-9, 0, (rows * width,), generator=generator)
    count = min(total, -(-rows * width // 2))
    where = torch.randperm(rows * width, generator=generator)[:count]
    slots[where] = torch.randperm(total, generator=generator)[:count]
    return slots.view(rows, width)


def random_factor(rows, dim, generator) -> Factor:
    lane = torch.randint(0, 3, (rows,), generator=generator)
    return Factor(torch.rand(3, dim, generator=generator) + 0.5, lane)


def random_problem(case) -> tuple[Store, torch.Tensor, torch.Generator]:
    """Store and slots of a case, and what draws the rest of it."""
    sizes, bits, rows, width, dim, dtype, figures, _ = case
    generator = torch.Generator().manual_seed(rows)
    store = random_store(sizes, bits, dim, dtype, figures, generator)
    return store, random_slots(sizes, rows, width, generator), generator


def copy(store: Store) -> Store:
    pages = [
        SlotPage(Page(*(x if x is None else x.clone() for x in page.tokens)), page.figures.clone())
        for page in store.pages
    ]
    return Store(pages, store.codec, store.figures)


# page sizes, bits, rows, slots per row, dim, dtype, figures, factor
CASES = [
    ((40,), 16, 9, 4, 64, torch.bfloat16, 3, False),
    ((5, 30, 2), 16, 7, 8, 20, torch.float32, 1, True),
    ((50, 3), 8, 11, 3, 64, torch.bfloat16, 5, True),
    ((21, 8), 4, 8, 8, 96, torch.float16, 1, True),
    ((12,), 4, 1, 4, 6, torch.float32, 2, False),
    (tuple(range(1, 36)), 8, 40, 8, 130, torch.float32, 3, True),
    ((9,), 16, 0, 4, 16, torch.float32, 3, False),
    ((), 16, 4, 4, 16, torch.float32, 3, False),
    ((), 8, 2, 4, 16, torch.bfloat16, 1, True),
]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_rows_are_read_like_the_reference(backend, case):
    _, bits, rows, _, dim, dtype, figures, scaled = case
    store, slots, g = random_problem(case)
    factor = random_factor(rows, dim, g) if scaled else None
    poison_new_memory()
    got, alone = backend.read_slots(store, slots, factor), backend.read_figures(store, slots)
    stop_poisoning()
    expected = slots_torch.read_slots(store, slots, factor)
    eps = 0.0 if bits == 16 else 2 * torch.finfo(dtype).eps  # sums of codes may be rounded once less
    for mine, true in zip(got, expected, strict=True):
        torch.testing.assert_close(mine, true, atol=4 * eps, rtol=eps)
    assert torch.equal(alone, expected.figures)
    stored = torch.cat([page.figures for page in store.pages] or [torch.zeros(1, figures)])
    holds = (slots >= 0) & (stored[slots.clamp_min(0), -1] > 0)
    assert torch.equal(got.keys.abs().amax(-1) > 0, holds)
    assert torch.equal(got.figures, stored[slots.clamp_min(0)] * (slots >= 0)[..., None])


@pytest.mark.parametrize("case", CASES, ids=str)
def test_rows_are_written_to_the_byte_like_the_reference(backend, case):
    _, bits, rows, width, dim, dtype, figures, scaled = case
    store, slots, g = random_problem(case)
    factor = random_factor(rows, dim, g) if scaled else None
    held = (torch.rand(rows, width, generator=g) < 0.8) & (slots >= 0)
    coded = held & (torch.rand(rows, width, generator=g) < 0.7)
    content = RowSlots(
        # Numbers that the store can hold: Triton's interpreter cuts to bfloat16 where the device rounds.
        *(torch.randn(rows, width, dim, generator=g).to(dtype).float() for _ in range(2)),
        torch.rand(rows, width, figures, generator=g),
    )
    content.values[:, 0] = 0.25  # the same in all channels
    written, expected = copy(store), copy(store)
    backend.write_slots(written, slots, content, held, coded, factor)
    slots_torch.write_slots(expected, slots, content, held, coded, factor)
    for mine, true in zip(written.pages, expected.pages, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(mine.fields, true.fields, strict=True))
    if bits == 16 and factor is None:
        again = backend.read_slots(written, slots, None)
        for part in ("keys", "values"):
            stored = getattr(content, part)[coded].to(dtype).float()
            assert torch.equal(getattr(again, part)[coded], stored)
        assert torch.equal(again.figures[held], content.figures[held])


@pytest.mark.parametrize("case", CASES, ids=str)
def test_saved_slots_are_copies_of_what_is_stored(backend, case):
    store, slots, _ = random_problem(case)
    slots = slots[slots >= 0]
    saved = backend.save_slots(store, slots)
    for number, field in enumerate(saved.fields):
        column = [page.fields[number] for page in store.pages]
        assert torch.equal(field, torch.cat(column)[slots] if column else field[:0])


def test_rounding_by_chance_is_that_of_the_reference(backend):
    g = torch.Generator().manual_seed(0)
    store, slots = random_store((30,), 4, 64, torch.bfloat16, 3, g), random_slots((30,), 5, 4, g)
    content = RowSlots(*torch.randn(2, 5, 4, 64, generator=g), torch.rand(5, 4, 3, generator=g))
    written, expected = copy(store), copy(store)
    for kernels, target in ((backend, written), (slots_torch, expected)):
        chance = torch.Generator().manual_seed(1)
        kernels.write_slots(target, slots, content, slots >= 0, slots >= 0, None, chance)
    assert torch.equal(written.pages[0].tokens.keys, expected.pages[0].tokens.keys)


@pytest.mark.parametrize("bits", [16, 8, 4])
def test_what_was_overwritten_can_be_put_back(backend, bits, monkeypatch):
    monkeypatch.setattr(pages, "SMALL", 0)
    monkeypatch.setattr(pages, "JOINED", 0.0)
    pool = SlotPool(Codec(bits, 20, torch.float32), 3, 4, 8, torch.device("cpu"), backend)
    for _ in range(3):
        pool.grow(3, None)
    assert len(pool.pages) == 3
    g = torch.Generator().manual_seed(bits)

    def fill() -> None:
        slots, held = random_slots((9, 27), 8, 6, g), torch.rand(8, 6, generator=g) < 0.8
        held &= slots >= 0
        content = RowSlots(*torch.randn(2, 8, 6, 20, generator=g), torch.rand(8, 6, 3, generator=g))
        pool.write(slots, content, held, int(held.sum()), held, random_factor(8, 20, g))

    fill()
    before = {name: column.clone() for name, column in pool.state()["pages"].items()}
    with pytest.raises(MemoryError), all_or_nothing(pool):
        fill()
        pool.grow(2, None)
        fill()
        raise MemoryError
    after = pool.state()["pages"]
    assert all(torch.equal(after[name], column) for name, column in before.items())
    fill()  # and remembers nothing that it need not
    assert any(not torch.equal(pool.state()["pages"][name], column) for name, column in before.items())


def small() -> dict:
    g = torch.Generator().manual_seed(0)
    store, slots = random_store((9,), 8, 16, torch.float32, 2, g), random_slots((9,), 2, 4, g)
    content = RowSlots(*torch.zeros(2, 2, 4, 16), torch.zeros(2, 4, 2))
    return {"store": store, "slots": slots, "content": content, "held": slots >= 0, "coded": slots >= 0,
            "factor": None}  # fmt: skip


@pytest.mark.parametrize(
    "change, words",
    [
        ({"slots": torch.zeros(2, 4)}, "slots: expected torch.int64, got torch.float32"),
        ({"held": torch.zeros(2, 3, dtype=torch.bool)}, r"held: expected shape \[2, 4\], got \[2, 3\]"),
        ({"coded": torch.zeros(2, 4)}, "coded: expected torch.bool, got torch.float32"),
        (
            {"content": small()["content"]._replace(keys=torch.zeros(2, 4, 15))},
            r"content.keys: expected shape \[2, 4, 16\]",
        ),
        (
            {"factor": Factor(torch.zeros(3, 15), torch.zeros(2, dtype=torch.int64))},
            r"factor.of_lane: expected shape \[3, 16\], got \[3, 15\]",
        ),
        (
            {"store": replace(small()["store"], figures=3)},
            r"store.pages\[0\].figures: expected shape \[9, 3\], got \[9, 2\]",
        ),
        (
            {"store": replace(small()["store"], codec=Codec(4, 16, torch.float32))},
            r"store.pages\[0\].tokens.keys: expected shape \[9, 8\], got \[9, 16\]",
        ),
    ],
)  # fmt: skip
def test_bad_input_is_named(backend, change, words):
    with pytest.raises(ValueError, match=words):
        backend.write_slots(**{**small(), **change})
