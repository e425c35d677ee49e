"""Voxels that move with the frames that saw them, when the poses of these are corrected."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from cache.test_cache_budget import limited
from cache.worlds_of_tokens import KERNELS, Walk, parity, small_network
from hypothesis import given, settings
from hypothesis import strategies as st

from stac_core.cache.camera_tokens import Cameras
from stac_core.cache.making_room import RoomMaker
from stac_core.cache.moving import within_wider
from stac_core.cache.stream_cache import StreamCache
from stac_core.cache.voxel_keys import NOWHERE, pack, unpack

WALK = Walk(small_network(), length=6.0, pace=0.5)
SETTINGS = {"repose_frames": 200, "voxel_buf_cap": 3}


def feed(cache: StreamCache, walk: Walk, first: int, shift: float = 0.0) -> torch.Tensor:
    """Two frames whose places are believed to lie `shift` further along the corridor."""
    q, k, v, places = walk.frames(first, 2)
    by = torch.tensor([shift, 0, 0])
    cache.begin(2, walk.tokens)
    out = [cache.attend(i, q[i, None], k[i, None], v[i, None])[0] for i in range(walk.network.layers)]
    pose = torch.eye(4).repeat(2, 1, 1)
    pose[:, :3, 3] = by
    cache.settle(
        replace(places, points=places.points + by, camera=places.camera + by), Cameras(pose[:, 0], pose)
    )
    return torch.stack(out)


def poses(cache: StreamCache, shift: float, since: int = 0) -> torch.Tensor:
    """The poses of all frames, those from frame `since` on moved by `shift`."""
    moved = cache.camera_tokens.poses
    moved[cache.camera_tokens.frames >= since, 0, 3] += shift
    return moved


def numbers(state) -> list[torch.Tensor]:
    return [t for v in state.values() for t in (numbers(v) if isinstance(v, dict) else [v])]


def held(cache: StreamCache) -> int:
    return cache.voxels.rows.tokens(cache.voxels.rows.of_voxels(cache.voxels.grid.voxels).flatten())


def test_poses_that_stay_move_nothing():
    cache = StreamCache(parity(**SETTINGS), WALK.network, KERNELS)
    for first in range(0, 40, 2):
        feed(cache, WALK, first)
    before = [t.clone() for t in numbers(cache.state())]
    cache.follow(poses(cache, 0.0))
    assert all(
        torch.equal(a.nan_to_num(), b.nan_to_num())
        for a, b in zip(before, numbers(cache.state()), strict=True)
    )


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


def test_a_move_that_fails_leaves_the_stream_as_it_was(monkeypatch):
    cache = StreamCache(parity(**SETTINGS), WALK.network, KERNELS)
    for first in range(0, 48, 2):
        feed(cache, WALK, first, 1.5 if first >= 24 else 0.0)
    before = [t.clone() for t in numbers(cache.state())]
    fuse = RoomMaker.fuse

    def fail(*arguments):
        fuse(*arguments)
        raise MemoryError

    monkeypatch.setattr(RoomMaker, "fuse", fail)
    with pytest.raises(MemoryError):
        cache.follow(poses(cache, -1.5, since=24))
    assert all(
        torch.equal(a.nan_to_num(), b.nan_to_num())
        for a, b in zip(before, numbers(cache.state()), strict=True)
    )


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
