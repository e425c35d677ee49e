"""Departures from the published method, each a setting of its own: what each one does, and off by default."""

from __future__ import annotations

import math
from copy import deepcopy
from dataclasses import fields, replace

import pytest
import torch
from cache.worlds_of_tokens import KERNELS, Walk, feed, parity, run, small_network
from hypothesis import given, settings
from hypothesis import strategies as st

from stac_core.cache.stream_cache import StreamCache
from stac_core.cache.token_positions import View, token_positions
from stac_core.cache.voxel_grid import Frustum, VoxelGrid
from stac_core.cache.voxel_keys import pack, unpack
from stac_core.cache.voxel_memory import Evicted, VoxelMemory
from stac_core.config import CacheConfig
from stac_core.kernels.attend import Segment
from stac_core.kernels.attend_torch import attend

CPU = torch.device("cpu")
WALK = Walk(small_network(), length=3.0)
SWITCHES = {
    "norm_keep": True,
    "stale_after": 3,
    "feedback": 0.5,
    "prefetch": True,
    "subsample_phase": "rotating",
    "lost_confidence": 1.5,
    "pivot_rounding": "stochastic",
}


def memory(**settings) -> VoxelMemory:
    return VoxelMemory(parity(**settings), 1, 4, torch.float32, CPU, KERNELS)


def insert(store: VoxelMemory, keys: torch.Tensor, score: float = 1.0) -> None:
    """Tokens [n, 4] into one voxel."""
    place = pack(torch.zeros(len(keys), 3, dtype=torch.int64))
    store.begin(place)
    store.insert(Evicted(keys[None], keys[None], torch.full((1, len(keys)), score), place[None]))
    store.check()


def content(store: VoxelMemory):
    return store.rows.read(store.rows.of_voxels(store.grid.voxels).flatten()).state


@pytest.mark.parametrize("name", SWITCHES)
def test_every_switch_is_off_by_default_and_in_parity(name):
    default = {f.name: f.default for f in fields(CacheConfig)}[name]
    assert default in (False, 0, "fixed", "nearest") and getattr(CacheConfig.parity(), name) == default


@pytest.mark.parametrize("bits", [16, 8])
def test_all_switches_together_conserve_tokens_and_survive_saving(bits):
    config = parity(**SWITCHES, subsample=0.5, pivot_bits=bits, buffer_bits=bits)
    cache, out = run(config, WALK, 30)
    assert out.isfinite().all() and cache.stats().merged
    cache.voxels.check()
    resumed = StreamCache(config, WALK.network, KERNELS)
    resumed.restore(deepcopy(cache.state()))
    for first in range(30, 40, 2):
        assert torch.equal(feed(cache, WALK, first, 2), feed(resumed, WALK, first, 2))


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 999), spread=st.floats(0.05, 1.5), calls=st.integers(1, 6))
def test_keys_keep_the_mean_length_of_their_members(seed, spread, calls):
    generator = torch.Generator().manual_seed(seed)
    plain, kept = (
        memory(norm_keep=on, voxel_buf_cap=4, voxel_piv_cap=2, merge_threshold=0.5) for on in (False, True)
    )
    centre, lengths = torch.randn(4, generator=generator), []
    for _ in range(calls):
        keys = centre + spread * torch.randn(9, 4, generator=generator)
        lengths.append(keys.norm(dim=-1))
        for store in (plain, kept):
            insert(store, keys)
    assert plain.counts == kept.counts
    a, b = content(plain), content(kept)
    held = a.members > 0
    torch.testing.assert_close(b.pivot_keys[..., :-1], a.pivot_keys, rtol=1e-4, atol=1e-5)  # the plain mean
    torch.testing.assert_close(b.pivot_values[..., :-1], a.pivot_values, rtol=1e-4, atol=1e-5)
    stored = kept.retrieval.retrieve(kept.grid.voxels, 4, with_buffer=False).keys.norm(dim=-1)
    stored = stored[stored > 0]
    assert len(stored) == int(held.sum())
    everything = torch.cat(lengths)
    assert (stored >= everything.min() * (1 - 1e-4)).all() and (stored <= everything.max() * (1 + 1e-4)).all()
    means = a.pivot_keys[held].norm(dim=-1)
    assert (stored.sort().values >= means.sort().values * (1 - 1e-4)).all()


def test_a_kept_length_is_the_weighted_mean():
    store = memory(norm_keep=True, voxel_buf_cap=2)
    keys = torch.tensor([[3.0, 0, 0, 0], [0, 1.0, 0, 0]])
    insert(store, keys)
    weights = torch.tensor([math.e, 1.0])  # exp of the cosines to the best, which is the first
    found = store.retrieval.retrieve(store.grid.voxels, 1, with_buffer=False).keys[0, 0]
    assert float(found.norm()) == pytest.approx(
        float((weights * torch.tensor([3.0, 1.0])).sum() / weights.sum())
    )


