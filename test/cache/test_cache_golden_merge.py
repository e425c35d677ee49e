"""The voxel memory against the original: merging call by call, then retrieval from the last state."""

from __future__ import annotations

import pytest
import torch
from cache.golden_figures import assert_close, golden_cache
from cache.worlds_of_tokens import KERNELS

from stac_core.cache.voxel_memory import Evicted, VoxelMemory
from stac_core.config import CacheConfig

FIGURES, SETTINGS = golden_cache("merge")


def memory_for(settings, **changes) -> VoxelMemory:
    config = CacheConfig.parity(
        voxel_buf_cap=settings["Bc"], voxel_piv_cap=settings["Gc"], merge_threshold=settings["threshold"],
        gate=settings["gate"], voxel_num=2, **changes,
    )  # fmt: skip
    return VoxelMemory(config, settings["rows"], 16, torch.float32, torch.device("cpu"), KERNELS)


def insert_call(memory: VoxelMemory, call: int) -> dict[str, int]:
    """One golden call → what it added to the counters."""
    before = vars(memory.counts).copy()
    part = {name: FIGURES[f"m{call}.{name}"] for name in ("K", "V", "score", "voxel")}
    memory.begin(part["voxel"].long())
    memory.insert(Evicted(part["K"], part["V"], part["score"], part["voxel"].long()))
    memory.check()
    return {name: n - before[name] for name, n in vars(memory.counts).items()}


def content(memory: VoxelMemory) -> dict[str, dict[tuple[int, int], list]]:
    """Pivots and buffered tokens by (row, voxel key), in slot order."""
    voxels = memory.grid.voxels
    rows = memory.rows.of_voxels(voxels)
    state = memory.rows.read(rows.flatten()).state
    found: dict = {"piv": {}, "buf": {}}
    for i, key in enumerate(memory.grid.key[voxels].tolist()):
        for lane in range(memory.rows.lanes):
            at = i * memory.rows.lanes + lane
            held = state.members[at] > 0
            if held.any():
                found["piv"][lane, key] = [
                    part[at][held]
                    for part in (
                        state.pivot_keys,
                        state.pivot_values,
                        state.weight,
                        state.score_sum,
                        state.members,
                    )
                ]
            held = state.buffer_score[at] > -torch.inf
            if held.any():
                order = state.buffer_score[at][held].argsort(descending=True)
                found["buf"][lane, key] = [
                    part[at][held][order]
                    for part in (state.buffer_keys, state.buffer_values, state.buffer_score)
                ]
    return found


def golden_content(figures, prefix: str) -> dict[str, dict[tuple[int, int], list]]:
    found: dict = {}
    for kind, names in (("piv", ("K", "V", "W", "S", "n")), ("buf", ("K", "V", "S"))):
        row, key = figures[f"{prefix}{kind}_row"], figures[f"{prefix}{kind}_key"]
        order = figures[f"{prefix}{kind}_slot"] if kind == "piv" else -figures[f"{prefix}{kind}_S"]
        found[kind] = {}
        for lane, k in {(int(a), int(b)) for a, b in zip(row, key, strict=True)}:
            here = ((row == lane) & (key == k)).nonzero()[:, 0]
            here = here[order[here].argsort()]
            found[kind][lane, k] = [figures[f"{prefix}{kind}_{name}"][here] for name in names]
    return found


def assert_content(memory: VoxelMemory, figures, prefix: str) -> None:
    actual, expected = content(memory), golden_content(figures, prefix)
    for kind in ("piv", "buf"):
        assert actual[kind].keys() == expected[kind].keys(), f"{prefix} {kind}"
        for place, parts in expected[kind].items():
            for a, b in zip(actual[kind][place], parts, strict=True):
                assert_close(a, b, f"{prefix} {kind} {place}")


@pytest.mark.parametrize("allocator", ["static", "slab", "segment"])
def test_merging_equals_the_original_call_by_call(allocator):
    memory = memory_for(SETTINGS, allocator=allocator)
    for call in SETTINGS["calls"]:
        counts = insert_call(memory, call["call"])
        for name in ("merged", "gated", "buffered", "aggregated", "remerged"):
            assert counts[name] == call[name], f"call {call['call']}: {name}"
        assert_content(memory, FIGURES, f"m{call['call']}.")


@pytest.mark.parametrize("case", golden_cache("retrieve")[1]["cases"], ids=lambda case: case["case"])
def test_retrieval_equals_the_original(case):
    memory = memory_for(SETTINGS)
    for call in SETTINGS["calls"]:
        insert_call(memory, call["call"])
    figures, name = golden_cache("retrieve")[0], case["case"]
    voxels = memory.grid.find(torch.tensor(case["voxels"], dtype=torch.int64))
    found = memory.retrieval.retrieve(voxels, case["budget"], with_buffer=case["with_buffer"])
    assert found.length.tolist() == figures[f"{name}.length"].tolist()
    for lane, length in enumerate(found.length.tolist()):
        actual = [found.keys[lane, :length], found.values[lane, :length], found.bias[lane, :length]]
        expected = [figures[f"{name}.{part}"][lane] for part in ("K", "V", "bias")]
        real = expected[2] > -torch.inf
        expected = [part[real] for part in expected]
        if name == "all_with_buffer":  # any order
            actual = [part[actual[0][:, 0].argsort()] for part in actual]
            expected = [part[expected[0][:, 0].argsort()] for part in expected]
        for a, b in zip(actual, expected, strict=True):
            assert_close(a, b, name)
    if case["budget"] >= 0:
        assert found.keys.shape[1] == case["slots"]
        assert (found.keys[found.bias == -torch.inf] == 0).all()


def test_the_first_merged_token_of_a_crowded_row_is_that_of_the_original():
    """It carries what exceeds a buffer to its next call; here the same call goes on until the row fits."""
    figures, settings = golden_cache("merge_carry_quirk")
    memory = memory_for(SETTINGS)
    memory.begin(figures["m0.voxel"].long())
    memory.insert(
        Evicted(*(figures[f"m0.{name}"] for name in ("K", "V", "score")), figures["m0.voxel"].long())
    )
    memory.check()
    theirs, ours = golden_content(figures, "m0.")["piv"], content(memory)["piv"]
    assert theirs.keys() == ours.keys()
    for place, parts in theirs.items():
        for a, b in zip(ours[place], parts, strict=True):
            assert_close(a[:1], b, f"{place}")
    call, capacity = settings["calls"][0], SETTINGS["Bc"]
    assert memory.counts.buffered == call["buffered"] + call["carried"] == call["carried"] + 6 * capacity
    in_rows = figures["m0.voxel"].long() + settings["voxels"] * torch.arange(2)[:, None]
    assert memory.counts.aggregated == int((in_rows.flatten().bincount() // capacity).sum())
