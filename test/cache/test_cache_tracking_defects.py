"""Odd cameras and depths: poses that are refined stay poses, or what is wrong is said."""

from __future__ import annotations

import cv2
import numpy as np
import pytest
import torch
from tiny import synthetic_frames, tiny_network

from stac_core import Config, Prediction, StreamSession
from stac_core.camera_fit import Landmarks, fit_camera
from stac_core.camera_tracker import CameraTracker
from stac_core.config import CacheConfig, ImageConfig, TrackingConfig
from stac_core.geometry import encode_pose

HEIGHT, WIDTH, MOST = 70, 84, 60


def lens(focal: float) -> np.ndarray:
    return np.array([[focal, 0, WIDTH / 2], [0, focal, HEIGHT / 2], [0, 0, 1]])


def said(depth: torch.Tensor) -> Prediction:
    """Of one frame [1, H, W] by a network to which the camera stands still."""
    poses, intrinsics = torch.eye(4)[None], torch.from_numpy(lens(80.0)).float()[None]
    encoding = encode_pose(poses, intrinsics, HEIGHT, WIDTH)
    return Prediction(
        world_from_camera=poses,
        pose_encoding=encoding,
        intrinsics=intrinsics,
        depth=depth,
        depth_confidence=torch.ones_like(depth),
    )


def blurred_noise(seed: int) -> np.ndarray:
    """An image [210, 280] in [0, 1] full of corners."""
    noise = cv2.GaussianBlur(np.random.default_rng(seed).random((210, 280), np.float32), (0, 0), 2)
    return (noise - noise.min()) / np.ptp(noise)


def test_landmarks_of_almost_no_known_distance_still_tell_a_camera():
    """Far from where they were first seen, their covariance is singular to rounding."""
    random = np.random.default_rng(0)
    position = random.uniform((-1, -1, 2), (1, 1, 4), (40, 3))
    landmarks = Landmarks(position, position + random.normal(0, 1e8, (40, 3)), np.full(40, 0.01))
    fit = fit_camera(np.eye(4), landmarks, position[:, :2] / position[:, 2:], 500.0)
    assert np.isfinite(fit.landmarks.position).all()
    np.testing.assert_allclose(fit.camera_from_world, np.eye(4), atol=1e-6)


def test_depths_without_end_leave_the_lengths_of_the_others():
    tracker, (image,) = CameraTracker(MOST), synthetic_frames(1, HEIGHT, WIDTH)
    pixels = torch.from_numpy(image).permute(2, 0, 1)[None] / 255
    endless = torch.full((1, HEIGHT, WIDTH), 2.0)
    endless[:, ::2] = endless[:, 1::4] = torch.inf
    tracker.refine(pixels, said(torch.full_like(endless, 2.0)))
    for _ in range(3):
        placed = tracker.refine(pixels, said(endless))
        torch.testing.assert_close(placed.depth, endless)


@pytest.mark.parametrize("focal", [1e-46, 1e-3, 1e12, 1e300])
def test_a_lens_that_no_camera_has_is_refused_and_leaves_the_stream(focal):
    config = Config(
        cache=CacheConfig(chunk_size=2), image=ImageConfig(size=70), tracking=TrackingConfig(MOST)
    )
    network, frames = tiny_network(), synthetic_frames(4, HEIGHT, WIDTH)
    session, plain = StreamSession(network, config), StreamSession(network, config)
    for each in (session, plain):
        each.step(frames[:2], lens(80.0))
    with pytest.raises(ValueError, match=r"(?s)intrinsics.*radians"):
        session.step(frames[2:], lens(focal))
    assert torch.equal(
        session.step(frames[2:], lens(80.0)).pose_encoding, plain.step(frames[2:], lens(80.0)).pose_encoding
    )


def test_after_a_jump_corners_found_by_chance_tell_nothing():
    """No corner of the last frame is in this one; some seem to be. The pose moves on as the network says."""
    tracker = CameraTracker(300)
    before, after = (torch.from_numpy(blurred_noise(seed)).expand(1, 3, -1, -1) for seed in (0, 1))
    depth = torch.full((1, *before.shape[-2:]), 2.0)
    tracker.refine(before, said(depth))
    placed = tracker.refine(after, said(depth))
    torch.testing.assert_close(placed.world_from_camera, torch.eye(4)[None])
    placed = tracker.refine(after, said(depth))
    torch.testing.assert_close(placed.world_from_camera, torch.eye(4)[None], atol=1e-4, rtol=0)
    assert len(tracker) > 100
