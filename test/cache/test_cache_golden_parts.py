"""Scores, eviction and voxel positions against the original, each on its own."""

from __future__ import annotations

import pytest
import torch
from cache.golden_figures import assert_close, golden_cache

from stac_core.cache import scores
from stac_core.cache.anchor_store import AnchorStore
from stac_core.cache.eviction import choose
from stac_core.cache.key_values import KeyValues
from stac_core.cache.token_positions import token_positions
from stac_core.cache.token_store import TokenStore
from stac_core.cache.voxel_grid import VoxelGrid
from stac_core.cache.voxel_keys import NOWHERE, keys_from_points, unpack

CPU = torch.device("cpu")


def test_scores_decay_and_grow_like_the_original():
    figures, settings = golden_cache("scores")
    for i, step in enumerate(settings["steps"]):
        before, mass = figures[f"s{i}.before"], figures[f"s{i}.mass"]
        live = mass[..., : step["live"]]
        after = scores.update(before, scores.received(live, step["queries"]), settings["gamma"])
        assert_close(after, figures[f"s{i}.after"], f"step {i}")


@pytest.mark.parametrize("case", golden_cache("evict")[1]["cases"], ids=lambda case: case["case"])
def test_eviction_keeps_what_the_original_keeps(case):
    figures, settings = golden_cache("evict")
    part = {k.split(".")[1]: v for k, v in figures.items() if k.startswith(case["case"] + ".")}
    layers, heads, length, _ = part["K"].shape
    tokens = settings["P"]
    frame = torch.arange(length) // tokens
    window = TokenStore(layers, KeyValues(layers))
    window.begin(length, None)
    for layer in range(layers):
        window.stage(layer, part["K"][layer], part["V"][layer])
    window.commit(frame, 0)
    window.score, window.voxel = part["score"], part["voxel"].long()
    pinned = torch.isin(frame, torch.tensor(case["pinned"], dtype=torch.int64))
    recent = frame >= case["live_frames"] - case["win"]
    leaving = (~pinned & ~recent).nonzero()[:, 0]
    anchors = AnchorStore(layers, heads, KeyValues(layers), CPU)
    capacity = case["hh"] * tokens
    choice = choose("score", anchors.candidates(window, leaving)[0], capacity)
    if "dropped" in part:
        assert torch.equal(leaving[choice.dropped], part["dropped"].long())
    evicted = anchors.renew(window, leaving, choice, capacity, evict=True)
    window.keep(pinned | recent)
    stays = torch.cat([leaving[choice.kept], frame[:0].expand(layers, heads, 0)], -1)
    rest = (pinned | recent).nonzero()[:, 0].expand(layers, heads, -1)
    everything, order = torch.cat([stays, rest], -1).sort(-1)
    assert torch.equal(everything, part["keep"].long())
    score = torch.cat([anchors.score, window.score], -1).gather(-1, order)
    voxel = torch.cat([anchors.voxel, window.voxel.expand(layers, heads, -1)], -1).gather(-1, order)
    assert torch.equal(score, part["score_after"])
    assert torch.equal(voxel, part["voxel_after"].long())
    for layer in range(layers):
        segments = [s for s in (anchors.segment(layer), window.segment(layer)) if s is not None]
        for name in ("keys", "values"):
            found = torch.cat([getattr(s, name) for s in segments], 1)
            found = found.gather(1, order[layer, ..., None].expand(-1, -1, found.shape[-1]))
            assert torch.equal(found, part["K_after" if name == "keys" else "V_after"][layer])
    assert evicted.keys.shape[:2] == (layers * heads, len(leaving) - choice.kept.shape[-1])


def test_among_equal_scores_the_older_token_stays():
    choice = choose("score", torch.tensor([[1.0, 2, 1, 1, 2]]), 3)
    assert choice.kept.tolist() == [[0, 1, 4]]
    assert choice.dropped.tolist() == [[2, 3]]


@pytest.mark.parametrize("case", golden_cache("voxel")[1]["cases"], ids=lambda case: case["case"])
def test_places_and_neighbourhoods_equal_the_original(case):
    figures = golden_cache("voxel")[0]
    part = {k.split(".", 1)[1]: v for k, v in figures.items() if k.startswith(case["case"] + ".")}
    grid = VoxelGrid(CPU)
    seen = []
    for chunk in range(case["chunks"]):
        now = slice(chunk * case["frames_per_chunk"], (chunk + 1) * case["frames_per_chunk"])
        points, confidence = part["points"][now], part["conf"][now]
        positions = token_positions(
            points, confidence, confidence, torch.zeros(3), patch_size=case["patch"],
            special_tokens=case["special_tokens"], least_confidence=case["threshold"], edge_test=0.0,
        )  # fmt: skip
        keys = keys_from_points(positions.points, positions.valid, case["r"])
        valid = positions.valid.flatten()
        golden = {k[3:]: v for k, v in part.items() if k.startswith(f"c{chunk}.")}
        assert torch.equal(valid, golden["valid"].bool())
        assert_close(positions.points.flatten(0, 1)[valid], golden["position"][valid])
        assert torch.equal(keys.flatten(), golden["voxel_key"])
        assert torch.equal(unpack(keys.flatten()[valid]), golden["ijk"][valid].long())

        new = keys[keys != NOWHERE].unique()
        new = new[grid.find(new) < 0]
        grid.grow(len(new))
        grid.add(new, 0, chunk)
        assert sorted(grid.key.tolist()) == sorted(golden["table_key"].tolist())
        numbers = grid.find(keys.flatten())
        assert torch.equal(numbers < 0, golden["voxel_id"] < 0)
        seen = [*seen, *keys][-case["window_frames"] :]
        seeds = torch.cat(seen)
        seeds = seeds[seeds != NOWHERE].unique()
        assert sorted(seeds.tolist()) == sorted(golden["seed_key"].tolist())
        assert sorted(grid.key[grid.near(seeds, 2)].tolist()) == sorted(golden["neighbour_key"].tolist())
