"""Whole streams against the original, number by number: attention, scores, eviction, places, merging."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from cache.golden_figures import assert_close, golden_cache
from cache.test_cache_golden_merge import assert_content
from cache.worlds_of_tokens import KERNELS
from tiny import TINY

from stac_core.cache.stream_cache import StreamCache
from stac_core.cache.token_positions import token_positions
from stac_core.config import CacheConfig
from stac_core.kernels.attend_torch import attend


def cache_for(c: dict, attended: list, **changes) -> StreamCache:
    """A stream with the original's settings; what its attention returns is appended to `attended`."""
    config = CacheConfig.parity(
        chunk_size=c["ck"], window_size=c["win"], hh_size=c["hh"], retrieval_size=c["ret"],
        temperature=c["gamma"], voxel_size=c["r"], voxel_conf=c["conf_thr"], voxel_buf_cap=c["Bc"],
        voxel_piv_cap=c["Gc"], merge_threshold=c["lam"], gate=c["gate"], **changes,
    )  # fmt: skip
    network = replace(
        TINY, layers=c["L"], heads=c["H"], width=c["H"] * c["D"], patch_size=c["ps"], registers=c["ns"] - 1,
        encoder_heads=1, camera_heads=1, dense_layers=tuple(range(c["L"])),
    )  # fmt: skip

    def recorded(*arguments):
        attended.append(attend(*arguments))
        return attended[-1]

    return StreamCache(config, network, replace(KERNELS, attend=recorded))


def run_chunk(cache: StreamCache, figures: dict, c: dict, first: int, frames: int) -> torch.Tensor:
    """One pass and its settlement → voxel keys of its tokens."""
    now = slice(first, first + frames)
    q, k, v = (figures[name][now].permute(1, 2, 0, 3, 4).flatten(2, 3) for name in "qkv")  # [L, H, M, D]
    cache.begin(frames, c["P"])
    for layer in range(c["L"]):
        cache.attend(layer, q[layer, None], k[layer, None], v[layer, None])
    points, confidence = figures["points"][now], figures["conf"][now]
    positions = token_positions(
        points, confidence, confidence, torch.zeros(3),
        patch_size=c["ps"], special_tokens=c["ns"], least_confidence=c["conf_thr"], edge_test=0.0,
        lost_confidence=0.0, view=None,
    )  # fmt: skip
    cache.settle(positions)


def padded(parts, width):
    found = torch.cat(parts, -1)
    return torch.nn.functional.pad(found, (0, width - found.shape[-1]))


@pytest.mark.parametrize("allocator", ["static", "segment"])
@pytest.mark.parametrize("name", ["stream_preset", "stream_small"])
def test_stream_equals_the_original(name, allocator):
    figures, settings = golden_cache(name)
    c, attended = settings["config"], []
    cache = cache_for(c, attended, allocator=allocator)
    tokens_k = figures["k"].permute(1, 2, 0, 3, 4).flatten(2, 3)  # [L, H, F·P, D] by token id
    tokens_v = figures["v"].permute(1, 2, 0, 3, 4).flatten(2, 3)
    for chunk in settings["chunks"]:
        golden = {k[4:]: v for k, v in figures.items() if k.startswith(f"c{chunk['chunk']:02d}.")}
        attended.clear()
        before = vars(cache.voxels.counts).copy() if cache.voxels else {}
        run_chunk(cache, figures, c, chunk["first_frame"], chunk["frames"])

        for layer, result in enumerate(attended):
            assert_close(result.out, golden["out"][layer], "out")
            assert_close(result.lse, golden["lse"][layer], "lse")
            assert_close(padded(result.key_mass, golden["mass"].shape[-1]), golden["mass"][layer], "mass")
        assert (attended[0].key_mass[-1].shape[-1] > 0) or not chunk["retrieved_used"]

        live, ids = cache.live(), golden["live_id"].long()
        assert torch.equal(live.voxel, golden["live_key"])
        assert_close(live.score, golden["live_score"], "score")
        index = ids[..., None].expand(-1, -1, -1, c["D"])
        assert torch.equal(live.keys, tokens_k.gather(2, index))
        assert torch.equal(live.values, tokens_v.gather(2, index))

        for counter in ("merged", "gated", "buffered", "aggregated", "remerged"):
            assert vars(cache.voxels.counts)[counter] - before.get(counter, 0) == chunk[counter], counter
        assert_content(cache.voxels, golden, "")
        cache.voxels.check()
        if chunk["retrieved_now"]:
            for layer in range(c["L"]):
                found = cache.retrieved.segments()[layer]
                width = found.length
                assert_close(found.keys, golden["ret_K"][layer, :, :width], "retrieved keys")
                assert_close(found.values, golden["ret_V"][layer, :, :width], "retrieved values")
                assert_close(found.bias, golden["ret_bias"][layer, :, :width], "retrieved bias")
                assert int(golden["ret_len"].max()) == width


def test_more_candidates_than_a_buffer_holds_leave_nothing_behind():
    """The original carries them to its next call; here every call finishes, so only totals compare."""
    figures, settings = golden_cache("stream_carry_quirk")
    cache = cache_for(settings["config"], [])
    for chunk in settings["chunks"]:
        run_chunk(cache, figures, settings["config"], chunk["first_frame"], chunk["frames"])
        cache.voxels.check()
    carried = settings["chunks"][-1]["carry"]
    ours, theirs = cache.voxels.counts, settings["total"]
    assert ours.inserted >= theirs["merged"] + theirs["gated"] + theirs["buffered"] - carried
    assert ours.aggregated >= theirs["aggregated"]
