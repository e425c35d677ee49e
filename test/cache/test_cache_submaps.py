"""Streams in submaps: one world over all of them, and a camera that is followed further than without."""

from __future__ import annotations

import operator
from dataclasses import fields

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tiny import synthetic_frames, tiny_network
from walks import bundled, frames_of, images_of

from stac_core import Config, Prediction, StreamSession
from stac_core.config import NETWORKS, CacheConfig, ImageConfig, SubmapConfig
from stac_core.evaluation.alignment import Similarity
from stac_core.evaluation.datasets import open_sequence
from stac_core.geometry import decode_pose, pose_matrix, rotation_from_quaternion, unproject_depth
from stac_core.keyframes import DISAGREEMENT, Keyframe, Keyframes, disagreement
from stac_core.submaps import Submaps
from stac_core.training.figures import path_error, turn_error

ALWAYS = 1e-4  # a reach that every chunk of two frames exceeds
STILL, TURNED = (0.0, 0.02, 0.0, 1.0), (0.05, -0.1, 0.03, 1.0)  # quaternions xyzw


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
        equal = np.array_equal if isinstance(mine, np.ndarray) else operator.eq
        equal = torch.equal if isinstance(mine, torch.Tensor) else equal
        assert equal(mine, theirs), field.name


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
    session, whole = (session_for(network, reach, mode="causal") for reach in (ALWAYS, 0.0))
    for each in (session, whole):
        steps(each, synthetic_frames(8, 48, 64))
    stats = session.stats()
    assert (stats.cache.frames_seen, stats.submaps) == (8, 4)
    # The present submap: its two frames, and the one before with which it began.
    assert 8 * stats.cache.live_tokens == 3 * whole.stats().cache.live_tokens


def test_frames_are_neither_pinned_nor_posed_again_beyond_their_submap(network):
    session = session_for(network)
    steps(session, synthetic_frames(4, 48, 64))
    with pytest.raises(ValueError, match=r"frame = 3.*submap\.reach = 0"):
        session.pin(3)
    with pytest.raises(ValueError, match=r"repose_frames = 5.*submap\.reach is 0.0001"):
        session_for(network, repose_frames=5)


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


def test_a_jump_is_told_also_where_the_first_step_from_there_fails(monkeypatch, tmp_path):
    images, _ = images_and_poses("world:50,frames=24,height=126,width=168,step_max=0.03")
    images = [*images, *images[22:0:-1]]
    told = []
    session, forward = StreamSession(bundled(), Config()), bundled().depth_head.forward
    for first in range(0, 44, 4):
        calls = iter(range(9))

        def fails(*arguments, calls=calls):
            if next(calls) == 2:  # of a step that goes back, the pass over the chunk itself
                raise MemoryError
            return forward(*arguments)

        failed = False
        with monkeypatch.context() as patch:
            patch.setattr(bundled().depth_head, "forward", fails)
            try:
                prediction = session.step(images[first : first + 4])
            except MemoryError:
                failed = True
        if failed:
            session.save(tmp_path / "stream")
            session.load(tmp_path / "stream")
            prediction = session.step(images[first : first + 4])
        told.append(prediction.continues)
        assert told[-1] != failed
    assert False in told


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
    with pytest.raises(ValueError, match=r"submap.reach = 0.0001 \(here 0.5\)"):
        session_for(network, reach=0.5).load(tmp_path / "stream")


@pytest.mark.parametrize("reach", [ALWAYS, 1e6])
def test_frames_that_could_not_be_kept_were_not_seen(network, monkeypatch, reach):
    """What fails after the network has done its part leaves memory and submaps as they were, too."""
    frames = synthetic_frames(8, 48, 64)
    session, expected = session_for(network, reach), steps(session_for(network, reach), frames)
    ours = []
    for first in range(0, 8, 2):
        with monkeypatch.context() as patch, pytest.raises(MemoryError):
            patch.setattr(Keyframe, "of", raising(MemoryError))
            session.step(frames[first : first + 2])
        assert session.stats().cache.frames_seen == first
        ours.append(session.step(frames[first : first + 2]))
    for a, b in zip(ours, expected, strict=True):
        assert_equal(a, b)


