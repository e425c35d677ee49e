"""Whole sessions on the tiny network: steps, repeats, errors, saving; images in, predictions out."""

from __future__ import annotations

import copy
import gc
import weakref
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import numpy as np
import pytest
import torch
from tiny import synthetic_frames, tiny_network

from stac_core import Config, StreamSession, check_budget
from stac_core.config import MODES, CacheConfig, ImageConfig

STREAMING = [name for name, mode in MODES.items() if not mode.offline]


@pytest.fixture(scope="module")
def network():
    return tiny_network()


def session_for(network, mode="stac", **settings) -> StreamSession:
    cache = {
        "window_size": 2,
        "chunk_size": 2,
        "hh_size": 1,
        "retrieval_size": 1,
        "voxel_conf": 0.5,
        "edge_test": 0.0,
    }
    return StreamSession(
        network, Config(cache=CacheConfig(mode=mode, **{**cache, **settings}), image=ImageConfig(size=70))
    )


def steps(session, frames):
    return [session.step(frames[i : i + 2]) for i in range(0, len(frames), 2)]


@pytest.mark.parametrize("mode", STREAMING)
def test_every_mode_maps_a_stream_with_a_short_tail(network, mode):
    session = session_for(network, mode)
    predictions = steps(session, synthetic_frames(9, 48, 64))
    assert [p.frames for p in predictions] == [2, 2, 2, 2, 1]
    assert all(bool(p.depth.isfinite().all()) for p in predictions)
    stats = session.stats()
    assert stats.cache.frames_seen == 9 and stats.network_ms > 0
    assert (stats.cache.voxels > 0) == MODES[mode].voxels


def test_images_prepared_on_another_thread_while_others_are_in_use_give_the_same_stream(network):
    frames = synthetic_frames(9, 48, 64)
    session, expected = session_for(network), steps(session_for(network), frames)
    chunks = [frames[i : i + 2] for i in range(0, len(frames), 2)]
    with ThreadPoolExecutor(1) as thread:
        coming = [thread.submit(session.prepare, chunk) for chunk in chunks]
        predictions = [session.step(each.result()) for each in coming]
    for prediction, as_ever in zip(predictions, expected, strict=True):
        assert torch.equal(prediction.depth, as_ever.depth)
        assert torch.equal(prediction.world_from_camera, as_ever.world_from_camera)
    assert session.relocalize(session.prepare(frames[:1]))


def test_images_that_are_announced_give_the_same_stream(network):
    frames = synthetic_frames(12, 48, 64)
    chunks = [frames[i : i + 2] for i in range(0, 12, 2)]
    plain, told = session_for(network), session_for(network)
    strange = synthetic_frames(1, 40, 64)
    announced = [chunks[1], chunks[2], strange, chunks[0], None, None]  # wrong ones are not missed
    for images, upcoming in zip(chunks, announced, strict=True):
        found, expected = told.step(images, upcoming=upcoming), plain.step(images)
        assert torch.equal(found.depth, expected.depth)
        assert torch.equal(found.pose_encoding, expected.pose_encoding)
    told.reset()
    told.step(chunks[0], upcoming=strange)  # the first step does not know yet that they are
    with pytest.raises(ValueError, match="keep the image size"):
        told.step(strange)


def test_prepared_images_that_do_not_fit_are_refused_and_cost_the_stream_nothing(network):
    session, untouched = session_for(network), session_for(network)
    frames, others = synthetic_frames(4, 48, 64), synthetic_frames(2, 48, 70)
    larger = StreamSession(network, Config(image=ImageConfig(size=84)))
    for each in (session, untouched):
        each.step(frames[:2])
    with pytest.raises(ValueError, match="prepared by a session of other settings"):
        session.step(larger.prepare(frames[2:]))
    with pytest.raises(ValueError, match="70×48 pixels in a stream of 64×48"):
        session.step(session.prepare(others))
    with pytest.raises(ValueError, match=r"images\[1\] is 70×48 pixels, images\[0\] is 64×48"):
        session.prepare([frames[2], others[0]])
    after = [each.step(each.prepare(frames[2:])).depth for each in (session, untouched)]
    assert torch.equal(*after)


