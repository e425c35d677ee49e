"""The byte limit: never exceeded, kept by spilling, coarsening and forgetting, in the order asked for."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from cache.worlds_of_tokens import KERNELS, Walk, feed, numbers, parity, run, small_network

from stac_core.cache.memory_model import live_bytes
from stac_core.cache.saved_state import read_state, write_state
from stac_core.cache.spilled import SpilledVoxel
from stac_core.cache.stream_cache import StreamCache
from stac_core.cache.voxel_keys import pack, unpack
from stac_core.cache.voxel_memory import Evicted, VoxelMemory

ENDLESS = Walk(small_network(layers=1, dim=8), patches=8)  # a corridor without end
CPU = torch.device("cpu")
LOOP = replace(ENDLESS, length=12.0, pace=1.0)


def limited(extra: int, walk: Walk = ENDLESS, **settings):
    """Settings whose limit leaves `extra` bytes to the voxel memory."""
    plain = parity(**settings)
    live = live_bytes(plain, walk.network, walk.tokens, torch.float32)
    return parity(memory_budget=live + extra, **settings)


def explore(config, frames: int, walk: Walk = ENDLESS) -> StreamCache:
    """A stream that asserts its limit after every pass, by the count of the allocators themselves."""
    cache = StreamCache(config, walk.network, KERNELS)
    for first in range(0, frames, config.chunk_size):
        out = feed(cache, walk, first, min(config.chunk_size, frames - first))
        assert out.isfinite().all()
        stats = cache.stats()
        assert stats.bytes <= config.memory_budget, f"frame {first}"
        assert stats.host_bytes <= config.host_budget
    cache.voxels.check()
    return cache


@pytest.mark.parametrize("extra", [0, 30_000])
@pytest.mark.parametrize("allocator", ["static", "segment"])
def test_an_endless_path_never_exceeds_the_limit(extra, allocator):
    stats = explore(limited(extra, allocator=allocator, voxel_buf_cap=3), 80).stats()
    assert stats.coarsened_voxels or stats.forgotten or not extra
    if extra:
        assert stats.retrieved_tokens and stats.pivot_slots


@pytest.mark.slow
@pytest.mark.timeout(1800)  # 80 seconds of one idle core
@pytest.mark.parametrize("bits", [16, 4])
def test_ten_thousand_frames_never_exceed_the_limit(bits):
    config = limited(
        100_000, pivot_bits=bits, buffer_bits=max(8, bits) if bits < 16 else 16, host_budget=50_000
    )
    stats = explore(config, 10_000).stats()
    assert stats.frames_seen == 10_000 and stats.spilled_voxels and stats.forgotten


def test_the_limit_holds_when_all_blocks_come_back():
    """Free blocks take bytes of their own, in the stack that finds them."""
    limit = 20_000
    memory = VoxelMemory(parity(), 3, 8, torch.float32, CPU, KERNELS)
    memory.begin(torch.arange(4), limit=limit)
    pool, taken = memory.rows.kinds["buffers"].pool, []
    while memory.room.reserve({"buffers": 1}):
        taken.append(pool.take(1))
    full = memory.bytes
    pool.give_back(torch.cat(taken))
    assert full + 4 * len(taken) == memory.bytes
    assert limit - pool.block_bytes < memory.bytes <= limit


@pytest.mark.parametrize(
    "settings", [{}, {"mode": "xstream"}, {"pinned_frames": 2, "pivot_bits": 4}], ids=str
)
def test_where_no_limit_is_given_a_stream_takes_half_of_what_is_free_beyond_its_live_cache(settings):
    config = parity(voxel_buf_cap=3, **settings)
    live = live_bytes(config, ENDLESS.network, ENDLESS.tokens, torch.float32)
    cache = StreamCache(config, ENDLESS.network, KERNELS, free=live + 60_000)
    for first in range(0, 80, config.chunk_size):
        assert feed(cache, ENDLESS, first, config.chunk_size).isfinite().all()
        stats = cache.stats()
        assert stats.byte_limit == live + 30_000 and stats.bytes <= stats.byte_limit, first
    assert stats.coarsened_voxels or stats.forgotten or not config.rules.voxels


@pytest.mark.parametrize(
    "settings", [{"mode": "causal"}, {"retrieval_size": -1}, {"memory_budget": 0}], ids=str
)
def test_what_cannot_have_a_limit_or_is_to_have_none_has_none(settings):
    cache = StreamCache(parity(**settings), ENDLESS.network, KERNELS, free=1)
    for first in range(0, 40, 2):
        feed(cache, ENDLESS, first, 2)
    assert cache.stats().byte_limit == 0 and cache.stats().bytes > 60_000


def test_a_limit_far_away_changes_nothing():
    (near, expected), cache = (
        run(parity(), LOOP, 40),
        StreamCache(parity(), LOOP.network, KERNELS, free=10**9),
    )
    out = torch.cat([feed(cache, LOOP, first, 2) for first in range(0, 40, 2)], 2)
    assert torch.equal(out, expected)
    assert replace(cache.stats(), byte_limit=0) == near.stats() and cache.stats().byte_limit > 0


def test_less_free_memory_than_the_live_cache_takes_is_told_with_what_helps():
    cache = StreamCache(parity(), ENDLESS.network, KERNELS, free=1000)
    with pytest.raises(ValueError, match=r"memory_budget = -1, which gives 1000 here: .*lower image.size"):
        feed(cache, ENDLESS, 0, 2)


def test_a_stream_saved_where_there_was_more_memory_goes_on_where_it_just_fits():
    """Nothing of it is lost; a limit that was given and does not hold it is refused instead."""
    plain = parity(voxel_buf_cap=3)
    saved, _ = run(plain, ENDLESS, 60)
    live = live_bytes(plain, ENDLESS.network, ENDLESS.tokens, torch.float32)
    needed = live + saved.stats().voxel_bytes
    here = StreamCache(plain, ENDLESS.network, KERNELS, free=needed + 10_000)
    here.restore(saved.state())
    assert numbers(here.state()["spatial"]).keys() == numbers(saved.state()["spatial"]).keys()
    assert here.stats().voxels == saved.stats().voxels
    for first in range(60, 80, 2):
        feed(here, ENDLESS, first, 2)
        assert here.stats().bytes <= here.stats().byte_limit <= needed + 10_000
    given = StreamCache(replace(plain, memory_budget=live + 1000), ENDLESS.network, KERNELS)
    with pytest.raises(ValueError, match=r"beside \d+ that the voxel memory has taken.*nearest value"):
        given.restore(saved.state())


def test_forgetting_alone_when_asked_for():
    stats = explore(limited(20_000, when_full="forget"), 80).stats()
    assert stats.forgotten and not stats.coarsened_voxels


def test_coarsening_goes_before_forgetting_and_keeps_what_tokens_stand_for():
    cache = explore(limited(30_000, coarsen_levels=3, voxel_buf_cap=3), 60)
    stats = cache.stats()
    assert stats.coarsened_voxels
    assert cache.voxels.grid.level.max() >= 1
    if not stats.forgotten:
        assert stats.inserted == stats.merged + stats.buffered + stats.gated


def test_a_new_place_within_voxels_made_wider_for_it_belongs_to_these():
    memory = VoxelMemory(parity(coarsen_levels=1, voxel_num=1), 1, 4, torch.float32, CPU, KERNELS)
    old, new = pack(torch.tensor([[0, 0, 0], [1, 0, 0]])), pack(torch.tensor([[0, 1, 0]]))
    tokens = torch.randn(1, 2, 4, generator=torch.Generator().manual_seed(0))
    memory.begin(old)
    memory.insert(Evicted(tokens, tokens, torch.ones(1, 2), old[None]))
    memory.begin(new, limit=memory.bytes)
    memory.check()
    assert memory.room.counts.coarsened == 2
    assert memory.grid.find(new).tolist() == memory.grid.find(old[:1]).tolist() == memory.grid.voxels.tolist()


def test_wide_cells_lie_far_from_the_camera():
    cache = explore(limited(30_000, coarsen_levels=1, voxel_buf_cap=3), 60)
    grid = cache.voxels.grid
    along = (unpack(grid.key[grid.voxels])[:, 0] + 0.5) * 2.0 ** grid.level[grid.voxels] * 0.5
    wide = grid.level[grid.voxels] > 0
    assert wide.any() and along[wide].mean() < along[~wide].mean()


def test_spilled_voxels_come_back_as_they_were():
    """On a loop every place is seen again, so a limit with enough host memory loses nothing."""
    settings = {"host_budget": 1 << 24, "when_full": "spill,coarsen,forget", "voxel_buf_cap": 3}
    free, expected = run(parity(voxel_buf_cap=3), LOOP, 60)
    config = limited(free.stats().voxel_bytes * 6 // 7, LOOP, **settings)
    cache, out = run(config, LOOP, 60)
    stats = cache.stats()
    assert stats.spilled_voxels and stats.reloaded_voxels
    assert not stats.forgotten and not stats.coarsened_voxels
    assert torch.equal(out, expected)


def test_what_was_spilled_is_read_onto_the_host_alone(tmp_path):
    """On a device that holds nothing everything else loses its content."""
    config = limited(9_000, LOOP, host_budget=1 << 24, voxel_buf_cap=3)
    cache, _ = run(config, LOOP, 20)
    host = cache.voxels.room.host
    assert len(host.records) > 10
    write_state(tmp_path / "stream", cache.state(), {})
    state = read_state(tmp_path / "stream", {}, torch.device("meta"))
    devices = {("/host/" in name, tensor.device.type) for name, tensor in numbers(state).items()}
    assert devices == {(True, "cpu"), (False, "meta")}
    resumed = StreamCache(config, LOOP.network, KERNELS)
    resumed.restore(read_state(tmp_path / "stream", {}, CPU))
    # From here on the file is of no use.
    (tmp_path / "stream").write_bytes(bytes((tmp_path / "stream").stat().st_size))
    assert resumed.voxels.room.host.tokens == host.tokens > 0


def test_tokens_of_a_spilled_voxel_are_counted_exactly():
    """However long it has been seen: more of them than a number of 32 bits can tell apart."""
    figures = {"figures": torch.tensor([[2.0**24], [1.0]])}
    record = SpilledVoxel({"buffers": torch.tensor([[True, False]])}, {"pivots": figures}, {})
    assert record.tokens == 2**24 + 2


def test_a_limit_that_is_never_reached_changes_nothing():
    _, expected = run(parity(), LOOP, 60)
    cache, out = run(limited(1 << 24, LOOP), LOOP, 60)
    assert torch.equal(out, expected)
    assert not cache.stats().forgotten


@pytest.mark.parametrize("share", [0.3, 0.7])
def test_a_place_is_on_the_device_or_spilled_but_never_both(share):
    """Also where there is room for some of what comes back only."""
    free, _ = run(parity(voxel_buf_cap=3), LOOP, 60)
    config = limited(
        int(free.stats().voxel_bytes * share), LOOP, host_budget=1 << 24, voxel_buf_cap=3, coarsen_levels=0
    )
    cache = StreamCache(config, LOOP.network, KERNELS)
    for first in range(0, 60, 2):
        feed(cache, LOOP, first, 2)
        grid, host = cache.voxels.grid, cache.voxels.room.host.grid
        here, away = grid.key[grid.voxels], host.key[host.voxels]
        assert len(here.unique()) == len(here) and not torch.isin(here, away).any()
        cache.voxels.check()
    assert cache.stats().reloaded_voxels > 50
