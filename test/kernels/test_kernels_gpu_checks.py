"""The checks of the GPU benchmark fail where they should: one value of a right result spoilt."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from stac_core.evaluation.gpu import blocks, gathering, listed, merging, renewal, slots
from stac_core.kernels import (
    attend_listed_triton,
    attend_within_torch,
    few_rows_torch,
    gather_torch,
    gelu_torch,
    highest_torch,
    slots_torch,
    take_torch,
    to_heads_torch,
    voxel_merge_torch,
)
from stac_core.kernels.attend_listed import ListedKernels
from stac_core.kernels.select import BlockKernels

CPU = torch.device("cpu")
RIGHT = BlockKernels(
    to_heads_torch.to_heads, attend_within_torch.attend_within, gelu_torch.gelu_, few_rows_torch.few_rows
)
NAN = float("nan")  # as memory is that nobody wrote


def spoilt(part, value):
    """A copy with another last element."""
    part = part.clone()
    part.view(-1)[-1] = value
    return part


def failed(rows):
    return {row["what"] for row in rows if not row["passed"]}


@pytest.mark.parametrize("field", ["keys", "values", "bias"])
def test_gathers(field):
    def gather(*arguments):
        got = gather_torch.gather(*arguments)
        return got._replace(**{field: spoilt(getattr(got, field), NAN)})

    assert not failed(gathering.check("torch", gather_torch.gather, CPU))
    assert failed(gathering.check("torch", gather, CPU)) == {"gather"}


@pytest.mark.parametrize("field", ["pivot_keys", "pivot_values", "weight"])
def test_merges(field):
    def merge(*arguments):
        state, counts = voxel_merge_torch.voxel_merge(*arguments)
        part = getattr(state, field).clone()
        part[state.members > 0] = NAN
        return state._replace(**{field: part}), counts

    assert not failed(merging.check("torch", voxel_merge_torch.voxel_merge, CPU, 6))
    assert failed(merging.check("torch", merge, CPU, 6)) == {"merge"}


@pytest.mark.parametrize("field", ["places", "rest"])
def test_highest(field):
    def highest(*arguments):
        got = highest_torch.highest(*arguments)
        part = getattr(got, field)
        return got if part is None or not part.numel() else got._replace(**{field: spoilt(part, 7)})

    assert not failed(renewal.check_highest("torch", highest_torch.highest, CPU))
    assert failed(renewal.check_highest("torch", highest, CPU)) == {"highest"}


def test_taken_rows():
    def take(*arguments):
        return spoilt(take_torch.take(*arguments), NAN)

    rows = renewal.check_take("torch", take, CPU)
    assert not failed(renewal.check_take("torch", take_torch.take, CPU))
    assert rows and not any(row["passed"] for row in rows)


@pytest.mark.parametrize(
    "kernel, what",
    [("to_heads", "v"), ("attend_within", "out"), ("gelu_", "activated"), ("few_rows", "mapped")],
)
def test_blocks(kernel, what):
    def one_wrong(*arguments):
        got = getattr(RIGHT, kernel)(*arguments)
        return (*got[:2], spoilt(got[2], 70)) if kernel == "to_heads" else spoilt(got.contiguous(), 70)

    assert not failed(blocks.check("torch", RIGHT, CPU))
    assert failed(blocks.check("torch", replace(RIGHT, **{kernel: one_wrong}), CPU)) >= {what}


def reading(store, at, factor):
    got = slots_torch.read_slots(store, at, factor)
    return got._replace(values=spoilt(got.values, NAN))


def reading_figures(store, at):
    return spoilt(slots_torch.read_figures(store, at), 7)


def saving(store, at):
    saved = slots_torch.save_slots(store, at)
    return saved._replace(figures=spoilt(saved.figures, 7))


def writing(store, *arguments):
    """Also where nothing is to be written."""
    slots_torch.write_slots(store, *arguments)
    for page in store.pages:
        page.tokens.values[-1, -1] += 1


@pytest.mark.parametrize(
    "operation, kernel, what",
    [
        ("read_slots", reading, "read"),
        ("read_figures", reading_figures, "figures"),
        ("save_slots", saving, "saved"),
        ("write_slots", writing, "written"),
    ],
)
def test_slots(operation, kernel, what):
    assert not failed(slots.check("torch", slots_torch, CPU))
    kernels = SimpleNamespace(**{**vars(slots_torch), operation: kernel})
    rows = slots.check("torch", kernels, CPU)
    assert failed(rows) == {what} and sum(not row["passed"] for row in rows) == len(rows) // 4


def spoilt_listed(what):
    """A right answer with one number wrong, or with new tokens that are kept nowhere."""

    def attend(q, k, v, list_of_segments, listing, counted):
        keys = k + 1 if what == "kept" else k
        out = attend_listed_triton.attend(q, keys, v, list_of_segments, listing, counted)
        return spoilt(out.contiguous(), NAN) if what == "out" else out

    def mass(counted, list_of_segments, listing, mass):
        attend_listed_triton.sum_mass(counted, list_of_segments, listing, mass)
        if what == "mass":
            mass[-1, 0] = NAN

    return ListedKernels(attend, mass)


@pytest.mark.parametrize("what", ["out", "mass", "kept"])
def test_listed_segments(what):
    assert not failed(listed.check("triton", spoilt_listed(None), CPU))
    assert what in failed(listed.check("triton", spoilt_listed(what), CPU))
