"""Attention lent to a pass as a whole: a stream sees and remembers the same as if asked layer by layer."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from cache.worlds_of_tokens import Walk, parity, small_network
from network.emulated_tape import EmulatedTape
from tiny import golden_images, tiny_network

from stac_core.cache.stream_cache import StreamCache
from stac_core.chunk_positions import positions_of
from stac_core.config import CacheConfig
from stac_core.kernels.attend_listed import Counted, ListedKernels, Listing
from stac_core.kernels.select import select_kernels
from stac_core.network.recorded import RecordedForward

LAYERS, FEW = 2, {"voxel_size": 2.0, "voxel_buf_cap": 3}
TRITON = select_kernels("triton", "cpu")
NETWORK = small_network(layers=LAYERS)
WALK = Walk(NETWORK, patches=6, pace=0.1)
SETTINGS = {
    "stac": {},
    "a quarter of the mass": {"subsample": 0.25},
    "feedback": {"feedback": 0.5},
    "special tokens kept": {"keep_special": 2},
    "no voxels": {"mode": "window_kv"},
    "pruned": {"mode": "xstream", "importance": "mass"},
}


def settings_of(name):
    own = SETTINGS[name]
    if "mode" not in own:
        return parity(**FEW, **own)
    return parity(**own)


def camera_questions(frames):
    """q, k, v of every iteration and block [iterations, blocks, 3, heads, frames, D]."""
    width = 2 * NETWORK.width // NETWORK.camera_heads
    shape = (NETWORK.camera_iterations, NETWORK.camera_blocks, 3, NETWORK.camera_heads, frames, width)
    return torch.randn(shape, generator=torch.Generator().manual_seed(frames))


def walk(config, lent):
    """Ten frames by two, then one; → all answers, and the memory at the end."""
    cache, answers, opened, lends = StreamCache(config, NETWORK, TRITON), [], {}, 0
    for first, frames in ((0, 2), (2, 2), (4, 2), (6, 2), (8, 2), (10, 1), (11, 2)):
        q, k, v, places = WALK.frames(first, frames)
        plan = cache.plan() if lent else None
        cache.begin(frames, WALK.tokens)
        source = cache
        if plan is not None:
            source = opened.setdefault((plan, frames), plan.open(q.device))
            cache.lend(source)
            lends += 1
        for layer in range(LAYERS):
            answers.append(source.attend(layer, q[layer][None], k[layer][None], v[layer][None]))
        for iteration, blocks in enumerate(camera_questions(frames)):
            for block, qkv in enumerate(blocks):
                answers.append(source.attend_camera(iteration, block, *qkv[:, None]))
        if plan is not None:
            source.finish()
        cache.settle(places)
        if first == 4:
            cache.pin(5)
    assert not lent or (lends == 6 and len({plan for plan, _ in opened}) == 2)  # more pins, another plan
    return answers, cache


@pytest.mark.parametrize("name", SETTINGS)
def test_a_lent_memory(name):
    asked, of_asked = walk(settings_of(name), lent=False)
    answered, of_lent = walk(settings_of(name), lent=True)
    for expected, found in zip(asked, answered, strict=True):
        assert torch.equal(found, expected)
    for expected, found in zip(of_asked.live(), of_lent.live(), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-6, atol=0, equal_nan=True)
    assert of_lent.stats() == of_asked.stats()


@torch.library.custom_op("stac_test::attend_listed", mutates_args=("counted_q", "lse"))
def attend_listed(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, listed: torch.Tensor,
    counted_q: torch.Tensor | None, lse: torch.Tensor | None,
    biased: list[bool], grows: int, subsample: float, most_keys: int,
) -> torch.Tensor:  # fmt: skip
    """An operation that the tape can write down, as a graph holds a kernel."""
    counted = None if counted_q is None or lse is None else Counted(counted_q, lse)
    listing = Listing(tuple(biased), grows, None if counted is None else subsample, most_keys)
    return TRITON.listed.attend(q, k, v, listed, listing, counted).clone()


@torch.library.custom_op("stac_test::mass_listed", mutates_args=("mass",))
def mass_listed(
    q: torch.Tensor, lse: torch.Tensor, listed: torch.Tensor, mass: torch.Tensor,
    biased: list[bool], grows: int, subsample: float, most_keys: int,
) -> None:  # fmt: skip
    listing = Listing(tuple(biased), grows, subsample, most_keys)
    TRITON.listed.sum_mass(Counted(q, lse), listed, listing, mass)


def numbers_of(listing):
    return list(listing.biased), listing.grows, listing.subsample or 1.0, listing.most_keys


def attend_on_tape(q, k, v, listed, listing, counted):
    return attend_listed(q, k, v, listed, *(counted or (None, None)), *numbers_of(listing))


def mass_on_tape(counted, listed, listing, mass):
    mass_listed(*counted, listed, mass, *numbers_of(listing))


@torch.inference_mode()
@pytest.mark.parametrize("camera_cache", ["per_iteration", pytest.param("shared", marks=pytest.mark.slow)])
def test_passes_are_recorded_with_their_attention(camera_cache):
    network, tape = tiny_network(camera_cache), EmulatedTape()
    forward = RecordedForward(network, tape)
    kernels = replace(TRITON, listed=ListedKernels(attend_on_tape, mass_on_tape))
    config = CacheConfig(mode="stac", chunk_size=1, window_size=1, hh_size=1, retrieval_size=1,
                         edge_test=0.0, voxel_conf=0.0)  # fmt: skip
    ours, theirs = (StreamCache(config, network.config, kernels) for _ in range(2))
    for chunk in golden_images(8)[..., :28, :28].repeat(1, 2, 1, 1, 1)[:, :5].split(1, dim=1):
        found, expected = forward(chunk, ours), network(chunk, theirs)
        assert torch.equal(found.depth, expected.depth)
        assert torch.equal(found.pose_encoding, expected.pose_encoding)
        for stream, seen in ((ours, found), (theirs, expected)):
            stream.settle(positions_of(seen.map(lambda t: t[0]), config, network.config))
    assert ours.stats(members=True) == theirs.stats(members=True) and ours.stats().retrieved_tokens
    assert all(key[2] is not None and recorded is not None for key, recorded in forward.passes.items())


@pytest.mark.parametrize(
    "settings",
    [
        {"mode": "causal"},
        {"mode": "stac", "window_bits": 8, "anchor_bits": 8},
        {"mode": "stac", "retrieve_by": "query"},
        {"mode": "stac", "subsample_phase": "rotating"},
        {"mode": "xstream"},
    ],
    ids=str,
)
def test_what_cannot_be_lent_is_asked_for(settings):
    cache = StreamCache(CacheConfig(**settings), NETWORK, TRITON)
    q, k, v, places = WALK.frames(0, 1)
    cache.begin(1, WALK.tokens)
    for layer in range(LAYERS):
        cache.attend(layer, q[layer][None], k[layer][None], v[layer][None])
    cache.settle(places)
    assert cache.plan() is None
    assert StreamCache(CacheConfig(), NETWORK, select_kernels("torch", "cpu")).plan() is None
