"""Scores, eviction and voxel positions against the original, each on its own."""

from __future__ import annotations

import pytest
import torch
from cache.golden_figures import assert_close, golden_cache
from cache.worlds_of_tokens import KERNELS, small_network

from stac_core.cache import scores
from stac_core.cache.anchor_store import AnchorStore
from stac_core.cache.key_values import KeyValues
from stac_core.cache.stream_cache import StreamCache
from stac_core.cache.token_positions import token_positions
from stac_core.cache.token_store import TokenStore
from stac_core.cache.voxel_grid import VoxelGrid
from stac_core.cache.voxel_keys import FARTHEST, NOWHERE, keys_from_points, pack, unpack
from stac_core.config import CacheConfig
from stac_core.kernels.highest_torch import highest
from stac_core.kernels.take_torch import take

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
    anchors = AnchorStore(layers, heads, KeyValues(layers), CPU, take)
    candidates = anchors.candidates(window, leaving)
    chosen = highest(candidates.score.flatten(0, 1), case["hh"] * tokens, rest=True)
    kept, gone = (places.unflatten(0, (layers, heads)) for places in chosen)
    if "dropped" in part:
        assert torch.equal(leaving[gone].flatten(), part["dropped"].long().flatten())
    evicted = anchors.renew(window, leaving, candidates, chosen)
    assert torch.equal(evicted.voxel.view_as(gone), candidates.voxel.gather(-1, gone))
    window.keep(pinned | recent)
    stays = torch.cat([leaving[kept], frame[:0].expand(layers, heads, 0)], -1)
    rest = (pinned | recent).nonzero()[:, 0].expand(layers, heads, -1)
    everything, order = torch.cat([stays, rest], -1).sort(-1)
    assert torch.equal(everything, part["keep"].long())
    score = torch.cat([anchors.score, window.score], -1).gather(-1, order)
    voxel = torch.cat([anchors.voxel, window.voxel.expand(layers, heads, -1)], -1).gather(-1, order)
    assert torch.equal(score, part["score_after"])
    assert torch.equal(voxel, part["voxel_after"].long())
    stores = [store.segments() for store in (anchors, window) if store.length]
    for layer, segments in enumerate(zip(*stores, strict=True)):
        for name in ("keys", "values"):
            found = torch.cat([getattr(s, name) for s in segments], 1)
            found = found.gather(1, order[layer, ..., None].expand(-1, -1, found.shape[-1]))
            assert torch.equal(found, part["K_after" if name == "keys" else "V_after"][layer])
    where = leaving[gone][..., None].expand(-1, -1, -1, part["K"].shape[-1])
    for tokens_gone, all_tokens in ((evicted.keys, part["K"]), (evicted.values, part["V"])):
        assert torch.equal(tokens_gone.view_as(where), all_tokens.gather(2, where))


def test_among_many_ties_as_much_score_stays_as_in_the_original():
    """Which of the equal tokens stay was the choice of its library; here it is the older ones."""
    figures, settings = golden_cache("evict_quirk")
    case, score, tokens = settings["cases"][0], figures["ties.score"], settings["P"]
    old = slice(tokens, (case["live_frames"] - case["win"]) * tokens)  # beyond pinned frame and window
    kept = highest(score[..., old].flatten(0, 1), case["hh"] * tokens).places.view(*score.shape[:2], -1)
    theirs = figures["ties.keep"].long()
    theirs = theirs[(theirs >= old.start) & (theirs < old.stop)].view(*score.shape[:2], -1)
    ours = kept + old.start
    values = [score.gather(-1, kept).sort(-1).values for kept in (ours, theirs)]
    assert torch.equal(*values)
    assert not torch.equal(ours, theirs) and (ours <= theirs).all()


def test_a_pinned_frame_stays_whole_where_the_original_loses_it():
    figures, settings = golden_cache("evict_quirk")
    case, tokens = settings["cases"][1], settings["P"]
    keys, values = figures["pin_0_and_2.K"], figures["pin_0_and_2.V"]
    network = small_network(layers=2, heads=2, dim=8)
    config = CacheConfig.parity(chunk_size=4, window_size=case["win"], hh_size=case["hh"], retrieval_size=0)
    cache = StreamCache(config, network, KERNELS)
    cache.pin(2)
    for chunk in range(6):  # the frames of the case twice over
        now = slice(36 * (chunk % 3), 36 * (chunk % 3) + 36)
        cache.begin(4, tokens)
        for layer in range(2):
            cache.attend(layer, *(part[layer, None, :, now] for part in (keys, keys, values)))
        cache.settle()
    live = cache.live().keys
    for place, frame in enumerate(case["pinned"]):
        whole = keys[:, :, frame * tokens : (frame + 1) * tokens]
        assert torch.equal(live[:, :, place * tokens : (place + 1) * tokens], whole)
    second = torch.arange(2 * tokens, 3 * tokens)
    assert not all(torch.isin(second, row).all() for row in figures["pin_0_and_2.id_after_2"].flatten(0, 1))


def test_among_equal_scores_the_older_token_stays():
    kept = highest(torch.tensor([[1.0, 2, 1, 1, 2]]), 3).places
    assert kept.tolist() == [[0, 1, 4]]


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
            lost_confidence=0.0, view=None,
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
        assert sorted(grid.key[grid.near(seeds, 2)[:-1]].tolist()) == sorted(golden["neighbour_key"].tolist())


@pytest.mark.parametrize("middle", [0, FARTHEST - 3, 3 - FARTHEST])
def test_neighbours_are_those_within_reach_at_the_ends_of_space_too(middle):
    generator = torch.Generator().manual_seed(1)
    cells = (middle + torch.randint(-5, 6, (80, 3), generator=generator)).clamp(-FARTHEST, FARTHEST)
    grid, keys = VoxelGrid(CPU), pack(cells).unique()
    grid.grow(100)
    known, seeds = keys[::2], torch.cat([keys[:9], torch.full((2,), NOWHERE)])
    numbers = grid.add(known, 0, 1)
    apart = (unpack(known)[:, None] - unpack(keys[:9])).abs().amax(-1).amin(-1)
    assert torch.equal(grid.near(seeds, 2)[:-1].nonzero()[:, 0], numbers[apart <= 2].sort().values)
