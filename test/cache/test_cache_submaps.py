"""Streams in submaps: one world over all of them, and a camera that is followed further than without."""

from __future__ import annotations

from dataclasses import fields

import numpy as np
import pytest
import torch
from tiny import synthetic_frames, tiny_network

from stac_core import Config, StreamSession, load_network
from stac_core.config import NETWORKS, CacheConfig, ImageConfig, ModelConfig, SubmapConfig
from stac_core.evaluation.alignment import Similarity
from stac_core.evaluation.datasets import open_sequence
from stac_core.geometry import decode_pose, invert_pose, unproject_depth
from stac_core.training.figures import path_error, turn_error

ALWAYS = 1e-6  # a reach that every chunk of two frames exceeds


@pytest.fixture(scope="module")
def network():
    return tiny_network()


def session_for(network, reach=ALWAYS, **settings) -> StreamSession:
    cache = {"window_size": 2, "chunk_size": 2, "hh_size": 1, "retrieval_size": 1, "edge_test": 0.0}
    return StreamSession(
        network,
        Config(
            cache=CacheConfig(**{**cache, **settings}),
            image=ImageConfig(size=70),
            submap=SubmapConfig(reach),
        ),
    )


def steps(session, frames):
    return [session.step(frames[i : i + 2]) for i in range(0, len(frames), 2)]


def assert_equal(a, b):
    for field in fields(a):
        mine, theirs = getattr(a, field.name), getattr(b, field.name)
        assert (mine is None) == (theirs is None)
        assert mine is None or torch.equal(mine, theirs), field.name


@pytest.mark.parametrize("positions", ["depth", "points"])
def test_submaps_are_streams_of_their_own_joined_at_a_frame_that_both_have(network, positions):
    """Put together here from separate streams: by the pose of the common frame and its median depth."""
    frames = synthetic_frames(8, 48, 64)
    joined = steps(session_for(network, positions=positions), frames)
    world = Similarity(np.eye(3), np.zeros(3))
    for number, ours in enumerate(joined):
        alone = session_for(network, reach=0.0, positions=positions)
        first = 2 * number
        if number:
            again, before = alone.step(frames[first - 1 : first]), joined[number - 1]
            ratio = float((before.depth[-1] / again.depth[0]).median())
            local, last = (p.world_from_camera.double().numpy() for p in (again, before))
            rotation = last[-1, :3, :3] @ local[0, :3, :3].T
            shift = last[-1, :3, 3] - ratio * rotation @ local[0, :3, 3]
            world = Similarity(rotation, shift, ratio)
        theirs = alone.step(frames[first : first + 2])
        poses = world.apply_poses(theirs.world_from_camera.double().numpy())
        np.testing.assert_allclose(ours.world_from_camera, poses, rtol=1e-4, atol=1e-4)
        np.testing.assert_allclose(ours.depth, world.scale * theirs.depth, rtol=1e-4)
        assert torch.equal(ours.intrinsics, theirs.intrinsics)
        assert torch.equal(ours.depth_confidence, theirs.depth_confidence)
        if positions == "points":
            points = world.apply(theirs.points.double().numpy())
            np.testing.assert_allclose(ours.points, points, rtol=1e-3, atol=1e-3)
        else:
            cloud = unproject_depth(theirs.depth, theirs.intrinsics, theirs.world_from_camera)
            ours_cloud = unproject_depth(ours.depth, ours.intrinsics, ours.world_from_camera)
            np.testing.assert_allclose(ours_cloud, world.apply(cloud.double().numpy()), rtol=1e-3, atol=1e-3)
        decoded, _ = decode_pose(ours.pose_encoding, *ours.depth.shape[-2:])
        torch.testing.assert_close(decoded, ours.world_from_camera, rtol=1e-4, atol=1e-4)


def test_a_camera_that_stays_stays_in_its_submap(network):
    frames = synthetic_frames(8, 48, 64)
    session, single = session_for(network, reach=1e6), session_for(network, reach=0.0)
    for ours, theirs in zip(steps(session, frames), steps(single, frames), strict=True):
        assert_equal(ours, theirs)
    assert session.stats().submaps == single.stats().submaps == 1


def test_frames_are_counted_through_all_submaps_and_memory_is_of_the_present_one(network):
    session = session_for(network, mode="causal", repose_frames=9)
    steps(session, synthetic_frames(8, 48, 64))
    stats, (numbers, _) = session.stats(), session.repose()
    assert (stats.cache.frames_seen, stats.submaps) == (8, 4)
    assert numbers.tolist() == [5, 6, 7]  # the last frame of the third submap is the first of the fourth
    whole = session_for(network, reach=0.0, mode="causal", repose_frames=9)
    steps(whole, synthetic_frames(8, 48, 64))
    assert 8 * stats.cache.live_tokens == 3 * whole.stats().cache.live_tokens
    with pytest.raises(ValueError, match=r"frame = 6.*submap.reach = 0"):
        session.pin(6)


