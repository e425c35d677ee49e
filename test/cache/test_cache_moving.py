"""Voxels that move with the frames that saw them, when the poses of these are corrected."""

from __future__ import annotations

from copy import deepcopy
from dataclasses import replace

import pytest
import torch
from cache.test_cache_budget import limited
from cache.worlds_of_tokens import KERNELS, Walk, numbers, parity, small_network
from hypothesis import given, settings
from hypothesis import strategies as st

from stac_core.cache.camera_tokens import Cameras
from stac_core.cache.making_room import RoomMaker
from stac_core.cache.saved_state import read_state, write_state
from stac_core.cache.stream_cache import StreamCache
from stac_core.cache.voxel_keys import NOWHERE, pack, unpack, within_wider

WALK = Walk(small_network(), length=6.0, pace=0.5)
SETTINGS = {"repose_frames": 200, "voxel_buf_cap": 3}


def feed(
    cache: StreamCache, walk: Walk, first: int, shift: float = 0.0, beside: bool = False
) -> torch.Tensor:
    """Two frames whose places are believed to lie `shift` further along the corridor.

    beside: as in `worlds_of_tokens.feed`.
    """
    q, k, v, places = walk.frames(first, 2)
    by = torch.tensor([shift, 0, 0])
    cache.begin(2, walk.tokens)
    out = [cache.attend(i, q[i, None], k[i, None], v[i, None])[0] for i in range(walk.network.layers)]
    pose = torch.eye(4).repeat(2, 1, 1)
    pose[:, :3, 3] = by
    if beside:
        cache.catch_up()
    cache.settle(
        replace(places, points=places.points + by, camera=places.camera + by), Cameras(pose[:, 0], pose)
    )
    return torch.stack(out)


def poses(cache: StreamCache, shift: float, since: int = 0) -> torch.Tensor:
    """The poses of all frames, those from frame `since` on moved by `shift`."""
    moved = cache.camera_tokens.poses
    moved[cache.camera_tokens.frames >= since, 0, 3] += shift
    return moved


def alike(before: dict[str, torch.Tensor], after: dict[str, torch.Tensor]) -> bool:
    return before.keys() == after.keys() and all(
        torch.equal(before[name].nan_to_num(), after[name].nan_to_num()) for name in before
    )


def held(cache: StreamCache) -> int:
    return cache.voxels.rows.tokens(cache.voxels.rows.of_voxels(cache.voxels.grid.voxels).flatten())


def test_poses_that_stay_move_nothing():
    cache = StreamCache(parity(**SETTINGS), WALK.network, KERNELS)
    for first in range(0, 40, 2):
        feed(cache, WALK, first)
    before = deepcopy(numbers(cache.state()))
    cache.follow(poses(cache, 0.0))
    assert alike(before, numbers(cache.state()))


def test_tokens_that_are_still_to_be_merged_move_too():
    ours, theirs = (StreamCache(parity(window_size=4, **SETTINGS), WALK.network, KERNELS) for _ in range(2))
    for cache in (ours, theirs):
        for first in range(0, 48, 2):
            feed(cache, WALK, first, 1.5 if first >= 24 else 0.0, beside=cache is ours)
        cache.follow(poses(cache, -1.5, since=24))
    assert alike(numbers(ours.state()), numbers(theirs.state()))


def test_a_stream_that_moves_as_a_whole_goes_on_as_before():
    still, moved = (StreamCache(parity(**SETTINGS), WALK.network, KERNELS) for _ in range(2))
    for first in range(0, 60, 2):
        if first == 30:
            moved.follow(poses(moved, 4.0))
            moved.voxels.check()
        expected = feed(still, WALK, first)
        assert torch.equal(feed(moved, WALK, first, 4.0 if first >= 30 else 0.0), expected)
    keys = [c.voxels.grid.key[c.voxels.grid.voxels] for c in (still, moved)]
    assert torch.equal(unpack(keys[0]) + torch.tensor([8, 0, 0]), unpack(keys[1]))  # 4 in voxels of 0.5
    live = [c.live().voxel for c in (still, moved)]
    assert torch.equal(live[0] == NOWHERE, live[1] == NOWHERE)
    placed = live[0] != NOWHERE
    assert torch.equal(unpack(live[0][placed]) + torch.tensor([8, 0, 0]), unpack(live[1][placed]))


@pytest.mark.parametrize("host", [0, 1 << 20])
def test_corrections_one_after_the_other_add_up(host):
    """Also those of spilled voxels; the third correction says that the second was right."""
    config = limited(20_000, WALK, host_budget=host, **SETTINGS) if host else parity(**SETTINGS)
    cache = StreamCache(config, WALK.network, KERNELS)
    for first in range(0, 60, 2):
        feed(cache, WALK, first)
    grids = cache.voxels.grid, cache.voxels.room.host.grid
    before = [grid.key[grid.voxels] for grid in grids]
    assert bool(host) == bool(len(before[1]))
    for shift in (4.0, 3.0, 0.0):
        cache.follow(poses(cache, shift))
        cache.voxels.check()
    for grid, old in zip(grids, before, strict=True):
        assert torch.equal(unpack(grid.key[grid.voxels]), unpack(old) + torch.tensor([14, 0, 0]))