def raising(error):
    def fails(*arguments):
        raise error

    return fails


@pytest.mark.parametrize("lost", ["lies/scale", "first/pixels", "last/pose", "keyframes/depth", "numbers"])
def test_a_saved_stream_that_lacks_part_of_a_submap_is_refused(network, tmp_path, lost):
    session = session_for(network)
    steps(session, synthetic_frames(4, 48, 64))
    session.save(tmp_path / "stream")
    tensors = load_file(tmp_path / "stream")
    del tensors[f"submaps/{lost}"]
    with safe_open(tmp_path / "stream", "pt") as file:
        save_file(tensors, tmp_path / "damaged", file.metadata())
    with pytest.raises(ValueError, match=rf"lacks '{lost.rpartition('/')[2]}'"):
        session.load(tmp_path / "damaged")


@torch.inference_mode()
def test_poses_stay_rigid_however_many_submaps_there_are():
    """The same turn in each of 1000 submaps: what is rounded off adds up unless it is put right."""
    submaps, pixels = Submaps(ALWAYS, 0), torch.zeros(1, 3, 2, 2)
    poses = [pose_matrix(rotation_from_quaternion(torch.tensor(q)), torch.zeros(3)) for q in (STILL, TURNED)]
    ones = torch.ones(1, 2, 2)
    still, turned = (
        Prediction(torch.zeros(1, 9), pose[None], torch.eye(3)[None], ones, ones) for pose in poses
    )
    submaps.follow(pixels, still)
    for _ in range(1000):
        submaps.go_on(still)
        rotation = submaps.follow(pixels, turned).world_from_camera[0, :3, :3]
    torch.testing.assert_close(rotation @ rotation.T, torch.eye(3), rtol=0, atol=2e-6)


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


def test_a_submap_that_began_blindly_ends_with_the_next_frame(network, monkeypatch):
    frames = synthetic_frames(6, 48, 64)
    session, forward = session_for(network, reach=1e6), network.depth_head.forward
    with monkeypatch.context() as patch:
        patch.setattr(network.depth_head, "forward", lambda *a: tuple(0 * t for t in forward(*a)))
        session.step(frames[:2])
    seen = steps(session, frames)
    assert session.stats().submaps == 3  # the second one begins with a blind frame, too
    assert all(prediction.depth.isfinite().all() for prediction in seen)


@pytest.mark.parametrize("reach", [-2.0, -0.5, float("nan")])
def test_an_impossible_reach_is_refused(reach):
    with pytest.raises(ValueError, match=r"SubmapConfig\.reach = "):
        SubmapConfig(reach)


def test_networks_that_were_not_measured_keep_one_submap():
    auto = SubmapConfig()
    assert [auto.reach_of(NETWORKS[name]) for name in ("stream3r", "streamvggt")] == [0.0, 0.0]
    assert auto.reach_of(NETWORKS["embedded"]) > 0
    assert SubmapConfig(0.0).reach_of(NETWORKS["embedded"]) == 0.0


def images_and_poses(walk: str) -> tuple[list[np.ndarray], np.ndarray]:
    """Images of a synthetic world and world_from_camera [S, 4, 4]."""
    frames = frames_of(walk)
    return images_of(frames), np.stack([frame.world_from_camera for frame in frames])


def stream(images, chunk=4, **submap):
    """Predictions of a stream of the bundled model."""
    session = StreamSession(bundled(), Config(submap=SubmapConfig(**submap)))
    return [session.step(images[i : i + chunk]) for i in range(0, len(images), chunk)]


def path_of(predictions) -> np.ndarray:
    return torch.cat([p.world_from_camera for p in predictions]).double().numpy()