def test_poses_read_again_lie_in_the_same_world(network):
    """Those of a stream of the second submap's frames alone, moved by one similarity."""
    frames = synthetic_frames(4, 48, 64)
    session, alone = (session_for(network, r, mode="causal", repose_frames=9) for r in (ALWAYS, 0.0))
    first, second = steps(session, frames)
    again = alone.step(frames[1:2])
    alone.step(frames[2:])
    numbers, poses = session.repose()
    scale = float((first.depth[-1] / again.depth[0]).median())
    inside = [invert_pose(p[:1]) @ p for p in (poses, alone.repose()[1])]
    inside[1][:, :3, 3] *= scale
    assert numbers.tolist() == [1, 2, 3]
    torch.testing.assert_close(*inside, rtol=1e-3, atol=1e-3)
    assert (poses[1:] - second.world_from_camera).abs().max() > 1e-5  # it knows more now


def test_a_stream_goes_on_after_a_failure_wherever_it_happens(network, monkeypatch):
    """A step that begins a submap runs the network twice; either run may fail, and both may fail again."""
    frames = synthetic_frames(8, 48, 64)
    expected = steps(session_for(network), frames)
    session, forward = session_for(network), network.depth_head.forward
    ours = steps(session, frames[:2])
    for first in range(2, 8, 2):
        for good_calls in (0, 1, 0):
            calls = iter(range(99))

            def fails(*arguments, calls=calls, good_calls=good_calls):
                if next(calls) >= good_calls:
                    raise MemoryError
                return forward(*arguments)

            with monkeypatch.context() as patch, pytest.raises(MemoryError):
                patch.setattr(network.depth_head, "forward", fails)
                session.step(frames[first : first + 2])
            with pytest.raises(ValueError, match="in a stream of"):
                session.step([frames[0][:40]])
        ours.append(session.step(frames[first : first + 2]))
    for a, b in zip(ours, expected, strict=True):
        assert_equal(a, b)
    assert session.stats().submaps == 4


@pytest.mark.parametrize("saved_after", [2, 4, 6])
def test_a_saved_stream_goes_on_in_the_same_world(network, tmp_path, saved_after):
    frames = synthetic_frames(10, 48, 64)
    session, resumed = session_for(network), session_for(network)
    steps(session, frames[:saved_after])
    session.save(tmp_path / "stream")
    resumed.load(tmp_path / "stream")
    for a, b in zip(steps(session, frames[saved_after:]), steps(resumed, frames[saved_after:]), strict=True):
        assert_equal(a, b)
    assert resumed.stats().submaps == session.stats().submaps
    with pytest.raises(ValueError, match=r"submap.reach = 1e-06 \(here 0.5\)"):
        session_for(network, reach=0.5).load(tmp_path / "stream")


def test_a_reset_begins_in_a_world_of_its_own(network):
    frames = synthetic_frames(6, 48, 64)
    session = session_for(network)
    steps(session, frames)
    session.reset()
    assert (session.stats().submaps, session.stats().cache.frames_seen) == (1, 0)
    for a, b in zip(steps(session, frames), steps(session_for(network), frames), strict=True):
        assert_equal(a, b)


def test_without_any_valid_depth_lengths_stay_as_they_are(network, monkeypatch):
    frames = synthetic_frames(6, 48, 64)
    session, forward = session_for(network), network.depth_head.forward
    steps(session, frames[:4])
    with monkeypatch.context() as patch:
        patch.setattr(network.depth_head, "forward", lambda *a: tuple(0 * t for t in forward(*a)))
        blind = session.step(frames[4:])
    assert blind.world_from_camera.isfinite().all() and (blind.depth == 0).all()
    assert session.step(frames[4:]).depth.isfinite().all()


@pytest.mark.parametrize("reach", [-2.0, -0.5, float("nan")])
def test_an_impossible_reach_is_refused(reach):
    with pytest.raises(ValueError, match=r"SubmapConfig\.reach = "):
        SubmapConfig(reach)


def test_networks_that_were_not_measured_keep_one_submap():
    auto = SubmapConfig()
    assert [auto.reach_of(NETWORKS[name]) for name in ("stream3r", "streamvggt")] == [0.0, 0.0]
    assert auto.reach_of(NETWORKS["embedded"]) > 0
    assert SubmapConfig(0.0).reach_of(NETWORKS["embedded"]) == 0.0


def test_the_bundled_model_follows_a_camera_further_with_submaps_than_without():
    """A walk that leaves its first view behind; the path is judged after a similarity fit."""
    walk = open_sequence("world:50,frames=64,height=126,width=168,step_max=0.03")
    frames = [walk.frame(i) for i in range(len(walk))]
    truth = np.stack([frame.world_from_camera for frame in frames])
    loaded = load_network(ModelConfig(device="cpu"))

    def errors(reach: float) -> tuple[float, float]:
        session = StreamSession(loaded.network, Config(submap=SubmapConfig(reach)))
        images = [frame.image for frame in frames]
        chunks = [session.step(images[i : i + 4]).world_from_camera for i in range(0, len(images), 4)]
        path = torch.cat(chunks).double().numpy()
        return turn_error(path, truth), path_error(path, truth)

    (turn, path), (turn_single, path_single) = errors(-1.0), errors(0.0)
    print(f"turn {turn:.1f}° against {turn_single:.1f}°, path {path:.4f} against {path_single:.4f}")
    assert turn < 0.7 * turn_single and path < 0.3 * path_single
