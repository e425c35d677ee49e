"""Figures of a reconstruction against cases whose answer is known, and against scipy and evo."""

import math

import numpy as np
import pytest
import torch
from evo.core.geometry import umeyama_alignment
from scipy.spatial.transform import Rotation

from stac_core.training.figures import depth_error, rotation_errors, trajectory_error, turns


def poses(frames: int, seed: int) -> torch.Tensor:
    random = np.random.default_rng(seed)
    result = np.tile(np.eye(4), (frames, 1, 1))
    result[:, :3, :3] = Rotation.random(frames, random).as_matrix()
    result[:, :3, 3] = random.normal(size=(frames, 3)).cumsum(0)
    return torch.from_numpy(result)


def test_depth_error_forgives_one_scale_and_unknown_pixels():
    truth = torch.rand(3, 8, 8) + 1
    valid = torch.rand(3, 8, 8) > 0.5
    assert depth_error(7 * truth.where(valid, 99.0), truth, valid) == pytest.approx(0, abs=1e-6)
    assert depth_error(
        torch.ones(1, 1, 3), torch.tensor([[[1.0, 2.0, 4.0]]]), torch.ones(1, 1, 3, dtype=torch.bool)
    ) == (pytest.approx((1 + 0 + 0.5) / 3))
    assert math.isnan(depth_error(truth, truth, torch.zeros_like(valid)))


def test_rotation_errors_match_scipy():
    truth, estimate = poses(6, 0), poses(6, 1)
    a, b = (Rotation.from_matrix(p[:, :3, :3].numpy()) for p in (estimate, truth))
    expected = ((a[0].inv() * a[1:]).inv() * (b[0].inv() * b[1:])).magnitude()
    assert np.allclose(rotation_errors(estimate, truth).numpy(), np.degrees(expected))
    assert np.allclose(turns(truth).numpy(), np.degrees((b[0].inv() * b[1:]).magnitude()))


def test_trajectory_error_matches_evo():
    truth, estimate = poses(20, 2), poses(20, 3)
    a, b = estimate[:, :3, 3].numpy().T, truth[:, :3, 3].numpy().T
    r, t, c = umeyama_alignment(a, b, with_scale=True)
    rmse = np.sqrt(((c * r @ a + t[:, None] - b) ** 2).sum(0).mean())
    path = np.linalg.norm(np.diff(b, axis=1), axis=0).sum()
    assert trajectory_error(estimate, truth) == pytest.approx(rmse / path)


def test_trajectory_error_forgives_a_similarity_and_needs_motion():
    truth = poses(10, 4)
    moved = poses(1, 5)[0] @ truth
    moved[:, :3, 3] *= 3
    assert trajectory_error(moved, truth) == pytest.approx(0, abs=1e-9)
    assert math.isnan(trajectory_error(truth, truth[:1].expand(10, 4, 4)))