@pytest.mark.parametrize(
    ("cosine", "pause", "merged"),
    [(0.85, 1, 1), (0.85, 5, 0), (0.95, 5, 1), (0.5, 1, 0)],
)
def test_what_has_not_been_touched_for_long_takes_only_what_is_very_alike(cosine, pause, merged):
    store = memory(voxel_buf_cap=2, stale_after=3, gate=0.0)
    insert(store, torch.eye(4)[[0, 0]])
    for _ in range(pause - 1):
        store.begin(torch.empty(0, dtype=torch.int64))
    token = torch.tensor([[cosine, (1 - cosine**2) ** 0.5, 0, 0]])
    insert(store, token)
    assert store.counts.merged == merged
    assert store.counts.merged + store.counts.buffered == 3


def test_a_stale_merged_token_is_fresh_again_when_something_joins_it():
    store = memory(voxel_buf_cap=2, stale_after=2, gate=0.0)
    insert(store, torch.eye(4)[[0, 0]])
    for turn in range(1, 9):
        alike = 0.85 if turn % 2 else 1.0
        insert(store, torch.tensor([[alike, (1 - alike**2) ** 0.5, 0, 0]]))
        assert store.counts.merged == turn


@pytest.mark.parametrize(("rounding", "follows"), [("nearest", False), ("stochastic", True)])
def test_many_small_updates_of_a_coded_token_are_not_lost(rounding, follows):
    """Single tokens pull a heavy merged one from one key to another, each by less than half a step."""
    settings = {"voxel_buf_cap": 40, "merge_threshold": 0.5, "gate": 0.0}
    exact = memory(**settings)
    coded = VoxelMemory(
        parity(pivot_bits=4, pivot_rounding=rounding, **settings), 1, 4, torch.float32, CPU, KERNELS,
        torch.ones(1, 4),
    )  # fmt: skip
    start, goal = torch.tensor([[1.0, 0.0, 0.2, -1.0]]), torch.tensor([[1.0, 0.5, 0.2, -1.0]])
    for store in (exact, coded):
        insert(store, start.repeat(40, 1))
        for _ in range(60):
            insert(store, goal)
    moved, true = (float(content(store).pivot_keys[0, 0, 1]) for store in (coded, exact))
    assert true > 0.25
    assert (abs(moved - true) < 0.15) == follows


def test_a_stale_threshold_below_the_ordinary_one_is_refused():
    with pytest.raises(ValueError, match=r"stale_threshold = 0.5: .*nearest value that works: 0.8"):
        CacheConfig(stale_after=1, stale_threshold=0.5)


def test_attention_received_adds_to_the_weight_of_what_was_retrieved():
    received = []

    def recorded(q, segments, *rest):
        result = attend(q, segments, *rest)
        received.append([mass.sum(-1) for mass in result.key_mass])
        return result

    config, added = parity(feedback=0.25, voxel_buf_cap=3), []
    cache = StreamCache(config, WALK.network, replace(KERNELS, attend=recorded))
    for first in range(0, 16, 2):
        received.clear()
        if cache.voxels is not None:
            add = VoxelMemory.add_weight
            cache.voxels.add_weight = lambda slots, weight, add=add, of=cache.voxels: (
                added.append(weight.clone()), add(of, slots, weight)
            )  # fmt: skip
        had_set = cache.retrieved is not None and cache.retrieved.width > 0
        live = cache.stats().live_tokens + 2 * WALK.tokens
        added.clear()
        before = weights(cache)
        feed(cache, WALK, first, 2)
        if had_set:
            # Of all attention on retrieved tokens, a quarter, in units of the average live token's.
            expected = 0.25 * torch.cat([layer[-1] for layer in received]) * live / (2 * WALK.tokens)
            torch.testing.assert_close(added[0].sum(-1), expected)
            assert weights(cache) >= before
    assert had_set


def weights(cache: StreamCache) -> float:
    return float(content(cache.voxels).weight.sum()) if cache.voxels is not None else 0.0


@pytest.mark.parametrize("share", [0.25, 0.5])
def test_over_a_round_every_query_counts_once(share):
    q, k, v = torch.randn(3, 2, 512, 16, generator=torch.Generator().manual_seed(0))
    config = parity(subsample=share, subsample_phase="rotating")
    cache = StreamCache(config, WALK.network, KERNELS)
    full = attend(q, [Segment(k, v)], True)
    masses = []
    for moment in range(round(1 / share)):
        cache._moment = moment
        out, mass = cache._attend(q, [Segment(k, v)])
        torch.testing.assert_close(out, full.out)
        masses.append(mass[0])
    assert not torch.allclose(masses[0], masses[1])
    torch.testing.assert_close(torch.stack(masses).mean(0), full.key_mass[0], rtol=1e-4, atol=1e-5)


