"""Figures of a reconstruction against cases whose answer is known, and against scipy and evo."""

import math

import numpy as np
import pytest
from evo.core.geometry import umeyama_alignment
from scipy.spatial.transform import Rotation

from stac_core.training.figures import Figures, depth_error, mean_figures, path_error, turn_error


def poses(frames: int, seed: int) -> np.ndarray:
    random = np.random.default_rng(seed)
    result = np.tile(np.eye(4), (frames, 1, 1))
    result[:, :3, :3] = Rotation.random(frames, random).as_matrix()
    result[:, :3, 3] = random.normal(size=(frames, 3)).cumsum(0)
    return result


def test_depth_error_forgives_one_scale_and_unknown_pixels():
    random = np.random.default_rng(0)
    truth = random.uniform(1, 2, (3, 8, 8))
    truth[random.random(truth.shape) > 0.5] = 0
    assert depth_error(np.where(truth > 0, 7 * truth, 99.0), truth) == pytest.approx(0, abs=1e-6)
    assert depth_error(np.ones((1, 1, 3)), np.array([[[1.0, 2.0, 4.0]]])) == pytest.approx((1 + 0 + 0.5) / 3)
    assert math.isnan(depth_error(truth, np.zeros_like(truth)))


def test_turn_error_matches_scipy():
    truth, estimate = poses(6, 0), poses(6, 1)
    a, b = (Rotation.from_matrix(p[:, :3, :3]) for p in (estimate, truth))
    expected = ((a[0].inv() * a[1:]).inv() * (b[0].inv() * b[1:])).magnitude()
    assert turn_error(estimate, truth) == pytest.approx(np.degrees(expected).mean())
    still = np.tile(np.eye(4), (6, 1, 1))
    assert turn_error(still, truth) == pytest.approx(np.degrees((b[0].inv() * b[1:]).magnitude()).mean())


def test_path_error_matches_evo():
    truth, estimate = poses(20, 2), poses(20, 3)
    a, b = estimate[:, :3, 3].T, truth[:, :3, 3].T
    r, t, c = umeyama_alignment(a, b, with_scale=True)
    rmse = np.sqrt(((c * r @ a + t[:, None] - b) ** 2).sum(0).mean())
    length = np.linalg.norm(np.diff(b, axis=1), axis=0).sum()
    assert path_error(estimate, truth) == pytest.approx(rmse / length)


def test_path_error_forgives_a_similarity_and_needs_motion():
    truth = poses(10, 4)
    moved = poses(1, 5)[0] @ truth
    moved[:, :3, 3] *= 3
    assert path_error(moved, truth) == pytest.approx(0, abs=1e-9)
    assert math.isnan(path_error(truth, np.tile(truth[:1], (10, 1, 1))))
    assert path_error(np.tile(truth[:1], (10, 1, 1)), truth) == 1


def test_means_leave_out_what_a_sequence_cannot_tell():
    mean = mean_figures([Figures(0.1, 0.3, 2, 8, math.nan), Figures(0.3, 0.5, 4, 10, 0.2)])
    assert mean == Figures(pytest.approx(0.2), pytest.approx(0.4), 3, 9, pytest.approx(0.2))
