"""Retrieval by distance: nearest first, wherever the world lies, and where nothing is near."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from cache.worlds_of_tokens import KERNELS, Walk, parity, small_network

from stac_core.cache.stream_cache import StreamCache
from stac_core.cache.voxel_keys import pack
from stac_core.cache.voxel_memory import Evicted, VoxelMemory

WALK = Walk(small_network())
SIDE = 5  # of a cube of voxels with one merged token each


def cube(corner: int) -> tuple[VoxelMemory, torch.Tensor]:
    """A memory of a cube of voxels, and their distances from its middle, both in order of the voxels."""
    memory = VoxelMemory(parity(voxel_buf_cap=2), 1, 4, torch.float32, torch.device("cpu"), KERNELS)
    cells = torch.cartesian_prod(*[torch.arange(SIDE)] * 3)
    keys = pack(cells + corner).repeat_interleave(2)  # two tokens make one merged one
    values = torch.arange(SIDE**3, dtype=torch.float32).repeat_interleave(2)[:, None].expand(-1, 4)
    memory.begin(keys)
    memory.insert(Evicted(torch.ones(1, len(keys), 4), values[None], torch.ones(1, len(keys)), keys[None]))
    return memory, (cells - SIDE // 2).float().norm(dim=-1)


@pytest.mark.parametrize("corner", [-2, 3_000, -20_000, 1_000_000])
def test_the_nearest_come_first_wherever_the_world_lies(corner):
    """The seeds are many enough for a matrix product to be tempting; all but one repeat the middle."""
    memory, distance = cube(corner)
    seeds = pack(torch.full((40, 3), corner + SIDE // 2))
    found = memory.retrieval.retrieve(memory.grid.voxels, SIDE**3, with_buffer=False, seeds=seeds)
    order = found.values[0, :, 0].round().long()
    assert found.length.tolist() == [SIDE**3]
    torch.testing.assert_close(distance[order], distance.sort().values)


def test_without_seeds_or_voxels_weight_decides():
    memory, _ = cube(0)
    nowhere = torch.empty(0, dtype=torch.int64)
    a = memory.retrieval.retrieve(memory.grid.voxels, 9, with_buffer=False, seeds=nowhere)
    b = memory.retrieval.retrieve(memory.grid.voxels, 9, with_buffer=False)
    assert torch.equal(a.values, b.values)
    none = memory.retrieval.retrieve(
        nowhere, 9, with_buffer=True, seeds=pack(torch.zeros(1, 3, dtype=torch.int64))
    )
    assert none.length.tolist() == [0]


@pytest.mark.parametrize("after_merge", [False, True])
def test_a_pass_without_places_retrieves_nothing_and_the_stream_goes_on(after_merge):
    config = parity(
        retrieve_by="near", voxel_buf_cap=2, window_size=1, chunk_size=1, retrieve_after_merge=after_merge
    )
    cache = StreamCache(config, WALK.network, KERNELS)
    for frame in range(12):
        q, k, v, places = WALK.frames(frame, 1)
        if frame == 8:
            places = replace(places, valid=torch.zeros_like(places.valid))
        cache.begin(1, WALK.tokens)
        for i in range(WALK.network.layers):
            assert cache.attend(i, q[i, None], k[i, None], v[i, None]).isfinite().all()
        cache.settle(places)
        assert frame < 6 or (cache.stats().retrieved_tokens == 0) == (frame == 8), frame
    cache.voxels.check()