def test_the_bundled_model_follows_a_camera_further_with_submaps_than_without():
    """A walk that leaves its first view behind; the path is judged after a similarity fit."""
    images, truth = images_and_poses("world:217,frames=96,height=126,width=168,step_min=0.02,step_max=0.08")
    paths = [path_of(stream(images, reach=reach)) for reach in (-1.0, 0.0)]
    (turn, turn_single), (path, path_single) = (
        [judge(found, truth) for found in paths] for judge in (turn_error, path_error)
    )
    print(f"turn {turn:.1f}° against {turn_single:.1f}°, path {path:.4f} against {path_single:.4f}")
    assert turn < 0.5 * turn_single and path < 0.5 * path_single


def test_a_camera_that_comes_back_is_where_it_was():
    """The same way there and back, twice; keyframes take back what has added up meanwhile."""
    images, truth = images_and_poses("world:50,frames=24,height=126,width=168,step_min=0.02,step_max=0.08")
    order = [*range(24), *range(22, 0, -1)] * 2
    kept, forgotten = (stream([images[i] for i in order], keyframes=count) for count in (64, 0))
    assert [p.continues for p in forgotten] == [True] * len(forgotten)
    assert sum(not p.continues for p in kept) >= 2
    apart, apart_forgotten = (
        np.linalg.norm(path[46, :3, 3] - path[0, :3, 3]) for path in map(path_of, (kept, forgotten))
    )
    path, path_forgotten = (path_error(path_of(p), truth[order]) for p in (kept, forgotten))
    print(f"apart {apart:.3f} against {apart_forgotten:.3f}, path {path:.4f} against {path_forgotten:.4f}")
    assert apart < 0.5 * apart_forgotten and path < 0.8 * path_forgotten


def seen_truly(frame, turned_deg=0.0) -> Prediction:
    """What a perfect network would say of one frame, or one that is wrong about where the camera looks."""
    angle = np.radians(turned_deg)
    turn = np.eye(4)
    turn[:3, :3] = [[np.cos(angle), 0, np.sin(angle)], [0, 1, 0], [-np.sin(angle), 0, np.cos(angle)]]
    pose = torch.from_numpy(frame.world_from_camera @ turn).float()
    depth, intrinsics = torch.from_numpy(frame.depth_m), torch.from_numpy(frame.intrinsics).float()
    return Prediction(
        torch.zeros(1, 9), *(t[None] for t in (pose, intrinsics, depth, torch.ones_like(depth)))
    )


def test_depths_tell_whether_a_camera_is_where_it_is_thought_to_be():
    walk = open_sequence("world:50,frames=4,height=126,width=168,step_max=0.03,defects=0")
    first, last = walk.frame(0), walk.frame(3)
    truly, wrongly, away = (
        float(disagreement(seen_truly(first), seen_truly(last, turn))) for turn in (0, 25, 180)
    )
    assert truly < 0.02 < DISAGREEMENT < wrongly and away == float("inf")


def test_keyframes_that_served_last_are_kept():
    frames = [keyframe_at(float(x), depth=2.0, submap=x) for x in range(4)]
    keyframes = Keyframes(3)
    for frame in (*frames[:3], frames[0], frames[3]):
        keyframes.serve(frame)
    assert len(keyframes) == 3
    assert keyframes.bytes == 3 * 4 * (3 * 2 * 2 + 4 * 4 + 2 * 2)
    assert keyframes.nearest(frames[0], 0.1) is frames[0] and keyframes.nearest(frames[1], 0.1) is None
    assert keyframes.nearest(frames[1], 0.5) in (frames[0], frames[2])  # half a depth away
    again = Keyframes(3)
    again.restore(keyframes.state())
    assert torch.equal(again.nearest(frames[3], 0.1).pose, frames[3].pose)
    keyframes.serve(keyframe_at(1.0, depth=0.0, submap=4))  # nothing valid in it
    assert keyframes.nearest(frames[3], 0.1) is frames[3]
    none = Keyframes(0)
    none.serve(frames[0])
    assert none.nearest(frames[0], 1.0) is None


