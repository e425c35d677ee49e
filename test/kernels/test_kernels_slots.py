"""Slots of a store read into rows and written back: the same numbers and bytes as the reference."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from stac_core.cache import pages
from stac_core.cache.all_or_nothing import all_or_nothing
from stac_core.cache.slots import SlotPool
from stac_core.evaluation.gpu.measure import poisoned_memory
from stac_core.kernels import slots_torch, slots_triton
from stac_core.kernels.judge_slots import judge_slots, move
from stac_core.kernels.quantization import Codec
from stac_core.kernels.random_slots import (
    SlotCase,
    SlotProblem,
    copy_store,
    random_factor,
    random_problem,
    random_slots,
    random_store,
)
from stac_core.kernels.slots import Factor, RowSlots

CPU = torch.device("cpu")
BACKENDS = {"torch": slots_torch, "triton": slots_triton}


def places(mask):
    """Where a mask of slots is true."""
    return mask.flatten().nonzero()[:, 0]


@pytest.fixture(params=BACKENDS)
def backend(request):
    return BACKENDS[request.param]


# page sizes, bits, rows, slots per row, dim, dtype, figures, factor
CASES = [
    SlotCase((40,), 16, 9, 4, 64, torch.bfloat16, 3, False),
    SlotCase((5, 30, 2), 16, 7, 8, 20, torch.float32, 1, True),
    SlotCase((50, 3), 8, 11, 3, 64, torch.bfloat16, 5, True),
    SlotCase((21, 8), 4, 8, 8, 96, torch.float16, 1, True),
    SlotCase((12,), 4, 1, 4, 6, torch.float32, 2, False),
    SlotCase(tuple(range(1, 36)), 8, 40, 8, 130, torch.float32, 3, True),
    SlotCase((9,), 16, 0, 4, 16, torch.float32, 3, False),
    SlotCase((), 16, 4, 4, 16, torch.float32, 3, False),
    SlotCase((), 8, 2, 4, 16, torch.bfloat16, 1, True),
]


def solvable(case: SlotCase) -> SlotProblem:
    """What is written is what the store can hold: Triton's interpreter cuts where the device rounds."""
    problem = random_problem(case, case.rows)
    keys, values, figures = problem.content
    held = RowSlots(keys.to(case.dtype).float(), values.to(case.dtype).float(), figures)
    return problem._replace(content=held)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_rows_are_moved_like_by_the_reference(backend, case):
    problem = solvable(case)
    own = problem.copy_to(CPU)
    with poisoned_memory():
        got = move(backend, own)
    assert all(verdict.passed for verdict in judge_slots(problem, got)), judge_slots(problem, got)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_rows_hold_what_their_slots_hold(backend, case):
    store, slots, factor, *_ = random_problem(case, case.rows)
    got = backend.read_slots(store, slots, factor)
    stored = torch.cat([page.figures for page in store.pages] or [torch.zeros(1, case.figures)])
    holds = (slots >= 0) & (stored[slots.clamp_min(0), -1] > 0)
    assert torch.equal(got.keys.abs().amax(-1) > 0, holds)
    assert torch.equal(got.figures, stored[slots.clamp_min(0)] * (slots >= 0)[..., None])


@pytest.mark.parametrize("case", [case for case in CASES if case.bits == 16 and not case.scaled], ids=str)
def test_what_was_written_is_read_again(backend, case):
    store, slots, _, content, held, coded = solvable(case)
    backend.write_slots(store, slots, content, places(held), coded, None)
    again = backend.read_slots(store, slots, None)
    assert torch.equal(again.keys[coded], content.keys[coded])
    assert torch.equal(again.values[coded], content.values[coded])
    assert torch.equal(again.figures[held], content.figures[held])


@pytest.mark.parametrize("case", CASES, ids=str)
def test_saved_slots_are_copies_of_what_is_stored(backend, case):
    store, slots, *_ = random_problem(case, case.rows)
    slots = slots[slots >= 0]
    saved = backend.save_slots(store, slots)
    for number, field in enumerate(saved.fields):
        column = [page.fields[number] for page in store.pages]
        assert torch.equal(field, torch.cat(column)[slots] if column else field[:0])


def test_rounding_by_chance_is_that_of_the_reference(backend):
    g = torch.Generator().manual_seed(0)
    store, slots = random_store((30,), Codec(4, 64, torch.bfloat16), 3, g), random_slots(30, 5, 4, g)
    content = RowSlots(*torch.randn(2, 5, 4, 64, generator=g), torch.rand(5, 4, 3, generator=g))
    written, expected = (copy_store(store, CPU) for _ in range(2))
    for kernels, target in ((backend, written), (slots_torch, expected)):
        chance = torch.Generator().manual_seed(1)
        kernels.write_slots(target, slots, content, places(slots >= 0), slots >= 0, None, chance)
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
        slots, held = random_slots(36, 8, 6, g), torch.rand(8, 6, generator=g) < 0.8
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
    store, slots = random_store((9,), Codec(8, 16, torch.float32), 2, g), random_slots(9, 2, 4, g)
    content = RowSlots(*torch.zeros(2, 2, 4, 16), torch.zeros(2, 4, 2))
    written = places(slots >= 0)
    return {"store": store, "slots": slots, "content": content, "written": written, "coded": slots >= 0,
            "factor": None}  # fmt: skip


@pytest.mark.parametrize(
    "change, words",
    [
        ({"slots": torch.zeros(2, 4)}, "slots: expected torch.int64, got torch.float32"),
        ({"written": torch.zeros(2, 3, dtype=torch.int64)}, r"written: expected shape \[6\], got \[2, 3\]"),
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


def test_slots_of_another_shape_are_named(backend):
    store, slots = small()["store"], small()["slots"]
    for read in (lambda x: backend.read_slots(store, x, None), lambda x: backend.read_figures(store, x)):
        with pytest.raises(ValueError, match=r"slots: expected \[n, S\], got shape \[4\]"):
            read(slots[0])
    with pytest.raises(ValueError, match=r"slots: expected \[m\], got shape \[2, 4\]"):
        backend.save_slots(store, slots)


def test_triton_names_tensors_out_of_its_reach(monkeypatch):
    monkeypatch.setattr(slots_triton.triton.knobs.runtime, "interpret", False)
    given = small()
    store, slots = given["store"], given["slots"]
    for call in (
        lambda: slots_triton.read_slots(store, slots, None),
        lambda: slots_triton.read_figures(store, slots),
        lambda: slots_triton.save_slots(store, slots[0]),
        lambda: slots_triton.write_slots(**given),
    ):
        with pytest.raises(ValueError, match="slots: is on cpu, the triton backend computes on CUDA devices"):
            call()