def test_a_chunk_of_low_confidence_gets_no_place():
    depth = torch.ones(1, 28, 28)
    arguments = dict(patch_size=14, special_tokens=2, least_confidence=0.0, edge_test=0.0, view=None)
    for lost_confidence, lost in ((0.0, False), (1.2, False), (1.6, True)):
        found = token_positions(
            torch.zeros(1, 28, 28, 3), torch.full((1, 28, 28), 1.5), depth, torch.zeros(3),
            lost_confidence=lost_confidence, **arguments,
        )  # fmt: skip
        assert found.lost == lost and bool(found.valid[:, 2:].any()) != lost


def test_while_tracking_is_lost_the_last_places_stay_in_view():
    cache, _ = run(parity(voxel_buf_cap=3), WALK, 12)
    inserted = cache.stats().inserted
    for first in range(12, 24, 2):
        q, k, v, places = WALK.frames(first, 2)
        cache.begin(2, WALK.tokens)
        for i in range(2):
            assert cache.attend(i, q[i, None], k[i, None], v[i, None]).isfinite().all()
        cache.settle(replace(places, valid=torch.zeros_like(places.valid), lost=True))
        assert cache.stats().retrieved_tokens > 0
    assert cache.stats().inserted - inserted < 12 * WALK.tokens * 4  # only what had been placed before


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 999), level=st.integers(0, 2), edge=st.floats(0.05, 2))
def test_a_frustum_holds_what_projects_into_the_image(seed, level, edge):
    generator = torch.Generator().manual_seed(seed)
    cells = torch.randint(-8, 8, (60, 3), generator=generator)
    keys = pack(cells).unique()
    grid = VoxelGrid(CPU)
    grid.grow(len(keys))
    grid.add(keys, level, 0)
    rotation, _ = torch.linalg.qr(torch.randn(3, 3, generator=generator))
    pose = torch.eye(4)
    pose[:3, :3], pose[:3, 3] = rotation, torch.randn(3, generator=generator)
    frustum = Frustum(pose, torch.tensor([0.9, 0.6]), torch.tensor(7.0 * edge))
    found = set(grid.inside(frustum, edge).tolist())
    for key in keys:
        cell = unpack(key)
        x, y, z = (rotation.T @ (((cell + 0.5) * 2**level * edge) - pose[:3, 3])).tolist()
        margin = min(abs(z), abs(z - 7 * edge), abs(abs(x) - 0.9 * z), abs(abs(y) - 0.6 * z))
        if margin > 1e-3 * edge:
            middle = int(pack(cell * 2**level + 2**level // 2))
            assert (middle in found) == (0 < z <= 7 * edge and abs(x) <= 0.9 * z and abs(y) <= 0.6 * z)


def turning(prefetch: bool) -> StreamCache:
    """A camera that turns on the spot by a right angle per pass and sees one place in each direction."""
    walk = Walk(small_network(), patches=10, noise=0.1)
    cache = StreamCache(parity(prefetch=prefetch, voxel_size=0.5, voxel_buf_cap=2), walk.network, KERNELS)
    for step in range(9):
        q, k, v, places = walk.frames(8 * (step % 4), 2)
        angle = math.pi / 2 * (step % 4)
        pose = torch.eye(4)
        pose[0, 0] = pose[2, 2] = math.cos(angle)
        pose[0, 2], pose[2, 0] = math.sin(angle), -math.sin(angle)
        spread = torch.rand(2, walk.tokens, 3, generator=torch.Generator().manual_seed(step % 4)) - 0.5
        points = (spread + torch.tensor([0, 0, 9.0])) @ pose[:3, :3].T
        view = View(pose, torch.tensor([0.5, 0.5]))
        cache.begin(2, walk.tokens)
        for i in range(2):
            cache.attend(i, q[i, None], k[i, None], v[i, None])
        cache.settle(replace(places, points=points, camera=pose[:3, 3], view=view))
    return cache


def test_prefetch_brings_what_comes_into_view():
    """The last pass looked along z after a whole turn; the next one would look along x."""
    for prefetch in (False, True):
        cache = turning(prefetch)
        grid = cache.voxels.grid
        touched = unpack(grid.key[grid.voxels[grid.visited[grid.voxels] == cache.voxels.moment]])
        assert (touched[:, 2] > 10).any()
        assert bool((touched[:, 0] > 10).any()) == prefetch
        assert not (touched[:, 2] < -10).any()
