"""Landmarks from frame to frame: poses nearer the truth than given, alone and in whole streams."""

from __future__ import annotations

import functools
from copy import copy
from dataclasses import dataclass, fields, replace

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from scipy.spatial.transform import Rotation
from walks import bundled

from stac_core import Config, Prediction, StreamSession
from stac_core.cache.stream_cache import StreamCache
from stac_core.camera_tracker import CameraTracker
from stac_core.config import CacheConfig, TrackingConfig
from stac_core.evaluation.datasets import open_sequence
from stac_core.geometry import decode_pose, encode_pose, unproject_depth
from stac_core.keyframes import Keyframe
from stac_core.training.figures import path_error, turn_error

FRAMES, MOST = 24, 250
SHORT = 16  # frames that suffice where streams are to be equal; the camera begins a second submap
SEEDS = (50, 3, 11)


@dataclass(frozen=True)
class Walk:
    """Frames of a synthetic world and their truth."""

    images: list[np.ndarray]
    poses: np.ndarray  # world_from_camera [S, 4, 4]
    depth: np.ndarray  # [S, H, W]
    intrinsics: np.ndarray  # [S, 3, 3]

    @property
    def pixels(self) -> torch.Tensor:
        return torch.from_numpy(np.stack(self.images)).permute(0, 3, 1, 2).float() / 255


@functools.cache
def walk(seed: int) -> Walk:
    sequence = open_sequence(f"world:{seed},frames={FRAMES},height=126,width=168,step_max=0.03")
    frames = [sequence.frame(i) for i in range(FRAMES)]
    columns = ([getattr(f, c) for f in frames] for c in ("world_from_camera", "depth_m", "intrinsics"))
    return Walk([frame.image for frame in frames], *(np.stack(column) for column in columns))


def said(poses, depth, intrinsics) -> Prediction:
    """What a network might say."""
    p, d, k = (torch.from_numpy(np.asarray(part)).float() for part in (poses, depth, intrinsics))
    said = Prediction(encode_pose(p, k, *d.shape[-2:]), p, k, d, torch.ones_like(d))
    return replace(said, points=unproject_depth(d, k, p))


def drifting(here: Walk, seed: int = 0) -> np.ndarray:
    """The true poses, each next turn wrong by a degree and each next step by 2 % of the depth, adding up."""
    draw = np.random.default_rng(seed)
    turn, shift = Rotation.identity(), np.zeros(3)
    unit = np.median(here.depth[here.depth > 0])
    poses = here.poses.copy()
    for pose in poses[1:]:
        turn *= Rotation.from_rotvec(np.radians(draw.normal(0, 1 / np.sqrt(3), 3)))
        shift += draw.normal(0, 0.02 * unit / np.sqrt(3), 3)
        pose[:3, 3] += pose[:3, :3] @ shift
        pose[:3, :3] = pose[:3, :3] @ turn.as_matrix()
    return poses


def given(seed: int = 3) -> tuple[torch.Tensor, Prediction]:
    """Frames, and a network's word on them, its poses drifting."""
    here = walk(seed)
    return here.pixels, said(drifting(here), here.depth, here.intrinsics)


def part(prediction: Prediction, frames: slice) -> Prediction:
    return prediction.map(lambda tensor: tensor[frames])


def numbers(poses: torch.Tensor) -> np.ndarray:
    return poses.double().numpy()


def steps_between(poses: np.ndarray) -> np.ndarray:
    """How each camera moves on, in its own frame [S - 1, 4, 4]."""
    return np.linalg.inv(poses[:-1]) @ poses[1:]


def assert_equal(a: Prediction, b: Prediction) -> None:
    for field in fields(a):
        mine, theirs = getattr(a, field.name), getattr(b, field.name)
        equal = torch.equal(mine, theirs) if isinstance(mine, torch.Tensor) else mine == theirs
        assert equal, field.name