def test_drift_may_hide_the_nearest_of_those_that_served_long_ago(monkeypatch):
    """They lie at 0, 1, 2 and 3 depths, the camera at 0.8; those that served long ago may be farther away."""
    frames = [keyframe_at(float(x), submap=x) for x in range(4)]
    camera = keyframe_at(0.8)
    keyframes = Keyframes(9)
    assert keyframes.hidden(camera, 0.5) == []
    for frame in frames:
        keyframes.serve(frame)
    monkeypatch.setattr("stac_core.keyframes.DRIFT", 0.1)
    assert keyframes.hidden(camera, 0.45) == [frames[1]]
    assert keyframes.hidden(camera, 0.55) == [frames[1], frames[0]]  # three have served since that one
    keyframes.serve(frames[0])
    assert keyframes.hidden(camera, 0.55) == [frames[1]]
    assert keyframes.hidden(camera, 9.0) == [frames[1], frames[0]]  # no more are worth a pass each
    keyframes.serve(keyframe_at(0.8, depth=0.0, submap=4))  # nothing valid in it
    assert keyframes.hidden(camera, 0.45) == [frames[1]]


def keyframe_at(x: float, depth: float = 1.0, submap: int = 0) -> Keyframe:
    return Keyframe(torch.zeros(1, 3, 2, 2), pose_at(x), torch.full((2, 2), depth), submap)


def pose_at(x: float) -> torch.Tensor:
    pose = torch.eye(4)
    pose[0, 3] = x
    return pose


@pytest.mark.parametrize("alone", [False, True], ids=["whole step", "chunk alone"])
@pytest.mark.parametrize("bad", [0, 4])
def test_poses_that_are_no_numbers_cost_their_own_chunk_alone(network, monkeypatch, bad, alone):
    """The stream begins with the first that are, and goes on from where its submap has begun."""
    frames, cameras = synthetic_frames(10, 48, 64), network.cameras
    session, later = session_for(network), session_for(network)

    def no_numbers(tokens, *arguments):
        given = cameras(tokens, *arguments)
        if tokens.camera.shape[1] == 1 and alone:  # a frame seen before, with which a submap begins
            return given
        return {**given, "world_from_camera": given["world_from_camera"] * torch.nan}

    for first in range(0, 10, 2):
        with monkeypatch.context() as patch:
            if first == bad:
                patch.setattr(network, "cameras", no_numbers)
            prediction = session.step(frames[first : first + 2])
        assert prediction.world_from_camera.isfinite().all() == (first != bad)
        assert prediction.continues == (not bad or first != bad + 2) and prediction.before is None
        if not bad and first:
            assert_equal(prediction, later.step(frames[first : first + 2]))
    assert session.stats().cache.frames_seen == (10 if bad else 8)


def test_a_stream_saved_before_its_camera_came_back_comes_back_when_loaded(tmp_path, monkeypatch):
    """Also where each chunk fails at first, in the pass after those over frames of earlier submaps."""
    images, _ = images_and_poses("world:50,frames=24,height=126,width=168,step_max=0.03")
    images = [*images, *images[22:0:-1]]
    session, resumed = (StreamSession(bundled(), Config()) for _ in range(2))
    for first in range(0, 28, 4):
        session.step(images[first : first + 4])
    session.save(tmp_path / "stream")
    head, forward, came_back = bundled().depth_head, bundled().depth_head.forward, 0

    def fails_for_chunks(layers, *size):
        if layers[0].shape[1] > 1:
            raise MemoryError
        return forward(layers, *size)

    for first in range(28, 44, 4):
        resumed.load(tmp_path / "stream")
        with monkeypatch.context() as patch, pytest.raises(MemoryError):
            patch.setattr(head, "forward", fails_for_chunks)
            resumed.step(images[first : first + 4])
        resumed.save(tmp_path / "stream")
        resumed.load(tmp_path / "stream")
        ours, theirs = (each.step(images[first : first + 4]) for each in (session, resumed))
        assert_equal(ours, theirs)
        came_back += not ours.continues
        resumed.save(tmp_path / "stream")
    assert came_back
