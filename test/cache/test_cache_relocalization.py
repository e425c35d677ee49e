"""A camera that is found again in a stream that was saved, wherever it is."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from walks import bundled, frames_of, images_of, turn_deg

from stac_core import Config, StreamSession
from stac_core.cache.one_pass import OnePass
from stac_core.config import ImageConfig, SubmapConfig
from stac_core.images import prepare_images
from stac_core.keyframes import Keyframe
from stac_core.relocalization import find_camera

WALK = "world:50,frames=48,height=126,width=168,step_min=0.02,step_max=0.05"
ELSEWHERE = "world:58,frames=12,height=126,width=168"
EVERY_OTHER = slice(0, 48, 2)


def session(**submap) -> StreamSession:
    return StreamSession(bundled(), Config(submap=SubmapConfig(**submap)))


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A stream over every other frame of a walk, and where it saw them from, world_from_camera [24, 4, 4]."""
    stream, frames = session(), frames_of(WALK)[EVERY_OTHER]
    poses = [
        stream.step(images_of(frames[i : i + 4]), frames[0].intrinsics).world_from_camera
        for i in range(0, len(frames), 4)
    ]
    path = tmp_path_factory.mktemp("saved") / "stream"
    stream.save(path)
    assert stream.stats().submaps > 4
    return path, torch.cat(poses).double().numpy()


def loaded(saved) -> StreamSession:
    stream = session()
    stream.load(saved[0])
    return stream


@pytest.mark.parametrize("first", [5, 21, 37])
def test_a_camera_is_found_where_the_saved_stream_has_been(saved, first):
    """Frames between those that were mapped, early and late in the walk, judged against their neighbours."""
    stream, frames = loaded(saved), frames_of(WALK)
    ours = frames[first : first + 4 : 2]
    assert stream.relocalize(images_of(ours), ours[0].intrinsics)
    found = stream.step(images_of(ours), ours[0].intrinsics).world_from_camera.double().numpy()
    length = np.linalg.norm(np.ptp(saved[1][:, :3, 3], axis=0))
    for index, (frame, pose) in enumerate(zip(ours, found, strict=True)):
        neighbour = first - 1 + 2 * index
        before, known = frames[neighbour].world_from_camera, saved[1][neighbour // 2]
        truly = np.linalg.inv(before) @ frame.world_from_camera
        assert turn_deg(np.linalg.inv(known) @ pose, truly) < 6
        assert np.linalg.norm(pose[:3, 3] - known[:3, 3]) < 0.2 * length


def test_a_stream_whose_camera_has_just_been_found_is_saved_and_goes_on_there(saved, tmp_path):
    stream, resumed, images = loaded(saved), session(), images_of(frames_of(WALK)[21:25:2])
    assert stream.relocalize(images)
    stream.save(tmp_path / "stream")
    resumed.load(tmp_path / "stream")
    ours, theirs = stream.step(images), resumed.step(images)
    assert torch.equal(ours.depth, theirs.depth) and torch.equal(ours.pose_encoding, theirs.pose_encoding)
    assert not ours.continues and not theirs.continues


def test_images_of_another_place_are_not_found_and_cost_the_stream_nothing(saved):
    stream, untouched = loaded(saved), loaded(saved)
    for first in (0, 4, 8):
        others = frames_of(ELSEWHERE)[first : first + 4]
        assert not stream.relocalize(images_of(others), others[0].intrinsics)
    images = images_of(frames_of(WALK)[44:])
    assert torch.equal(stream.step(images).depth, untouched.step(images).depth)


def test_all_images_must_be_found_not_the_last_alone(saved):
    here, there = (frames_of(walk)[8].image for walk in (WALK, ELSEWHERE))
    assert loaded(saved).relocalize([here])
    assert not loaded(saved).relocalize([there, here])


@torch.inference_mode()
def test_a_camera_that_has_departed_farther_than_asked_for_is_not_found():
    """A step of the walk is a turn and a way of 0.02 to 0.4 together."""
    images = images_of(frames_of(WALK)[8:11:2])
    pixels, _ = prepare_images(images, ImageConfig(), bundled().config.image_size, torch.device("cpu"))

    def see(frames):
        return bundled()(frames[None], OnePass("causal")).map(lambda t: t[0])

    keyframe = Keyframe.of(pixels[:1], see(pixels[:1]), 0)
    found = [find_camera(see, [keyframe], pixels[1:], reach) for reach in (0.02, 0.4)]
    assert found == [None, keyframe]


def test_a_failure_leaves_the_stream_as_it_was(saved, monkeypatch):
    stream, untouched = loaded(saved), loaded(saved)
    images = images_of(frames_of(WALK)[21:23])
    with monkeypatch.context() as patch, pytest.raises(MemoryError):
        patch.setattr(stream, "_settle", lambda *_: (_ for _ in ()).throw(MemoryError()))
        stream.relocalize(images)
    ahead = images_of(frames_of(WALK)[44:])
    assert torch.equal(stream.step(ahead).depth, untouched.step(ahead).depth)
    assert stream.relocalize(images)


def test_what_does_not_fit_the_stream_is_refused(saved):
    images = images_of(frames_of(WALK)[16:18])
    with pytest.raises(ValueError, match="frames of 168×112 pixels in a stream of 168×126"):
        loaded(saved).relocalize([image[:112] for image in images])
    with pytest.raises(ValueError, match="positive focal lengths"):
        loaded(saved).relocalize(images, np.zeros((3, 3)))


def test_a_stream_in_one_submap_has_nothing_to_look_for():
    """Its network sees by itself where the camera is, so it goes on as it would have."""
    images = images_of(frames_of(WALK)[:8])
    one, other = session(reach=0.0), session(reach=0.0)
    for stream in (one, other):
        stream.step(images[:4])
    assert one.relocalize(images[4:])
    assert torch.equal(one.step(images[4:]).depth, other.step(images[4:]).depth)


def test_without_keyframes_nothing_is_found():
    images = images_of(frames_of(WALK)[:8])
    stream = session(keyframes=0)
    stream.step(images[:4])
    assert not stream.relocalize(images[:4])
    assert find_camera(lambda frames: None, [], torch.zeros(1, 3, 2, 2), 1.0) is None