@pytest.mark.parametrize(
    "settings", [{"positions": "points"}, {"voxel_unit": "model"}, {"retrieve_by": "query"}], ids=str
)
def test_places_from_either_head(network, settings):
    session = session_for(network, **settings)
    steps(session, synthetic_frames(8, 48, 64))
    assert session.stats().cache.inserted > 0


def test_the_same_frame_again_and_again(network):
    session = session_for(network)
    frame = synthetic_frames(1, 48, 64)[0]
    for prediction in steps(session, [frame] * 12):
        assert all(bool(t.isfinite().all()) for t in (prediction.depth, prediction.world_from_camera))


@pytest.mark.parametrize("settings", [{"voxel_conf": 1e9}, {"lost_confidence": 1e9}], ids=str)
def test_frames_of_low_confidence_throughout(network, settings):
    session = session_for(network, **settings)
    predictions = steps(session, synthetic_frames(9, 48, 64))
    assert all(bool(p.depth.isfinite().all()) for p in predictions)
    stats = session.stats().cache
    patches = 9 * (stats.live_tokens // 4 - network.config.special_tokens)
    assert stats.inserted == 0 and stats.unplaced == patches


def test_a_stream_begins_with_the_first_chunk_that_is_good_enough(network):
    frames = synthetic_frames(10, 48, 64)
    bad = [np.zeros_like(frames[0])] * 2
    dark, bright = (
        float(session_for(network).step(chunk).depth_confidence.mean()) for chunk in (bad, frames[:2])
    )
    least, (refused, good) = (dark + bright) / 2, (bad, frames) if dark < bright else (frames[:2], bad * 5)
    session, expected = session_for(network, first_confidence=least), session_for(network)
    assert session.step(refused).depth.isfinite().all() and session.stats().cache.frames_seen == 0
    for ours, theirs in zip(steps(session, good), steps(expected, good), strict=True):
        assert torch.equal(ours.depth, theirs.depth)
    assert session.stats().cache.frames_seen == len(good)


def test_a_stream_without_a_step_took_no_time(network, tmp_path):
    session = session_for(network)
    session.save(tmp_path / "stream")
    for begin_anew in (session.reset, lambda: session.load(tmp_path / "stream")):
        session.step(synthetic_frames(2, 48, 64))
        assert min(session.stats().prepare_ms, session.stats().network_ms, session.stats().settle_ms) > 0
        begin_anew()
        stats = session.stats()
        assert (stats.prepare_ms, stats.network_ms, stats.settle_ms) == (0, 0, 0)


def test_predictions_leave_the_session(network):
    session = session_for(network)
    seen = [weakref.ref(p.depth) for p in steps(session, synthetic_frames(6, 48, 64))]
    gc.collect()
    assert all(reference() is None for reference in seen)


def test_a_step_that_raises_leaves_the_stream_as_it_was(network, monkeypatch):
    frames = synthetic_frames(8, 48, 64)
    expected = steps(session_for(network), frames)[-1]
    session = session_for(network)
    steps(session, frames[:6])
    with pytest.raises(ValueError, match="chunk_size is 2"):
        session.step(frames[:3])
    with pytest.raises(ValueError):
        session.step([np.zeros((480, 64, 3), np.uint8)])
    with monkeypatch.context() as patch, pytest.raises(MemoryError):
        patch.setattr(network.depth_head, "forward", lambda *_: (_ for _ in ()).throw(MemoryError()))
        session.step(frames[:2])
    assert torch.equal(session.step(frames[6:]).depth, expected.depth)


@pytest.mark.parametrize(
    ("rule", "change"),
    [
        ("evaluation", lambda frame: np.rot90(frame).copy()),  # as many tokens, other places
        ("pad", lambda frame: frame[:40]),  # the same network image, another camera
    ],
    ids=["evaluation", "pad"],
)
def test_a_stream_keeps_to_one_image_size(network, tmp_path, rule, change):
    frames = synthetic_frames(3, 56, 84)
    config = Config(image=ImageConfig(rule=rule, size=84), cache=CacheConfig(mode="causal"))
    session, expected, resumed = (StreamSession(network, config) for _ in range(3))
    session.step(frames[:2])
    geometry, other = session.geometry, change(frames[2])
    height, width = other.shape[:2]
    with pytest.raises(ValueError, match=f"frames of {width}×{height} pixels in a stream of 84×56"):
        session.step([other])
    expected.step(frames[:2])
    assert session.geometry == geometry and session.stats().cache.frames_seen == 2
    session.save(tmp_path / "stream")
    resumed.load(tmp_path / "stream")
    wanted = expected.step(frames[2:])
    for each in (session, resumed):
        assert torch.equal(each.step(frames[2:]).depth, wanted.depth)
        with pytest.raises(ValueError, match="reset the stream"):
            each.step([other])
    session.reset()
    assert session.step([other]).frames == 1


@pytest.mark.parametrize("mode", STREAMING)
def test_a_saved_session_goes_on_as_if_uninterrupted(network, tmp_path, mode):
    frames = synthetic_frames(16, 48, 64)
    session, resumed = session_for(network, mode), session_for(network, mode)
    steps(session, frames[:8])
    session.save(tmp_path / "stream")
    resumed.load(tmp_path / "stream")
    for a, b in zip(steps(session, frames[8:]), steps(resumed, frames[8:]), strict=True):
        assert torch.equal(a.depth, b.depth) and torch.equal(a.pose_encoding, b.pose_encoding)


@pytest.mark.parametrize("settings", [{}, {"memory_budget": 1 << 30}, {"first_confidence": 1e9}], ids=str)
def test_a_stream_saved_before_its_first_frame_begins_when_loaded(network, tmp_path, settings):
    frames = synthetic_frames(4, 48, 64)
    session, resumed = session_for(network, **settings), session_for(network, **settings)
    if "first_confidence" in settings:
        session.step(frames[:2])  # refused
    session.save(tmp_path / "stream")
    resumed.load(tmp_path / "stream")
    for a, b in zip(steps(session, frames), steps(resumed, frames), strict=True):
        assert torch.equal(a.depth, b.depth)
    assert resumed.stats().cache == session.stats().cache


def test_a_stream_goes_on_under_another_limit(network, tmp_path):
    """Memory is the computer's, not the stream's."""
    frames = synthetic_frames(8, 48, 64)
    session, resumed = session_for(network), session_for(network, memory_budget=1 << 30)
    steps(session, frames[:4])
    session.save(tmp_path / "stream")
    resumed.load(tmp_path / "stream")
    for a, b in zip(steps(session, frames[4:]), steps(resumed, frames[4:]), strict=True):
        assert torch.equal(a.depth, b.depth)


@pytest.mark.parametrize("free", [2_400_000, None])
def test_a_session_takes_no_more_memory_than_is_free(network, monkeypatch, free):
    monkeypatch.setattr("stac_core.session.free_bytes", lambda device: free)
    session = session_for(network)
    steps(session, synthetic_frames(24, 48, 64))
    stats = session.stats().cache
    assert stats.bytes <= stats.byte_limit < free if free else stats.byte_limit == 0


def test_a_stream_that_cannot_be_resumed_leaves_the_present_one(network, tmp_path):
    frames = synthetic_frames(6, 48, 64)
    session = session_for(network)
    steps(session, frames[:4])
    session_for(network, "causal").save(tmp_path / "other")
    (tmp_path / "cut").write_bytes((tmp_path / "other").read_bytes()[:100])
    for name, message in (("other", "other settings"), ("cut", "damaged"), ("missing", "no such file")):
        with pytest.raises(ValueError, match=message):
            session.load(tmp_path / name)
    expected = session_for(network)
    assert torch.equal(session.step(frames[4:]).depth, steps(expected, frames)[-1].depth)


def test_a_stream_of_other_weights_is_refused(network, tmp_path):
    """Its keys and values would say nothing to this network. Another precision is no other network."""
    session = session_for(network)
    session.step(synthetic_frames(2, 48, 64))
    session.save(tmp_path / "stream")
    others = copy.deepcopy(network)
    with torch.no_grad():
        others.camera_head.embed_pose.bias.add_(0.01)
    with pytest.raises(ValueError, match=f"network.weights = '{network.fingerprint()}'"):
        session_for(others).load(tmp_path / "stream")
    session_for(copy.deepcopy(network).set_precision(torch.bfloat16)).load(tmp_path / "stream")


def test_poses_read_again_over_one_chunk_are_those_of_the_chunk(network):
    session = session_for(network, "causal", chunk_size=6, repose_frames=9)
    prediction = session.step(synthetic_frames(6, 48, 64))
    frames, poses = session.repose()
    assert frames.tolist() == [0, 1, 2, 3, 4, 5] and prediction.camera_tokens is None
    torch.testing.assert_close(poses, prediction.world_from_camera, rtol=1e-4, atol=1e-4)


def test_reading_poses_again_keeps_the_first_and_newest_frames_and_leaves_the_stream(network, tmp_path):
    frames = synthetic_frames(12, 48, 64)
    session, plain = session_for(network, repose_frames=4), session_for(network)
    given = [p.world_from_camera for p in steps(session, frames[:10])]
    numbers, poses = session.repose()
    assert numbers.tolist() == [0, 7, 8, 9]
    everything = session_for(network, repose_frames=99)
    steps(everything, frames[:10])
    assert (everything.repose()[1][1:] - torch.cat(given)[1:]).abs().max() > 1e-5  # it knows more now
    session.save(tmp_path / "stream")
    resumed = session_for(network, repose_frames=4)
    resumed.load(tmp_path / "stream")
    assert torch.equal(resumed.repose()[1], poses)
    assert torch.equal(resumed.repose(move_voxels=True)[1], poses)
    assert resumed.stats().cache.forgotten == 0 and resumed.step(frames[10:]).depth.isfinite().all()
    steps(plain, frames[:10])
    assert torch.equal(session.step(frames[10:]).depth, plain.step(frames[10:]).depth)
    with pytest.raises(ValueError, match=r"cache.repose_frames"):
        plain.repose()


@pytest.mark.slow
def test_a_thousand_frames_do_not_grow_the_process(network):
    def resident() -> int:
        with open("/proc/self/statm") as file:
            return int(file.read().split()[1]) * 4096

    session = session_for(network, "window_kv")
    frames = synthetic_frames(20, 48, 64)
    sizes = []
    for round_ in range(50):
        steps(session, frames)
        if round_ in (10, 49):
            gc.collect()
            sizes.append(resident())
    assert session.stats().cache.frames_seen == 1000
    assert sizes[1] - sizes[0] < 20 * 2**20


@pytest.mark.parametrize(
    "settings", [{}, {"pinned_frames": 2}, {"mode": "xstream"}, {"mode": "window_kv"}], ids=str
)
def test_a_budget_is_checked_before_the_first_image_as_with_it(network, settings):
    """What is told without an image is what the first one meets, to the byte."""
    image = synthetic_frames(1, 480, 640)

    def refusal(budget: int) -> str:
        told = []
        session = session_for(network, memory_budget=budget, **settings)
        before = partial(check_budget, network, session.config, torch.float32)
        for act in (before, partial(session.step, image)):
            try:
                act()
            except ValueError as error:
                told.append(str(error))
            else:
                told.append("")
        assert told[0] == told[1]
        return told[0]

    needed = int(refusal(1).rpartition("nearest value that works: ")[2])
    assert refusal(needed - 1) and not refusal(needed)