@pytest.mark.parametrize("seed", SEEDS)
def test_poses_come_out_several_times_nearer_the_truth(seed):
    here = walk(seed)
    before, tracker = drifting(here), CameraTracker(MOST)
    after = numbers(tracker.refine(here.pixels, said(before, here.depth, here.intrinsics)).world_from_camera)
    turns, paths = ([judge(p, here.poses) for p in (before, after)] for judge in (turn_error, path_error))
    print(f"turn {turns[0]:.2f}° → {turns[1]:.2f}°, path {paths[0]:.3f} → {paths[1]:.3f}, {len(tracker)}")
    assert turns[1] < 0.5 * turns[0] and paths[1] < 0.4 * paths[0]
    assert 50 < len(tracker) <= MOST
    np.testing.assert_allclose(after[0], here.poses[0], atol=1e-6)  # world stays where it is


@pytest.mark.parametrize("seed", SEEDS)
def test_lengths_that_jump_from_frame_to_frame_become_steadier(seed):
    here = walk(seed)
    wrong = np.exp(np.random.default_rng(seed).normal(0, 0.1, FRAMES)).astype(np.float32)
    wrong /= wrong[0]
    prediction = said(drifting(here), wrong[:, None, None] * here.depth, here.intrinsics)
    found = CameraTracker(MOST).refine(here.pixels, prediction)
    known = here.depth > 0
    ratios = [
        np.log([np.median(d[k] / t[k]) for d, t, k in zip(depth.numpy(), here.depth, known, strict=True)])
        for depth in (prediction.depth, found.depth)
    ]
    before, after = (np.diff(ratio).std() for ratio in ratios)
    print(f"log of the lengths' ratio to the next {before:.3f} → {after:.3f}, all {ratios[1].std():.3f}")
    assert after < 0.65 * before and ratios[1].std() < 0.75 * ratios[0].std()
    assert turn_error(numbers(found.world_from_camera), here.poses) < 0.5 * turn_error(
        numbers(prediction.world_from_camera), here.poses
    )


def test_all_that_is_said_of_a_frame_moves_with_its_camera():
    pixels, prediction = given()
    found = CameraTracker(MOST).refine(pixels, prediction)
    cloud = unproject_depth(found.depth, found.intrinsics, found.world_from_camera)
    torch.testing.assert_close(found.points, cloud, rtol=1e-4, atol=1e-4)
    assert (found.points - prediction.points).abs().max() > 0.1
    decoded, _ = decode_pose(found.pose_encoding, *found.depth.shape[-2:])
    torch.testing.assert_close(decoded, found.world_from_camera, rtol=1e-4, atol=1e-4)
    assert torch.equal(found.intrinsics, prediction.intrinsics)
    assert torch.equal(found.depth_confidence, prediction.depth_confidence)
    rotation = found.world_from_camera[:, :3, :3].double()
    torch.testing.assert_close(
        rotation @ rotation.mT, torch.eye(3).double().expand_as(rotation), atol=1e-6, rtol=0
    )
    without = CameraTracker(MOST).refine(pixels, replace(prediction, points=None))
    assert without.points is None and torch.equal(without.world_from_camera, found.world_from_camera)


@pytest.mark.parametrize("size", [1, 5])
def test_it_does_not_matter_how_many_frames_come_at_once(size):
    pixels, prediction = given()
    tracker = CameraTracker(MOST)
    frames = [slice(i, i + size) for i in range(0, FRAMES, size)]
    pieces = [tracker.refine(pixels[s], part(prediction, s)) for s in frames]
    whole = CameraTracker(MOST).refine(pixels, prediction)
    for s, piece in zip(frames, pieces, strict=True):
        assert_equal(piece, part(whole, s))