@pytest.mark.parametrize("extra", [0, 1 << 20, 60_000], ids=["free", "roomy", "tight"])
def test_places_seen_before_and_after_a_drift_meet_again(extra):
    """One lap of 24 frames, then another that is believed to lie three voxels aside."""
    config = limited(extra, WALK, host_budget=20_000, **SETTINGS) if extra else parity(**SETTINGS)
    cache = StreamCache(config, WALK.network, KERNELS)
    for first in range(0, 48, 2):
        feed(cache, WALK, first, 1.5 if first >= 24 else 0.0)
    before, tokens = cache.stats(), held(cache)
    cache.follow(poses(cache, -1.5, since=24))
    cache.voxels.check()
    after = cache.stats()
    assert after.voxels < before.voxels
    if extra != 60_000:
        assert held(cache) == tokens and after.forgotten == 0
    if extra:
        assert after.bytes <= config.memory_budget
    assert torch.equal(cache.camera_tokens.poses, torch.eye(4).expand(48, 4, 4))
    for first in range(48, 60, 2):
        assert feed(cache, WALK, first).isfinite().all()
        cache.voxels.check()


def test_without_voxels_nothing_moves():
    cache = StreamCache(parity(**SETTINGS), WALK.network, KERNELS)
    q, k, v, places = WALK.frames(0, 2)
    cache.begin(2, WALK.tokens)
    for i in range(WALK.network.layers):
        cache.attend(i, q[i, None], k[i, None], v[i, None])
    pose = torch.eye(4).repeat(2, 1, 1)
    nowhere = replace(places, valid=torch.zeros_like(places.valid))
    cache.settle(nowhere, Cameras(pose[:, 0], pose))
    cache.follow(poses(cache, 1.0))
    assert (cache.live().voxel == NOWHERE).all() and cache.stats().voxels == 0
    assert feed(cache, WALK, 2, 1.0).isfinite().all()


@pytest.mark.parametrize(
    "changes",
    [
        {"stale_after": 2},
        {"pivot_bits": 4, "buffer_bits": 8, "pivot_rounding": "stochastic"},
        {"stale_after": 2, "host_budget": 20_000},
    ],
    ids=str,
)
def test_a_loaded_stream_moves_like_an_uninterrupted_one(tmp_path, changes):
    settings = {**SETTINGS, **changes}
    config = limited(60_000, WALK, **settings) if "host_budget" in changes else parity(**settings)
    cache = StreamCache(config, WALK.network, KERNELS)
    for first in range(0, 48, 2):
        feed(cache, WALK, first, 1.5 if first >= 24 else 0.0)
    write_state(tmp_path / "stream", cache.state(), {})
    resumed = StreamCache(config, WALK.network, KERNELS)
    resumed.restore(read_state(tmp_path / "stream", {}, torch.device("cpu")))
    for stream in (cache, resumed):
        stream.follow(poses(stream, -1.5, since=24))
        assert config.memory_budget <= 0 or stream.stats().bytes <= config.memory_budget
    assert alike(numbers(cache.state()), numbers(resumed.state()))
    for first in range(48, 60, 2):
        assert torch.equal(feed(cache, WALK, first), feed(resumed, WALK, first))


@settings(max_examples=15, deadline=None)
@given(
    seed=st.integers(0, 999),
    length=st.sampled_from([4.0, 8.0]),
    extra=st.sampled_from([6_000, 10_000, 20_000]),
    order=st.sampled_from(["coarsen,spill,forget", "spill,coarsen,forget"]),
    host=st.sampled_from([5_000, 1 << 24]),
)
def test_no_voxel_lies_within_another_wherever_they_are(seed, length, extra, order, host):
    """Among the spilled ones too, while little room makes voxels wider and corrections move them."""
    walk = Walk(small_network(layers=1, heads=1, dim=8), patches=8, length=length, pace=1.0, seed=seed)
    changes = {**SETTINGS, "host_budget": host, "when_full": order, "coarsen_levels": 1 + seed % 3}
    cache, shift = StreamCache(limited(extra, walk, **changes), walk.network, KERNELS), 0.0
    for first in range(0, 40, 2):
        feed(cache, walk, first, shift)
        cache.voxels.check()
        if first % 10 == 8:
            by = (seed % 5 - 2) / 2
            cache.follow(poses(cache, by, since=first // 2))
            cache.voxels.check()
            shift += by


def test_a_move_that_fails_leaves_the_stream_as_it_was(monkeypatch):
    cache = StreamCache(parity(**SETTINGS), WALK.network, KERNELS)
    for first in range(0, 48, 2):
        feed(cache, WALK, first, 1.5 if first >= 24 else 0.0)
    before = deepcopy(numbers(cache.state()))
    fuse = RoomMaker.fuse

    def fail(*arguments):
        fuse(*arguments)
        raise MemoryError

    monkeypatch.setattr(RoomMaker, "fuse", fail)
    with pytest.raises(MemoryError):
        cache.follow(poses(cache, -1.5, since=24))
    assert alike(before, numbers(cache.state()))


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 999), count=st.integers(1, 30))
def test_cells_within_wider_ones_are_found(seed, count):
    generator = torch.Generator().manual_seed(seed)
    level = torch.randint(0, 3, (count,), generator=generator)
    cells = torch.randint(-5, 5, (count, 3), generator=generator)
    keys, levels = within_wider(pack(cells), level)
    known = {(int(n), *c) for n, c in zip(level, cells.tolist(), strict=True)}
    for cell, own, key, found in zip(cells, level.tolist(), keys, levels.tolist(), strict=True):
        expected = max(n for n in range(own, 3) if (n, *(cell >> (n - own)).tolist()) in known)
        assert found == expected and int(pack(cell >> (expected - own))) == int(key)
