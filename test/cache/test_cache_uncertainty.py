"""Variances of poses: what adds up, for which networks they are said, and along real streams."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from scipy.spatial.transform import Rotation
from tiny import tiny_network
from walks import bundled, frames_of, images_of

from stac_core import Config, Moves, StreamSession
from stac_core.config import CacheConfig, SubmapConfig
from stac_core.keyframes import Keyframe
from stac_core.uncertainty import with_variances

OPEN = "world:6203,frames=24,height=126,width=168,path=explore"


def keyframe(turn: Rotation, place: np.ndarray, submap: int = 0) -> Keyframe:
    pose = np.eye(4)
    pose[:3, :3], pose[:3, 3] = turn.as_matrix(), place
    return Keyframe(torch.zeros(1, 3, 2, 2), torch.from_numpy(pose), torch.ones(2, 2), submap)


def standing(submap: int = 0) -> Keyframe:
    return keyframe(Rotation.identity(), np.zeros(3), submap)


def test_what_adds_up_is_departures_and_squared_lengths():
    """A turn of half a radian and a way of 1.5 depths, then back to the start: twice as much, not none."""
    there = keyframe(Rotation.from_rotvec([0, 0.5, 0]), np.array([0, 0, 3.0]))
    start = replace(standing(), depth=torch.full((2, 2), 2.0))
    once = start.drift_to(there.pose)
    assert np.allclose(once, [0.5 + 1.5, (0.5 + 1.5) * 2**2])
    twice = replace(there, depth=start.depth, drift=once).drift_to(start.pose)
    assert np.allclose(twice, 2 * once)
    shrunk = replace(there, drift=once).moved(replace(Moves.none(1), scale=np.array([0.5])))
    assert np.allclose(shrunk.drift, once * torch.tensor([1, 0.25]))


@pytest.mark.parametrize("config", [Config(submap=SubmapConfig(reach=0.5)), Config(submap=SubmapConfig(0.0))])
def test_nothing_is_said_of_submaps_that_were_not_measured(config):
    images = images_of(frames_of(OPEN))[:2]
    said = StreamSession(bundled(), config).step(images)
    assert said.pose_variance is None and said.step_variance is None


def test_nothing_is_said_of_other_networks():
    images = images_of(frames_of(OPEN))[:2]
    config = Config(cache=CacheConfig(mode="stac"), submap=SubmapConfig(reach=0.25))
    said = StreamSession(tiny_network(), config).step(images)
    assert said.pose_variance is None and said.step_variance is None


def test_variances_grow_along_an_open_walk_and_go_on_where_it_was_saved(tmp_path):
    frames, stream = frames_of(OPEN), StreamSession(bundled(), Config())
    said = [stream.step(images_of(frames[i : i + 4])) for i in range(0, 20, 4)]
    stream.save(tmp_path / "stream")
    again = StreamSession(bundled(), Config())
    again.load(tmp_path / "stream")
    last, loaded = (one.step(images_of(frames[20:24])) for one in (stream, again))
    assert torch.equal(last.pose_variance, loaded.pose_variance)
    ends = torch.stack([p.pose_variance[-1] for p in [*said, last]])
    assert 0 < float(said[0].pose_variance[0].max()) < 1e-4  # the world is fixed to the first camera
    assert (ends[-1] > 2 * ends[0]).all() and stream.stats().submaps > 1


def test_the_steps_of_a_calibrated_camera_are_better_known():
    images = images_of(frames_of(OPEN))[:4]
    said = StreamSession(bundled(), Config()).step(images)
    first = Keyframe(*(torch.zeros(1, 3, 1, 1), said.world_from_camera[0], said.depth[0]))
    known, unknown = (with_variances(said, first, first, lens).step_variance for lens in (True, False))
    assert torch.equal(unknown, said.step_variance)
    assert (known > 0).all() and (known[1:] < unknown[1:]).all()