def test_without_corners_cameras_move_on_as_the_network_says():
    """From the start, and after frames with corners; there the way in the lengths found last."""
    pixels, prediction = given()
    blank = torch.full_like(pixels, 0.5)
    tracker = CameraTracker(MOST)
    found = tracker.refine(blank, prediction)
    torch.testing.assert_close(found.world_from_camera, prediction.world_from_camera, rtol=0, atol=1e-5)
    assert torch.equal(found.depth, prediction.depth) and len(tracker) == 0
    first = 12
    prediction = replace(prediction, depth=prediction.depth * torch.linspace(1, 1.5, FRAMES)[:, None, None])
    found = tracker_over(torch.cat([pixels[:first], blank[first:]]), prediction)
    assert turn_error(*(numbers(p.world_from_camera) for p in (found, prediction))) > 0.5
    factor = float((found.depth[-1] / prediction.depth[-1]).nanmedian())
    assert factor < 0.95
    ours, theirs = (steps_between(numbers(p.world_from_camera))[first - 1 :] for p in (found, prediction))
    np.testing.assert_allclose(ours[:, :3, :3], theirs[:, :3, :3], rtol=0, atol=1e-5)
    np.testing.assert_allclose(ours[:, :3, 3], factor * theirs[:, :3, 3], rtol=0, atol=1e-5)
    torch.testing.assert_close(found.depth[first:], factor * prediction.depth[first:])


def tracker_over(pixels: torch.Tensor, prediction: Prediction) -> Prediction:
    return CameraTracker(MOST).refine(pixels, prediction)


def test_images_of_another_place_move_cameras_as_the_network_says():
    """What looks alike there by chance does not turn the camera."""
    pixels, prediction = given()
    found = tracker_over(torch.cat([pixels[:12], walk(50).pixels[12:]]), prediction)
    ours, theirs = (steps_between(numbers(p.world_from_camera))[11] for p in (found, prediction))
    turn = Rotation.from_matrix(ours[:3, :3].T @ theirs[:3, :3]).magnitude()
    assert np.degrees(turn) < 1.5


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_pose_that_is_no_number_passes_and_the_next_one_begins_anew(value):
    pixels, prediction = given()
    poses = prediction.world_from_camera.clone()
    poses[8, 0, 3] = value
    prediction = replace(prediction, world_from_camera=poses)
    found = tracker_over(pixels, prediction)
    for name in ("world_from_camera", "depth"):
        passed, was = getattr(found, name)[8], getattr(prediction, name)[8]
        assert torch.equal(passed.nan_to_num(9), was.nan_to_num(9))
    after = slice(9, FRAMES)
    assert_equal(part(found, after), tracker_over(pixels[after], part(prediction, after)))
    assert_equal(part(found, slice(0, 8)), tracker_over(pixels[:8], part(prediction, slice(0, 8))))


@pytest.mark.parametrize("value", [0.0, float("nan"), float("inf")])
def test_frames_without_any_depth_keep_the_landmarks_of_others(value):
    """Every third frame is blind, and part of every other one."""
    here, (pixels, prediction) = walk(3), given()
    depth = prediction.depth.clone()
    depth[2::3] = value
    depth[:, :40] = value
    found = tracker_over(pixels, replace(prediction, depth=depth))
    after = numbers(found.world_from_camera)
    assert np.isfinite(after).all()
    lengths = found.depth[:, 40:] / depth[:, 40:]  # by what each frame's are multiplied
    assert lengths[0::3].nanmedian() == pytest.approx(1, abs=0.05)
    assert torch.equal(found.depth[2::3].nan_to_num(9), depth[2::3].nan_to_num(9))
    assert turn_error(after, here.poses) < 0.5 * turn_error(numbers(prediction.world_from_camera), here.poses)
    blind = tracker_over(pixels, replace(prediction, depth=torch.full_like(depth, value)))
    torch.testing.assert_close(blind.world_from_camera, prediction.world_from_camera, rtol=0, atol=1e-5)


