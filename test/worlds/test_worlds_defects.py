"""Camera defects: repeatable, bounded, and each one doing what it is named after."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch import Tensor
from worlds.worlds_views import sample_batch

from stac_core.worlds import WorldConfig
from stac_core.worlds.camera_defects import Defects, apply_defects, draw_defects
from stac_core.worlds.draws import Draws, world_seeds

FRAMES = torch.arange(3)


def _cameras(batch: int, strength: float) -> Defects:
    return draw_defects(Draws(world_seeds(0, batch)), strength)


def _only(name: str, value: Tensor | list[float]) -> Defects:
    """A perfect camera with one defect."""
    return dataclasses.replace(_cameras(1, 0.0), **{name: torch.as_tensor(value).reshape(1, -1)})


def _scalar(name: str, value: float) -> Defects:
    return dataclasses.replace(_cameras(1, 0.0), **{name: torch.tensor([value])})


@pytest.fixture(scope="module")
def images() -> Tensor:
    return sample_batch(WorldConfig(defects=0.0), 4, 3, 84, 112, seed=3).images


def test_a_perfect_camera_changes_nothing(images: Tensor) -> None:
    seen = apply_defects(_cameras(4, 0.0), images, FRAMES)
    assert torch.allclose(seen, images, atol=1e-4)


def test_the_same_seed_gives_the_same_defects(images: Tensor) -> None:
    first, again = (apply_defects(_cameras(4, 1.0), images, FRAMES) for _ in range(2))
    assert torch.equal(first, again)


def test_one_camera_alone_equals_itself_in_a_batch(images: Tensor) -> None:
    together = apply_defects(_cameras(4, 1.0), images, FRAMES)
    alone = apply_defects(draw_defects(Draws(world_seeds(0, 4)[2:3]), 1.0), images[2:3, 1:2], FRAMES[1:2])
    assert (alone[0, 0] - together[2, 1]).abs().mean() < 1e-4


def test_defects_stay_in_range_and_are_not_all_the_same(images: Tensor) -> None:
    seen = apply_defects(_cameras(4, 2.0), images, FRAMES)
    assert seen.shape == images.shape and seen.min() >= 0 and seen.max() <= 1 and seen.isfinite().all()
    assert ((seen - images).abs().mean((1, 2, 3, 4)) > 1e-3).all()


def test_noise_has_its_strength_and_differs_between_frames() -> None:
    grey = torch.full((1, 3, 3, 56, 70), 0.5)
    noise = apply_defects(_scalar("noise", 0.03), grey, FRAMES) - grey
    assert abs(noise.std() - 0.03) < 0.002 and noise.mean().abs() < 0.002
    rows = noise.reshape(3, -1)
    assert (torch.corrcoef(rows) - torch.eye(3)).abs().max() < 0.05


def test_vignetting_darkens_the_corners_only() -> None:
    grey = torch.full((1, 3, 3, 56, 70), 0.5)
    seen = apply_defects(_scalar("vignette", 0.5), grey, FRAMES)
    assert seen[..., 28, 35].min() > 0.495
    assert abs(seen[0, 0, 0, 0, 0] - 0.25) < 0.01


def test_exposure_and_white_balance_drift_over_time() -> None:
    grey = torch.full((1, 3, 3, 56, 70), 0.4)
    frames = torch.tensor([0, 10, 20])
    bright = apply_defects(_only("exposure", [0.2, 0.2, 40.0]), grey, frames).mean((0, 2, 3, 4))
    assert bright.max() - bright.min() > 0.03
    colour = apply_defects(_only("balance", [0.05, 0.05, 0.05]), grey, frames).mean((0, 3, 4))
    assert (colour / colour.mean(1, keepdim=True)).std() > 0.005


def test_blur_and_defocus_remove_detail_along_their_direction() -> None:
    def detail(seen: Tensor, axis: int) -> Tensor:
        return seen.diff(dim=axis).abs().mean()

    one = torch.rand(1, 3, 3, 56, 70, generator=torch.Generator().manual_seed(0))
    soft = apply_defects(_scalar("defocus", 0.8), one, FRAMES)
    assert detail(soft, -1) < 0.8 * detail(one, -1) and detail(soft, -2) < 0.8 * detail(one, -2)
    assert abs(soft.mean() - one.mean()) < 2e-3
    shaken = apply_defects(_only("shake", [1.5, 0.0]), one, FRAMES)
    assert detail(shaken, -1) / detail(one, -1) < 0.9 * detail(shaken, -2) / detail(one, -2)


def test_jpeg_leaves_means_of_blocks_and_coarsens_the_rest(images: Tensor) -> None:
    seen = apply_defects(_scalar("jpeg", 0.08), images[:1], FRAMES)
    change = (seen - images[:1]).abs()
    assert 1e-3 < change.mean() < 0.06
    spectrum_before, spectrum_after = (torch.fft.rfft2(value[0, 0, 0]).abs() for value in (images[:1], seen))
    assert spectrum_after[20:60, 20:].sum() < 0.9 * spectrum_before[20:60, 20:].sum()
