"""What must hold whatever the input: conservation, order, scale, storage, restarts."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from cache.worlds_of_tokens import KERNELS, Walk, feed, parity, run, small_network
from hypothesis import given, settings
from hypothesis import strategies as st

from stac_core.cache import pages, voxel_memory
from stac_core.cache.memory_model import live_bytes
from stac_core.cache.saved_state import read_state, write_state
from stac_core.cache.stream_cache import StreamCache
from stac_core.cache.voxel_keys import pack
from stac_core.cache.voxel_memory import Evicted, VoxelMemory
from stac_core.config import CacheConfig
from stac_core.kernels.attend import Segment
from stac_core.kernels.attend_torch import explicit
from stac_core.kernels.quantization import Codec

CPU = torch.device("cpu")
WALK = Walk(small_network(), length=3.0)


def tensors_of(thing, seen=None):
    """Every tensor that an object holds, its members included."""
    seen = set() if seen is None else seen
    if id(thing) in seen:
        return []
    seen.add(id(thing))
    if isinstance(thing, torch.Tensor):
        return [thing]
    if isinstance(thing, dict):
        members = list(thing.values())
    elif isinstance(thing, list | tuple):
        members = list(thing)
    else:
        members = (
            list(getattr(thing, "__dict__", {}).values()) if "stac_core" in type(thing).__module__ else []
        )
    return [tensor for member in members for tensor in tensors_of(member, seen)]


@pytest.mark.parametrize("bits", [16, 8])
def test_reported_bytes_are_the_bytes_of_the_tensors(bits):
    coded = {
        name: bits for name in ("window_bits", "anchor_bits", "pinned_bits", "pivot_bits", "buffer_bits")
    }
    switches = {"feedback": 0.5, "norm_keep": True, "stale_after": 2} if bits < 16 else {}
    cache, _ = run(parity(retrieved_bits=bits, **coded, **switches), WALK, 40)
    held = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors_of(cache)}
    stats = cache.stats()
    assert stats.voxels and stats.retrieved_tokens
    # A slice keeps more alive than it shows.
    assert stats.bytes <= sum(held.values()) <= 1.02 * stats.bytes


def test_slots_hold_no_more_memory_than_is_counted():
    """Also where most blocks are taken and the stack of free ones is short."""
    pool = memory().rows.kinds["buffers"].pool
    pool.grow(1000, None)
    taken = pool.take(900)
    for change in (lambda: pool.give_back(taken[:500]), lambda: pool.take(200)):
        held = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors_of(pool)}
        assert sum(held.values()) == pool.bytes
        change()


@settings(max_examples=15, deadline=None)
@given(
    frames=st.integers(1, 24), chunk=st.integers(1, 4), window=st.integers(1, 4), hh=st.integers(0, 2),
    ret=st.integers(-1, 2), buffers=st.integers(2, 5), pivots=st.integers(2, 3), threshold=st.floats(-0.5, 1),
    gate=st.floats(0, 2), seed=st.integers(0, 9), after=st.booleans(), bits=st.sampled_from([16, 8, 4]),
    by=st.sampled_from(["weight", "near", "query"]), score=st.sampled_from(["sum", "mean"]),
    keep_special=st.integers(0, 3), pinned=st.integers(0, 3), norm_keep=st.booleans(),
    stale_after=st.integers(0, 3), feedback=st.sampled_from([0.0, 0.5]),
    subsample=st.sampled_from([1.0, 0.3]), phase=st.sampled_from(["fixed", "rotating"]),
)  # fmt: skip
def test_any_settings_conserve_tokens_and_bound_the_live_cache(
    frames, chunk, window, hh, ret, buffers, pivots, threshold, gate, seed, after, bits, by, score,
    keep_special, pinned, norm_keep, stale_after, feedback, subsample, phase,
):  # fmt: skip
    config = parity(
        chunk_size=chunk, window_size=window, hh_size=hh, retrieval_size=ret, voxel_buf_cap=buffers,
        voxel_piv_cap=pivots, merge_threshold=threshold, gate=gate, retrieve_after_merge=after,
        retrieve_by=by, score=score, pivot_bits=bits, buffer_bits=bits, keep_special=keep_special,
        pinned_frames=pinned, retrieve_buf=after, norm_keep=norm_keep, feedback=feedback,
        stale_after=stale_after, stale_threshold=1.0, subsample=subsample, subsample_phase=phase,
    )  # fmt: skip
    walk = replace(WALK, patches=6, seed=seed)
    cache, out = run(config, walk, frames)
    assert out.isfinite().all()
    stats = cache.stats()
    most = (pinned + window + hh) * walk.tokens + keep_special * 2
    assert stats.live_tokens <= most
    assert stats.live_bytes <= live_bytes(config, walk.network, walk.tokens, torch.float32) or ret < 0
    if cache.voxels:
        cache.voxels.check()
        assert stats.inserted == stats.merged + stats.buffered + stats.gated
        assert cache.retrieved is None or ret < 0 or cache.retrieved.width <= ret * walk.tokens


def memory(**settings) -> VoxelMemory:
    return VoxelMemory(parity(**settings), 3, 8, torch.float32, CPU, KERNELS)


def tokens(count: int, seed: int, voxels: int = 3) -> Evicted:
    generator = torch.Generator().manual_seed(seed)
    centre = torch.randn(3, voxels, 8, generator=generator)
    voxel = torch.randint(-1, voxels, (3, count), generator=generator)
    noise = torch.randn(2, 3, count, 8, generator=generator)
    keys = centre.gather(1, voxel.clamp_min(0)[..., None].expand(-1, -1, 8)) + 0.7 * noise[0]
    score = torch.rand(3, count, generator=generator) + 0.01
    return Evicted(keys, noise[1], score, voxel)


def contents(store: VoxelMemory):
    order = store.grid.voxels[store.grid.key[store.grid.voxels].argsort()]
    return store.rows.read(store.rows.of_voxels(order).flatten()).state


def assert_same(a, b, tolerance=0.0):
    for left, right in zip(a, b, strict=True):
        assert torch.equal(left.isinf(), right.isinf())
        error = (left - right).masked_fill(left.isinf(), 0).abs()
        assert (error <= tolerance * (1 + right.abs().nan_to_num(posinf=0, neginf=0))).all()


@settings(max_examples=10, deadline=None)
@given(seed=st.integers(0, 99), count=st.integers(1, 60))
def test_the_order_of_tokens_in_a_call_does_not_matter(seed, count):
    plain, shuffled = memory(), memory()
    for call in range(3):
        batch = tokens(count, 10 * seed + call)
        order = torch.randperm(count, generator=torch.Generator().manual_seed(seed))
        for store, moved in ((plain, batch), (shuffled, Evicted(*(part[:, order] for part in batch)))):
            store.begin(moved.voxel)
            store.insert(moved)
    assert plain.counts == shuffled.counts
    assert_same(contents(plain), contents(shuffled), 1e-5)


@pytest.mark.parametrize("seed", range(3))
def test_merged_tokens_lie_between_their_members(seed):
    store, seen = memory(gate=0.0), []
    for call in range(5):
        batch = tokens(50, 10 * seed + call)
        store.begin(batch.voxel)
        store.insert(batch)
        seen.append(batch)
    assert store.counts.aggregated and store.counts.merged and store.counts.remerged
    for voxel in range(3):
        number = store.grid.find(torch.tensor([voxel]))
        state = store.rows.read(store.rows.of_voxels(number).flatten()).state
        for lane in range(3):
            held = state.members[lane] > 0
            for part, pivots in (("keys", state.pivot_keys), ("values", state.pivot_values)):
                members = torch.cat([getattr(b, part)[lane][b.voxel[lane] == voxel] for b in seen])
                assert (pivots[lane][held] >= members.amin(0) - 1e-5).all()
                assert (pivots[lane][held] <= members.amax(0) + 1e-5).all()


def test_a_merged_token_weighs_what_it_replaced():
    store = memory(voxel_buf_cap=8)
    key, value = torch.randn(2, 3, 1, 8, generator=torch.Generator().manual_seed(0))
    place = pack(torch.zeros(8, 3, dtype=torch.int64))
    same = Evicted(key.expand(-1, 8, -1), value.expand(-1, 8, -1), torch.ones(3, 8), place.expand(3, -1))
    store.begin(same.voxel)
    store.insert(same)
    found = store.retrieval.retrieve(store.seek(place[:1]).voxels, 4, with_buffer=False)
    assert found.length.tolist() == [1, 1, 1]
    q, other = torch.randn(2, 3, 5, 8, generator=torch.Generator().manual_seed(1))
    rest = Segment(other, other)
    one = explicit(q, [rest, Segment(found.keys, found.values, found.bias)], 1.0, torch.float32)
    many = explicit(q, [rest, Segment(same.keys, same.values)], 1.0, torch.float32)
    torch.testing.assert_close(one.out, many.out)
    torch.testing.assert_close(one.key_mass[1].sum(-1), many.key_mass[1].sum(-1))


def scaled(walk: Walk, factor: float) -> Walk:
    class Scaled(Walk):
        def frames(self, first, count):
            q, k, v, places = super().frames(first, count)
            return q, k, v, replace(places, points=places.points * factor, camera=places.camera * factor)

    return Scaled(walk.network, length=walk.length)


def test_scaling_the_world_with_its_voxels_changes_nothing():
    _, plain = run(parity(), WALK, 30)
    _, other = run(parity(voxel_size=0.5 * 8), scaled(WALK, 8.0), 30)
    assert torch.equal(plain, other)


def test_the_voxel_edge_follows_the_scene_and_stays():
    cache, _ = run(parity(voxel_unit="scene", voxel_size=0.25), WALK, 2)
    assert cache.stats().voxel_edge == 0.25  # the median depth of these worlds is 1
    feed(cache, scaled(WALK, 5.0), 2, 2)
    assert cache.stats().voxel_edge == 0.25


@pytest.mark.parametrize(
    "change",
    [
        {"allocator": "static"},
        {"allocator": "slab"},
        {"voxel_num": 1},
        {"voxel_num": 500},
        {"allocator": "slab", "voxel_buf_cap": 6, "voxel_piv_cap": 3},
    ],
    ids=lambda change: " ".join(f"{name} {value}" for name, value in change.items()),
)
@pytest.mark.parametrize("small", [0, 1 << 20], ids=["many pages", "one page"])
def test_where_tokens_lie_in_memory_changes_nothing(change, small, monkeypatch):
    _, expected = run(parity(**{k: n for k, n in change.items() if k.endswith("cap")}), WALK, 40)
    monkeypatch.setattr(pages, "SMALL", small)
    monkeypatch.setattr(pages, "JOINED", 0)
    cache, out = run(parity(**change), WALK, 40)
    assert torch.equal(out, expected)
    cache.voxels.check()


def test_how_many_rows_merge_at_once_changes_nothing(monkeypatch):
    _, expected = run(parity(), WALK, 40)
    monkeypatch.setattr(voxel_memory, "ROWS_AT_ONCE", 7)
    cache, out = run(parity(), WALK, 40)
    assert torch.equal(out, expected)
    cache.voxels.check()


def test_the_rows_of_one_merge_take_a_small_part_of_a_gpu(monkeypatch):
    def bytes_on(total: int | None) -> int:
        monkeypatch.setattr(voxel_memory, "total_bytes", lambda device: total)
        return voxel_memory.rows_at_once(12, 64, torch.device("cpu")) * 2 * 12 * (64 + 64) * 4

    assert 0.9 * (8 << 30) / 16 < bytes_on(8 << 30) <= (8 << 30) / 16
    assert bytes_on(1 << 40) == bytes_on(None) > bytes_on(24 << 30)
    assert bytes_on(1) > 0


def test_merged_tokens_are_counted_by_what_they_stand_for():
    cache, _ = run(parity(voxel_buf_cap=3), WALK, 40)
    assert cache.stats().members == {}
    members = members_of(cache.voxels)
    expected = {2**i: int(((members >= 2**i) & (members < 2 ** (i + 1))).sum()) for i in range(20)}
    assert cache.stats(members=True).members == {i: n for i, n in expected.items() if n}


def members_of(store: VoxelMemory) -> torch.Tensor:
    members = contents(store).members
    return members[members > 0]


def test_two_runs_are_identical():
    (a, first), (b, second) = (
        run(parity(eviction="random"), WALK, 30),
        run(parity(eviction="random"), WALK, 30),
    )
    assert torch.equal(first, second)
    assert_same(contents(a.voxels), contents(b.voxels))


@pytest.mark.parametrize("eviction", ["score", "recent", "random"])
def test_anchors_follow_the_rule(eviction):
    cache, out = run(parity(eviction=eviction, retrieval_size=0), WALK, 12)
    assert out.isfinite().all()
    live = cache.live().keys
    if eviction == "recent":  # the newest frame before the window, whole
        _, keys, _, _ = WALK.frames(9, 1)
        assert torch.equal(live[:, :, WALK.tokens : 2 * WALK.tokens], keys)


@pytest.mark.parametrize("positions", ["nowhere", "given"])
def test_chunks_without_places_and_short_tails_need_no_care(positions):
    cache = StreamCache(parity(), WALK.network, KERNELS)
    for first, count in ((0, 2), (2, 2), (4, 2), (6, 2), (8, 1)):
        assert feed(cache, WALK, first, count, positions).isfinite().all()
    assert (cache.stats().inserted > 0) == (positions == "given")
    cache.voxels.check()


def test_points_that_are_not_numbers_get_no_place():
    cache = StreamCache(parity(), WALK.network, KERNELS)
    for first in range(0, 10, 2):
        q, k, v, places = WALK.frames(first, 2)
        places.points[:, ::2] = torch.nan
        places.points[:, 1::3] = 1e12
        cache.begin(2, WALK.tokens)
        for i in range(2):
            assert cache.attend(i, q[i, None], k[i, None], v[i, None]).isfinite().all()
        cache.settle(replace(places, camera=places.camera * torch.nan, depth=float("nan")))
    assert cache.stats().unplaced > 50 and cache.stats().inserted > 0
    cache.voxels.check()


@pytest.mark.parametrize("frames", [2, 30])
@pytest.mark.parametrize(
    "extra",
    [
        {},
        {"pivot_bits": 4, "buffer_bits": 8, "window_bits": 8, "anchor_bits": 8, "retrieved_bits": 8},
        {"keep_special": 2},
        {"window_size": 5, "voxel_buf_cap": 3, "eviction": "random"},
        {"mode": "xstream"},
        {"mode": "window_kv"},
        {"mode": "causal"},
    ],
    ids=str,
)
def test_a_saved_stream_goes_on_as_if_uninterrupted(tmp_path, frames, extra):
    config = parity(**extra)
    cache, _ = run(config, WALK, frames)
    write_state(tmp_path / "stream.safetensors", cache.state(), {})
    resumed = StreamCache(config, WALK.network, KERNELS)
    resumed.restore(read_state(tmp_path / "stream.safetensors", {}, CPU))
    for first in range(frames, frames + 20, 2):
        assert torch.equal(feed(cache, WALK, first, 2), feed(resumed, WALK, first, 2))
    a, b = cache.stats(), resumed.stats()
    assert replace(a, live_bytes=0, voxel_bytes=0) == replace(b, live_bytes=0, voxel_bytes=0)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"hh_size": -1}, "hh_size"),
        ({"voxel_size": -0.1}, "voxel_size"),
        ({"mode": "magic"}, "mode"),
        ({"window_bits": 8}, "anchor_bits"),
        ({"memory_budget": 1 << 20, "retrieval_size": -1}, "retrieval_size"),
        ({"memory_budget": 1 << 30, "mode": "causal"}, "memory_budget"),
        ({"when_full": "hope"}, "when_full"),
        ({"subsample": 0.0}, "subsample"),
        ({"pivot_bits": 5}, "pivot_bits"),
        ({"merge_threshold": 1.5}, "merge_threshold"),
        ({"voxel_piv_cap": 1}, "voxel_piv_cap"),
        ({"temperature": 1.5}, "temperature"),
        ({"chunk_size": 0}, "chunk_size"),
    ],
)
def test_settings_that_cannot_work_are_refused_with_what_would(settings, message):
    with pytest.raises(ValueError, match=rf"{message}.*(nearest value that works|choose one of)"):
        CacheConfig(**settings)


def test_a_byte_limit_below_the_live_cache_is_refused_with_the_least_that_works():
    cache = StreamCache(parity(memory_budget=1000), WALK.network, KERNELS)
    with pytest.raises(ValueError, match=r"memory_budget = 1000.*nearest value that works: \d+"):
        feed(cache, WALK, 0, 2)


def test_four_bits_need_an_even_head_width():
    with pytest.raises(ValueError, match=r"even head width.*use 8 bits"):
        Codec(4, 15, torch.float32)


def test_a_frame_pinned_on_the_way_stays_whole():
    cache = StreamCache(parity(retrieval_size=0), WALK.network, KERNELS)
    for first in range(0, 6, 2):
        feed(cache, WALK, first, 2)
    cache.pin(5)
    cache.pin(9)  # still to come
    with pytest.raises(ValueError, match="frame 1 has left the window; pin a frame from 4 on"):
        cache.pin(1)
    for first in range(6, 30, 2):
        feed(cache, WALK, first, 2)
    live = cache.live()
    for place, frame in enumerate((0, 5, 9)):
        _, keys, _, _ = WALK.frames(frame, 1)
        assert torch.equal(live.keys[:, :, place * WALK.tokens : (place + 1) * WALK.tokens], keys)


def test_a_first_pass_that_failed_leaves_no_trace():
    config = parity(window_bits=8, anchor_bits=8, pinned_bits=8)
    cache, expected = StreamCache(config, WALK.network, KERNELS), run(config, WALK, 8)[1]
    q, k, v, _ = WALK.frames(50, 2)
    cache.begin(2, WALK.tokens)
    cache.attend(0, q[0, None], 9 * k[0, None], v[0, None])
    out = [feed(cache, WALK, first, 2) for first in range(0, 8, 2)]
    assert torch.equal(torch.cat(out, 2), expected)