@pytest.mark.parametrize("after", [0, 1, 10])
def test_a_tracker_goes_on_from_its_state(after):
    pixels, prediction = given()
    tracker, resumed = CameraTracker(MOST), CameraTracker(MOST)
    if after:
        tracker.refine(pixels[:after], part(prediction, slice(0, after)))
    resumed.refine(pixels[-2:], part(prediction, slice(FRAMES - 2, FRAMES)))  # what was before is gone
    state = tracker.state()
    resumed.restore(state)
    rest = slice(after, FRAMES)
    expected = tracker.refine(pixels[rest], part(prediction, rest))
    assert_equal(resumed.refine(pixels[rest], part(prediction, rest)), expected)
    resumed.restore(state)  # nothing in it has changed meanwhile
    assert_equal(resumed.refine(pixels[rest], part(prediction, rest)), expected)
    for name in state:
        with pytest.raises(KeyError, match=name):
            resumed.restore({key: tensor for key, tensor in state.items() if key != name})


def test_a_copy_and_what_it_was_copied_from_go_their_own_ways():
    pixels, prediction = given()
    tracker, rest = CameraTracker(MOST), slice(8, FRAMES)
    tracker.refine(pixels[:8], part(prediction, slice(0, 8)))
    twin = copy(tracker)
    twin.refine(pixels[rest].flip(0), part(prediction, rest))
    second = copy(tracker)
    second.forget()
    expected = part(tracker_over(pixels, prediction), rest)
    assert_equal(copy(tracker).refine(pixels[rest], part(prediction, rest)), expected)
    assert_equal(tracker.refine(pixels[rest], part(prediction, rest)), expected)
    assert len(second) == 0 < len(tracker)


def test_forgetting_begins_a_stream_anew():
    pixels, prediction = given()
    tracker = CameraTracker(MOST)
    expected = tracker.refine(pixels, prediction)
    tracker.forget()
    assert len(tracker) == 0 and tracker.state() == {}
    assert_equal(tracker.refine(pixels, prediction), expected)


def test_a_network_that_sees_the_last_frame_anew_goes_on_from_there():
    """Its poses then start from the corrected one, in lengths of the landmarks."""
    here, (pixels, prediction) = walk(3), given()
    first, tracker = 12, CameraTracker(MOST)
    found = numbers(tracker.refine(pixels[:first], part(prediction, slice(0, first))).world_from_camera)
    poses = numbers(prediction.world_from_camera)
    anew = found[-1] @ np.linalg.inv(poses[first - 1]) @ poses[first:]
    rest = replace(part(prediction, slice(first, FRAMES)), world_from_camera=torch.from_numpy(anew).float())
    tracker.go_on()
    blind = copy(tracker).refine(torch.full_like(pixels[first:], 0.5), rest)
    torch.testing.assert_close(blind.world_from_camera, rest.world_from_camera, rtol=0, atol=1e-5)
    kept = len(tracker)
    after = np.concatenate([found, numbers(tracker.refine(pixels[first:], rest).world_from_camera)])
    assert kept > 50 and turn_error(after, here.poses) < 0.5 * turn_error(poses, here.poses)


# Whole streams


def session_for(landmarks: int = -1, **cache) -> StreamSession:
    return StreamSession(bundled(), Config(tracking=TrackingConfig(landmarks), cache=CacheConfig(**cache)))


def lens(seed: int) -> np.ndarray:
    return walk(seed).intrinsics[0]


def chunk(seed: int, first: int) -> list[np.ndarray]:
    return walk(seed).images[first : first + 4]


def stream(session, seed, intrinsics, frames=range(0, SHORT, 4)) -> list[Prediction]:
    return [session.step(chunk(seed, first), intrinsics) for first in frames]


@functools.cache
def tracked(seed: int) -> list[Prediction]:
    """A walk with its true intrinsics, undisturbed."""
    return stream(session_for(), seed, lens(seed), range(0, FRAMES, 4))


@functools.cache
def plain(seed: int) -> list[Prediction]:
    """A walk as the network says."""
    return stream(session_for(), seed, None, range(0, FRAMES, 4))


