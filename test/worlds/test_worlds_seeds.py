"""A world is its seed: the same in any batch, in any stretch, on any device."""

from __future__ import annotations

import pytest
import torch
from worlds.worlds_views import sample_batch

from stac_core.worlds import World, WorldConfig
from stac_core.worlds.draws import Draws, world_seeds
from stac_core.worlds.world import build_worlds

SIZE = (56, 70)
FIELDS = ("images", "depth", "world_from_camera", "intrinsics")


def test_same_seed_same_batch_other_seed_other_batch() -> None:
    first, again, other = (sample_batch(WorldConfig(), 3, 2, *SIZE, seed=seed) for seed in (5, 5, 6))
    for name in FIELDS:
        assert torch.equal(getattr(first, name), getattr(again, name))
        assert not torch.equal(getattr(first, name), getattr(other, name))


def test_worlds_of_a_batch_differ() -> None:
    batch = sample_batch(WorldConfig(), 16, 2, *SIZE, seed=0)
    means = batch.images.mean((1, 3, 4))
    gaps = torch.cdist(means, means) + torch.eye(16)
    assert gaps.min() > 1e-4


def test_a_world_alone_equals_itself_in_a_batch() -> None:
    seeds = world_seeds(7, 4)
    together = build_worlds(WorldConfig(), seeds).render(torch.arange(2), *SIZE)
    for index in range(4):
        alone = build_worlds(WorldConfig(), seeds[index : index + 1]).render(torch.arange(2), *SIZE)
        assert torch.allclose(alone.depth[0], together.depth[index], rtol=1e-5, atol=1e-5)
        # One step of the JPEG-like quantisation may tip over when sums are ordered otherwise.
        assert (alone.images[0] - together.images[index]).abs().mean() < 1e-4


def test_world_zero_of_a_batch_is_the_world_of_that_seed() -> None:
    batch = sample_batch(WorldConfig(), 2, 3, *SIZE, seed=9)
    world = World(9, WorldConfig()).render(0, 3, *SIZE)
    assert torch.allclose(world.depth[0], batch.depth[0], rtol=1e-5, atol=1e-5)
    assert torch.equal(world.world_from_camera[0], batch.world_from_camera[0])


def test_any_stretch_can_be_rendered_alone() -> None:
    world = World(3, WorldConfig())
    long, short = world.render(0, 6, *SIZE), world.render(4, 6, *SIZE)
    assert torch.allclose(long.depth[:, 4:], short.depth, rtol=1e-5, atol=1e-5)
    assert (long.images[:, 4:] - short.images).abs().mean() < 1e-4


def test_the_first_frames_do_not_depend_on_how_many_follow() -> None:
    short, long = (sample_batch(WorldConfig(), 2, frames, *SIZE, seed=1) for frames in (2, 5))
    assert torch.allclose(short.depth, long.depth[:, :2], rtol=1e-5, atol=1e-5)


def test_autocast_around_the_renderer_changes_nothing() -> None:
    plain = sample_batch(WorldConfig(), 2, 2, *SIZE, seed=2)
    with torch.autocast("cpu", torch.bfloat16):
        inside = sample_batch(WorldConfig(), 2, 2, *SIZE, seed=2)
    assert torch.equal(plain.depth, inside.depth) and torch.equal(plain.images, inside.images)


def test_draws_are_uniform_and_unrelated() -> None:
    draws = Draws(world_seeds(0, 64))
    first, second = draws.uniform(500), draws.uniform(500)
    assert abs(first.mean() - 0.5) < 0.01 and abs(first.var() - 1 / 12) < 0.003
    assert first.min() >= 0 and first.max() < 1
    stacked = torch.stack([first.flatten(), second.flatten(), first.roll(1, 0).flatten()])
    correlation = torch.corrcoef(stacked) - torch.eye(3)
    assert correlation.abs().max() < 0.02


def test_choice_follows_its_weights() -> None:
    picked = Draws(world_seeds(1, 200)).choice([1.0, 0.0, 3.0], 200)
    shares = torch.bincount(picked.flatten(), minlength=3) / picked.numel()
    assert torch.allclose(shares, torch.tensor([0.25, 0.0, 0.75]), atol=0.01)


@pytest.mark.gpu
def test_gpu_sees_the_same_worlds() -> None:
    host = sample_batch(WorldConfig(), 4, 2, 84, 112, seed=5)
    device = sample_batch(WorldConfig(), 4, 2, 84, 112, seed=5, device="cuda")
    assert torch.allclose(host.world_from_camera, device.world_from_camera.cpu(), atol=1e-5)
    off = (host.depth - device.depth.cpu()).abs() > 1e-3 * host.depth.clamp(min=0.1)
    assert off.float().mean() < 2e-3, "only pixels on an edge may fall to either side"
    assert (host.images - device.images.cpu()).abs().mean() < 2e-3