def assert_all_equal(ours: list[Prediction], theirs: list[Prediction]) -> None:
    """theirs: may go on for longer."""
    assert 0 < len(ours) <= len(theirs)
    for a, b in zip(ours, theirs, strict=False):
        assert_equal(a, b)


def test_a_calibrated_camera_is_followed_far_more_exactly():
    """Over three walks together, through several submaps and within one."""
    turns, ways = np.zeros(2), np.zeros(2)  # plain, tracked
    for seed in (50, 3, 7):
        paths = [numbers(torch.cat([p.world_from_camera for p in run(seed)])) for run in (plain, tracked)]
        turns += [turn_error(path, walk(seed).poses) for path in paths]
        ways += [path_error(path, walk(seed).poses) for path in paths]
    print(f"turn {turns[0]:.2f}° → {turns[1]:.2f}°, path {ways[0]:.4f} → {ways[1]:.4f}")
    assert turns[1] < 0.65 * turns[0] and ways[1] < 0.65 * ways[0]


def test_known_intrinsics_take_the_place_of_what_the_network_says():
    session = session_for()
    found = session.step(chunk(3, 0), lens(3))
    camera = session.geometry.camera_intrinsics(found.intrinsics)
    np.testing.assert_allclose(camera, np.tile(lens(3), (4, 1, 1)), rtol=1e-5)
    poses, intrinsics = decode_pose(found.pose_encoding, *found.depth.shape[-2:])
    torch.testing.assert_close(poses, found.world_from_camera, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(intrinsics, found.intrinsics, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(plain(3)[0].intrinsics, found.intrinsics, rtol=1e-3)


def test_intrinsics_are_those_of_the_images_whatever_their_size():
    """Twice as large, as a camera of twice the focal length in pixels takes them."""
    larger = [image.repeat(2, axis=0).repeat(2, axis=1) for image in chunk(3, 0)]
    intrinsics = np.diag([2.0, 2.0, 1.0]) @ lens(3)
    intrinsics[:2, 2] += 0.5  # pixel centres lie at whole numbers
    found = session_for().step(larger, intrinsics)
    torch.testing.assert_close(found.intrinsics, tracked(3)[0].intrinsics, rtol=1e-5, atol=1e-3)


def test_an_uncalibrated_camera_is_as_the_network_says():
    assert_all_equal(stream(session_for(0), 50, None), plain(50))
    assert_all_equal(stream(session_for(0), 50, lens(50)), plain(50))
    assert not torch.equal(tracked(50)[1].world_from_camera, plain(50)[1].world_from_camera)


def test_landmarks_are_counted_where_they_are_followed():
    counts = []
    for landmarks, intrinsics in ((-1, lens(3)), (40, lens(3)), (0, lens(3)), (-1, None)):
        session = session_for(landmarks)
        assert session.stats().landmarks == 0 and session.uses_intrinsics == (landmarks != 0)
        session.step(chunk(3, 0), intrinsics)
        counts.append(session.stats().landmarks)
        session.reset()
        assert session.stats().landmarks == 0
    assert counts[0] > 50 and 15 < counts[1] <= 40 and counts[2:] == [0, 0]


def test_without_intrinsics_for_a_while_poses_are_as_the_network_says_for_that_while():
    session, counts = session_for(), []
    for first, intrinsics in ((0, lens(3)), (4, None), (8, lens(3))):
        found = session.step(chunk(3, first), intrinsics)
        counts.append(session.stats().landmarks)
        assert found.world_from_camera.isfinite().all()
    assert counts[0] > 50 and counts[1] == 0 and counts[2] > 50


def test_a_reset_begins_a_tracked_stream_anew():
    session = session_for()
    stream(session, 3, lens(3), range(0, 8, 4))
    session.reset()
    assert_all_equal(stream(session, 50, lens(50), range(0, 12, 4)), tracked(50))


@pytest.mark.parametrize("saved_after", [0, 4, 12])
def test_a_saved_stream_goes_on_with_its_landmarks(tmp_path, saved_after):
    """Before its first frame, in its first submap and in a later one."""
    session, resumed = session_for(), session_for()
    stream(session, 50, lens(50), range(0, saved_after, 4))
    session.save(tmp_path / "stream")
    resumed.step(chunk(3, 0), lens(3))
    resumed.load(tmp_path / "stream")
    assert resumed.stats().landmarks == session.stats().landmarks
    rest = range(saved_after, SHORT, 4)
    assert_all_equal(stream(resumed, 50, lens(50), rest), tracked(50)[saved_after // 4 :])


def test_a_saved_stream_that_lacks_part_of_its_landmarks_or_followed_others_is_refused(tmp_path):
    session = session_for()
    session.step(chunk(3, 0), lens(3))
    session.save(tmp_path / "stream")
    with pytest.raises(ValueError, match=r"tracking\.landmarks = -1 \(here 7\)"):
        session_for(7).load(tmp_path / "stream")
    tensors = load_file(tmp_path / "stream")
    del tensors["submaps/tracker/origin"]
    with safe_open(tmp_path / "stream", "pt") as file:
        save_file(tensors, tmp_path / "damaged", file.metadata())
    with pytest.raises(ValueError, match="lacks 'origin'"):
        session.load(tmp_path / "damaged")
    assert_equal(session.step(chunk(3, 4), lens(3)), tracked(3)[1])


def test_a_step_that_fails_leaves_landmarks_as_they_were(monkeypatch):
    """In its first pass, in its second one if it begins a submap, or once the tracker has done its part."""
    session, ours, head = session_for(), [], bundled().depth_head
    for first in range(0, SHORT, 4):
        followed = session.stats().landmarks
        for good_calls, last in ((0, (Keyframe, "of")), (1, (Keyframe, "of")), (9, (StreamCache, "settle"))):
            with monkeypatch.context() as patch, pytest.raises(MemoryError):
                patch.setattr(head, "forward", failing(head.forward, good_calls))
                patch.setattr(*last, failing(None, 0))
                session.step(chunk(50, first), lens(50))
            stats = session.stats()
            assert (stats.landmarks, stats.cache.frames_seen) == (followed, first)
        ours.append(session.step(chunk(50, first), lens(50)))
    assert_all_equal(ours, tracked(50))
    assert session.stats().submaps > 1


def failing(work, good_calls):
    """What does its work so many times, then runs out of memory."""
    calls = iter(range(99))

    def call(*arguments):
        if next(calls) >= good_calls:
            raise MemoryError
        return work(*arguments)

    return call


WRONG = {
    "shape": np.eye(4),
    "flat": np.ones(9),
    "NaN": np.diag([100.0, float("nan"), 1.0]),
    "infinite": np.diag([float("inf"), 100.0, 1.0]),
    "zero": np.diag([0.0, 0.0, 1.0]),
    "negative": np.diag([100.0, -100.0, 1.0]),
}


def test_wrong_intrinsics_are_refused_and_change_nothing():
    session, ours = session_for(), []
    for first in range(0, 12, 4):
        for wrong in WRONG.values():
            with pytest.raises(ValueError, match="intrinsics = "):
                session.step(chunk(50, first), wrong)
            assert session.stats().cache.frames_seen == first
        ours.append(session.step(chunk(50, first), lens(50)))
    assert_all_equal(ours, tracked(50))


@pytest.mark.parametrize("mode", ["causal", "full", "window"])
def test_modes_of_one_pass_accept_intrinsics(mode):
    """A sequence taken at once is as the network says; frame by frame without a limit it is tracked."""
    session, without = session_for(mode=mode), session_for(mode=mode)
    ours, theirs = session.step(chunk(3, 0), lens(3)), without.step(chunk(3, 0))
    assert session.uses_intrinsics == (mode == "causal") == (session.stats().landmarks > 0)
    if mode != "causal":
        assert_equal(ours, theirs)
    assert ours.world_from_camera.isfinite().all()
