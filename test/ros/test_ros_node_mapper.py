"""Predictor and mapper with the real network: frames, units, streams, and bad input, without topics."""

from __future__ import annotations

import re
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from builtin_interfaces.msg import Time
from mapping_helpers import CONFIG, InSeries, Notes, mapper_of
from node_helpers import HEIGHT, WIDTH, images
from rclpy.parameter import Parameter
from rclpy.publisher import Publisher
from ros_helpers import parameters_of, spin_until
from sensor_msgs.msg import Image
from std_msgs.msg import Header

from stac_core import StreamSession, load_network
from stac_core.config import CacheConfig, SubmapConfig
from stac_ros import topics
from stac_ros.camera_info import CameraCalibration
from stac_ros.camera_messages import calibration_message
from stac_ros.map import VoxelMap
from stac_ros.mapped_frame import MappedFrame
from stac_ros.mapper import MAP_FROM_OPTICAL
from stac_ros.message_data import byte_array
from stac_ros.odometry import NoOdometry, OdometryLink
from stac_ros.odometry_scale import STEPS, TOLERANCE
from stac_ros.outputs import Outputs
from stac_ros.pose_messages import OdometryMessages, pose_message, pose_with_covariance
from stac_ros.run_statistics import Statistics
from stac_ros.saved_map import MAP, SavedMap
from stac_ros.settings import FrameSettings, PointSettings
from stac_ros.stamps import stamp_nanoseconds
from stac_ros.trajectory import Trajectory
from stac_ros.transform_tree import Sample, TransformTree
from stac_ros.transforms import TransformError


@pytest.fixture(scope="module")
def network():
    return load_network(CONFIG.model).network


def messages(count: int, first_stamp_s: float = 10.0, *size: int, **options: int) -> list[Image]:
    """Images a tenth of a second apart."""
    return images(count, first_stamp_s, *size, period_s=0.1, **options)


def test_what_is_published_agrees_with_what_the_session_predicts(network):
    sent = messages(3)
    session = StreamSession(network, CONFIG)
    pixels = [np.frombuffer(image.data, np.uint8).reshape(HEIGHT, WIDTH, 3) for image in sent]
    expected = session.step(pixels).to_host()
    with mapper_of(network, points__confidence_percentile=0.0) as (mapper, notes, statistics):
        mapper.process(sent)
        assert [frame.header for frame in notes.frames] == [image.header for image in sent]
        assert statistics.snapshot().mapped == 3 and len(mapper.trajectory) == 3
    for index, frame in enumerate(notes.frames):
        world_from_camera = expected.world_from_camera[index].double().numpy()
        assert np.allclose(frame.map_from_camera, MAP_FROM_OPTICAL @ world_from_camera, atol=1e-6)
        assert np.array_equal(frame.image, pixels[index])


def test_poses_and_points_are_those_of_the_calibrated_camera(network):
    sent, calibration = messages(3), CameraCalibration()
    k = np.array([[1.2 * WIDTH, 0, WIDTH / 2 + 1], [0, 1.2 * WIDTH, HEIGHT / 2 - 1], [0, 0, 1]])
    calibration.receive(calibration_message(k, HEIGHT, WIDTH, Header()))
    session = StreamSession(network, CONFIG)
    pixels = [np.frombuffer(image.data, np.uint8).reshape(HEIGHT, WIDTH, 3) for image in sent]
    expected = session.step(pixels, k).to_host()
    with mapper_of(network, calibration=calibration) as (mapper, notes, _):
        mapper.process(sent)
        assert mapper.session_stats.landmarks == session.stats().landmarks > 0
    for index, frame in enumerate(notes.frames):
        world_from_camera = expected.world_from_camera[index].double().numpy()
        assert np.allclose(frame.map_from_camera, MAP_FROM_OPTICAL @ world_from_camera, atol=1e-6)
        assert np.allclose(frame.camera_intrinsics(), k, rtol=1e-6)


def test_points_depth_and_camera_tell_the_same_geometry(network):
    """Every point, seen by the published camera from the published pose, lies on its own pixel and depth."""
    with mapper_of(network, points__confidence_percentile=0.0) as (mapper, notes, _):
        mapper.process(messages(2))
    frame, points = notes.frames[1], notes.points[1]
    depth, k = frame.depth_image(), frame.camera_intrinsics()
    assert depth.shape == (HEIGHT, WIDTH) and depth.dtype == np.float32
    in_camera = points.positions.astype(float) - frame.map_from_camera[:3, 3]
    in_camera = in_camera @ frame.map_from_camera[:3, :3]
    u, v = ((in_camera @ k.T)[:, :2] / in_camera[:, 2:]).T
    rows, columns = np.rint(v).astype(int), np.rint(u).astype(int)
    assert rows.min() >= 0 and rows.max() < HEIGHT and columns.min() >= 0 and columns.max() < WIDTH
    close = np.isclose(depth[rows, columns], in_camera[:, 2], rtol=1e-4)
    assert close.mean() > 0.9, "rounding may choose a neighbour here and there"
    colours = frame.image[rows, columns]
    assert (colours == points.colours).all(axis=1).mean() > 0.9
    assert (points.confidences >= 1).all()


def test_the_map_is_upright_where_the_first_camera_is():
    """REP-103: what lies ahead of a level camera is +x, what is on its right −y, what is below −z."""
    ahead, right, below = (
        MAP_FROM_OPTICAL @ np.array(axis) for axis in ([0, 0, 1, 0], [1, 0, 0, 0], [0, 1, 0, 0])
    )
    assert (
        ahead.tolist() == [1, 0, 0, 0] and right.tolist() == [0, -1, 0, 0] and below.tolist() == [0, 0, -1, 0]
    )
    assert np.linalg.det(MAP_FROM_OPTICAL) == 1


def test_a_fixed_scale_multiplies_every_length_and_nothing_else(network):
    with mapper_of(network) as (mapper, plain, _):
        mapper.process(messages(2))
    with mapper_of(network, scale__mode="fixed", scale__factor=2.5) as (mapper, scaled, _):
        mapper.process(messages(2))
    for one, other in zip(plain.frames, scaled.frames, strict=True):
        assert np.allclose(2.5 * one.depth_image(), other.depth_image())
        assert np.allclose(2.5 * one.map_from_camera[:3, 3], other.map_from_camera[:3, 3])
        assert np.allclose(one.map_from_camera[:3, :3], other.map_from_camera[:3, :3])
        assert np.allclose(one.camera_intrinsics(), other.camera_intrinsics())
    assert np.allclose(2.5 * plain.points[1].positions, scaled.points[1].positions, atol=1e-5)


def test_points_can_be_filtered_and_bounded(network):
    with mapper_of(network) as (mapper, notes, _):
        mapper.process(messages(1))
    frame, pixels = notes.frames[0], 42 * 56
    everything = frame.points(PointSettings(confidence_percentile=0.0))
    assert len(everything.positions) == pixels
    half = frame.points(PointSettings(confidence_percentile=50.0))
    assert abs(len(half.positions) - pixels / 2) <= pixels * 0.02
    assert half.confidences.min() >= np.percentile(everything.confidences, 49)
    few = frame.points(PointSettings(confidence_percentile=0.0, max_points=100))
    assert len(few.positions) == 100 and len(np.unique(few.positions[:, 1])) > 50
    limit = float(np.median(frame.depth.numpy()))
    near = frame.points(PointSettings(confidence_percentile=0.0, depth_limit=limit))
    assert 0.4 * pixels < len(near.positions) < 0.6 * pixels
    none = frame.points(PointSettings(confidence_minimum=1e9))
    assert none.positions.shape == (0, 3) and none.colours.shape == (0, 3)


def test_depth_that_is_no_number_reaches_no_one(network):
    with mapper_of(network, points__confidence_percentile=0.0) as (mapper, notes, _):
        mapper.process(messages(1))
        frame = notes.frames[0]
        depth, confidence = frame.depth.clone(), frame.confidence.clone()
        depth[:10], depth[10, :] = torch.nan, torch.inf
        depth[11], confidence[12] = 0, torch.nan
        spoilt = MappedFrame(**{**vars(frame), "depth": depth, "confidence": confidence})
        assert len(spoilt.points(PointSettings(confidence_percentile=0.0)).positions) == (42 - 13) * 56
        assert np.isfinite(spoilt.points(PointSettings()).positions).all()
        published = spoilt.depth_image()
        assert np.isnan(published[:10]).all() and not np.isinf(published).any() and (published != 0).all()


@pytest.mark.parametrize("reach", [-1.0, 0.0], ids=["submaps", "one submap"])
def test_poses_that_are_no_numbers_end_a_stream_only_where_it_cannot_go_on(caplog, reach):
    broken = load_network(CONFIG.model).network
    weights = {name: p.clone() for name, p in broken.camera_head.state_dict().items()}
    config = replace(CONFIG, submap=SubmapConfig(reach=reach))
    with mapper_of(broken, config=config, map__keep_on_new_stream=True) as (mapper, notes, statistics):
        mapper.process(messages(2))
        before = len(mapper.map)
        with torch.no_grad():
            for parameter in broken.camera_head.parameters():
                parameter.fill_(torch.nan)
        mapper.process(messages(2, 11))
        assert statistics.snapshot().dropped == {"not finite": 2} and statistics.snapshot().failing
        assert notes.streams == [] and len(mapper.map) == before
        broken.camera_head.load_state_dict(weights)
        mapper.process(messages(2, 12))
        spoilt = reach == 0  # the camera head remembers
        assert notes.streams == [True] * spoilt and statistics.snapshot().failing == spoilt
        mapper.process(messages(2, 13))
        assert len(notes.frames) == (4 if spoilt else 6)
        assert len(mapper.map) >= before and not statistics.snapshot().failing


def test_stamps_that_go_back_begin_a_new_stream(network, caplog):
    with mapper_of(network) as (mapper, notes, statistics):
        mapper.process([*messages(2, 50), *messages(2, 10)])
        assert notes.streams == [False] and len(notes.frames) == 4
        assert len(mapper.trajectory) == 2, "the map of the first stream is gone"
        assert statistics.snapshot().events == {"time jumps": 1, "new streams": 1}
        assert "stamps went back by 40.100 s: a new stream begins, the map is cleared" in caplog.text
        assert mapper.session_stats.cache.frames_seen == 2


def test_stamps_that_go_back_may_be_ignored(network, caplog):
    with mapper_of(network, input__time_jump="continue") as (mapper, notes, statistics):
        mapper.process([*messages(1, 50), *messages(1, 10)])
        assert notes.streams == [] and len(mapper.trajectory) == 2
        assert statistics.snapshot().events == {"time jumps": 1}
        assert "the stream goes on" in caplog.text


def test_a_single_stamp_far_ahead_costs_no_map(network, caplog):
    with mapper_of(network) as (mapper, notes, statistics):
        mapper.process(stamped(10.0, 10.1, 5000.0))
        mapper.process(stamped(10.2, 10.3))
        assert notes.streams == [] and len(mapper.trajectory) == 5
        assert statistics.snapshot().events == {"stray stamps": 1}
        assert "stamped 4989.800 s or more ahead of those around it" in caplog.text
        mapper.process(stamped(5001.0, 5001.1, 10.4))
        assert notes.streams == [False], "two of them are a clock that was set"


def stamped(*stamps_s: float, size: tuple[int, int] = (HEIGHT, WIDTH)) -> list[Image]:
    """One image at each of these times."""
    return [image for stamp_s in stamps_s for image in messages(1, stamp_s, *size)]


def trajectory_s(mapper: InSeries) -> list[float]:
    """When each pose of the trajectory was."""
    return [float(line.split()[0]) for line in mapper.trajectory.tum()]


def test_a_late_image_is_left_out_and_costs_no_map(network, caplog):
    with mapper_of(network) as (mapper, notes, statistics):
        mapper.process(stamped(50, 50.1, 50.095))
        mapper.process(stamped(50.2, 49.3, 50.3))
        assert notes.streams == [] and trajectory_s(mapper) == [50, 50.1, 50.2, 50.3]
        counts = statistics.snapshot()
        assert counts.dropped == {"late": 2} and counts.events == {} and counts.last_error == ""
        assert caplog.text.count("stamped 0.005 s before the one mapped last") == 1, "told once"
        assert "late: " in caplog.text and "two publishers" in caplog.text
        mapper.process(stamped(49.3))
        assert notes.streams == [False] and trajectory_s(mapper) == [49.3], "a whole second is a jump"


def test_the_tolerance_of_lateness_can_be_set(network):
    with mapper_of(network, input__late_tolerance=0.0) as (mapper, notes, statistics):
        mapper.process(stamped(50, 49.99))
        assert notes.streams == [False] and statistics.snapshot().dropped == {}
    with mapper_of(network, input__late_tolerance=60.0) as (mapper, notes, statistics):
        mapper.process(stamped(50, 0.5))
        assert notes.streams == [] and statistics.snapshot().dropped == {"late": 1}


def test_two_publishers_on_one_topic_do_not_clear_each_others_maps(network):
    with mapper_of(network) as (mapper, notes, statistics):
        for index in range(4):
            mapper.process(stamped(20 + 0.1 * index, 19.98 + 0.1 * index))
        assert notes.streams == [] and len(notes.frames) == 4
        assert statistics.snapshot().dropped == {"late": 4}


def test_an_image_said_twice_is_mapped_once(network, caplog):
    with mapper_of(network) as (mapper, notes, statistics):
        mapper.process(stamped(20, 20, 20.1, 20.1, 20.1))
        assert notes.streams == [] and trajectory_s(mapper) == [20, 20.1]
        assert statistics.snapshot().dropped == {"duplicate": 3}
        assert caplog.text.count("has the stamp of the one mapped last") == 1


@pytest.mark.parametrize("size", [(1, 1), (96, 128)])
def test_a_stray_image_of_another_size_is_left_out_and_costs_no_map(network, size, caplog):
    with mapper_of(network) as (mapper, notes, statistics):
        mapper.process([*stamped(20), *stamped(20.1, size=size), *stamped(20.2)])
        for index in range(3):  # a second camera on the topic
            mapper.process([*stamped(20.31 + 0.1 * index, size=size), *stamped(20.33 + 0.1 * index)])
        assert notes.streams == [] and len(notes.frames) == 5
        assert statistics.snapshot().dropped == {"size": 4} and statistics.snapshot().events == {}
        assert caplog.text.count(f"an image of {size[1]}×{size[0]} among those of 64×48") == 1


@pytest.mark.parametrize("keep", [False, True])
def test_another_image_size_that_persists_begins_a_new_stream(network, keep, caplog):
    with mapper_of(network, map__keep_on_new_stream=keep) as (mapper, notes, statistics):
        mapper.process(messages(2))
        before = len(mapper.map)
        mapper.process([*messages(1, 11), *messages(2, 12, 40, 80)])
        assert notes.streams == [] and len(notes.frames) == 3
        mapper.process(messages(2, 12.2, 40, 80))
        assert notes.streams == [keep] and len(notes.frames) == 5
        assert trajectory_s(mapper) == [10, 10.1, 11, 12.2, 12.3][-5 if keep else -2 :]
        assert (len(mapper.map) > before) or not keep
        assert notes.frames[-1].depth_image().shape == (40, 80)
        assert statistics.snapshot().events == {"size changes": 1, "new streams": 1}
        assert statistics.snapshot().dropped == {"size": 2}
        assert "image size changed from 64×48 to 80×40: a new stream begins" in caplog.text


def of_frame(frame: str, *stamps_s: float) -> list[Image]:
    """An image at each of these times, said to be in this frame."""
    found = stamped(*stamps_s)
    for image in found:
        image.header.frame_id = frame
    return found


def test_another_frame_within_a_stream_is_told_once_and_counted(network, caplog):
    with mapper_of(network) as (mapper, notes, statistics):
        mapper.process([*of_frame("left", 20, 20.1), *of_frame("right", 20.2, 20.3)])
        mapper.process(of_frame("left", 20.4))
        assert notes.streams == [] and len(notes.frames) == 5
        assert statistics.snapshot().events == {"frame changes": 2}
        assert caplog.text.count("frame_id of the images changed from 'left' to 'right' within a stream") == 1
        assert "frame_id of the images changed from 'right'" not in caplog.text
        mapper.reset()
        mapper.process(of_frame("right", 21))
        assert statistics.snapshot().events == {"frame changes": 2}, "another stream, another camera"
    with mapper_of(network, frames__camera="camera") as (mapper, notes, statistics):
        mapper.process([*of_frame("left", 20, 20.1), *of_frame("right", 20.2)])
        assert statistics.snapshot().events == {}, "the one frame has been named"


def test_images_without_a_stamp_are_refused(network, caplog):
    """They would all be mapped, and looked up in odometry, under one time that is none.

    Nor has ROS a time before 1970: tf2 raises what is no error of transforms.
    """
    with mapper_of(network) as (mapper, notes, statistics):
        mapper.process([*stamped(20), *stamped(0, 0, -5), *stamped(20.1)])
        assert notes.streams == [] and trajectory_s(mapper) == [20, 20.1]
        assert statistics.snapshot().dropped == {"bad image (stamp)": 3}
        assert caplog.text.count("the image carries no stamp") == 1
        assert "set header.stamp" in caplog.text and "stac-replay --use-wall-stamps" in caplog.text


@pytest.mark.parametrize("frame", ["/cam", "cam"])
def test_a_leading_slash_is_no_part_of_a_frame(network, frame):
    """Names of ROS 1; tf2 refuses them."""
    with mapper_of(network) as (mapper, notes, _):
        mapper.process(of_frame(frame, 20))
        assert notes.frames[0].header.frame_id == "cam"


def test_without_any_name_the_camera_gets_one(network):
    with mapper_of(network) as (mapper, notes, _):
        mapper.process([*of_frame("", 20), *of_frame("/", 20.1)])
        assert [frame.header.frame_id for frame in notes.frames] == ["camera_optical_frame"] * 2


@pytest.mark.parametrize("frame", ["map", "/map", "odom"])
def test_a_camera_cannot_be_the_map_or_odometry(network, frame, caplog):
    with mapper_of(network, Robot(), frames__odom="odom") as (mapper, notes, statistics):
        mapper.process(of_frame(frame, 20, 20.1))
        assert notes.frames == [] and statistics.snapshot().dropped == {"bad image (frame)": 2}
        name = frame.lstrip("/")
        assert caplog.text.count(f"frame_id {frame!r} of the image is the frames.{name} of this node") == 1
        assert "name the camera's optical frame in frames.camera" in caplog.text


def test_images_of_twelve_bits_in_sixteen_are_told_of_once(network, caplog):
    images = stamped(20, 20.1)
    for image in images:
        grey = np.frombuffer(image.data, np.uint8).reshape(HEIGHT, WIDTH, 3)[:, :, 0]
        image.encoding, image.step = "mono16", 2 * WIDTH
        image.data = byte_array(grey.astype(np.uint16) * 16)
    with mapper_of(network) as (mapper, notes, statistics):
        mapper.process(images)
        assert len(notes.frames) == 2 and statistics.snapshot().events == {"wasted bits": 2}
        assert caplog.text.count("nearly black") == 1 and "send mono8" in caplog.text


def test_images_that_cannot_be_mapped_are_refused_before_they_end_a_stream(network, caplog):
    """Of one pixel's height they are less than a patch."""
    with mapper_of(network) as (mapper, notes, statistics):
        mapper.process(messages(1))
        mapper.process(messages(6, 11, height=1))
        counts = statistics.snapshot()
        assert counts.dropped == {"bad image (size)": 6} and counts.events == {} and not counts.failing
        assert "less than one patch" in counts.last_error and "raise image.size" in caplog.text
        mapper.process(messages(1, 12))
        assert notes.streams == [] and len(notes.frames) == 2


def test_a_chunk_that_fails_is_counted_and_the_stream_goes_on(caplog):
    network = load_network(CONFIG.model).network

    def fail(*_) -> None:
        raise torch.OutOfMemoryError("out of memory: tried to allocate 2 GiB")

    with mapper_of(network) as (mapper, notes, statistics):
        mapper.process(messages(1))
        failure = network.register_forward_pre_hook(fail)
        mapper.process(messages(2, 11))
        counts = statistics.snapshot()
        assert counts.dropped == {"inference": 2} and counts.failing
        assert (
            "lower image.size" in counts.last_error
            and "cache.memory_budget" in counts.last_error
            and "2 GiB" in caplog.text
        )
        failure.remove()
        mapper.process(messages(1, 12))
        assert notes.streams == [] and len(notes.frames) == 2 and len(mapper.trajectory) == 2


def test_bad_images_leave_a_chunk_without_spoiling_it(network, caplog):
    good, bad = messages(2), messages(3)
    bad[0].encoding, bad[1].height = "rgb9", 0
    bad[2].data = bad[2].data[:-1]
    with mapper_of(network) as (mapper, notes, statistics):
        mapper.process([bad[0], good[0], bad[1], bad[2], bad[2], good[1]])
        assert [frame.header for frame in notes.frames] == [image.header for image in good]
        assert notes.done == [good[1].header]
        causes = {"bad image (encoding)": 1, "bad image (size)": 1, "bad image (truncated)": 2}
        assert statistics.snapshot().dropped == causes
        assert caplog.text.count("is truncated") == 1


def test_a_full_memory_is_logged_once(network, caplog):
    limited = CacheConfig(memory_budget=3_720_000)  # little more than the live cache
    with mapper_of(network, config=replace(CONFIG, cache=limited, submap=SubmapConfig(reach=0.0))) as (
        mapper,
        *_,
    ):
        for step in range(8):
            mapper.process(messages(4, 10.0 + step))
        assert mapper.session_stats.cache.full
    assert caplog.text.count("has come to its limit of 3720000 bytes") == 1


def test_pausing_ignores_images_keeps_the_map_and_is_logged(network, caplog):
    caplog.set_level("INFO")
    with mapper_of(network) as (mapper, notes, statistics):
        mapper.process(messages(1))
        before = len(mapper.map)
        mapper.pause(True)
        mapper.process(ignored := messages(2, 11))
        assert len(notes.frames) == 1 and len(mapper.map) == before
        assert statistics.snapshot().dropped == {"paused": 2}
        assert notes.done[-1] == ignored[-1].header
        mapper.pause(False)
        mapper.process(messages(1, 12))
        assert len(notes.frames) == 2
        assert "paused on request: images are ignored" in caplog.text and "running on request" in caplog.text


def test_reset_and_save(network, tmp_path):
    with mapper_of(network, map__directory=str(tmp_path / "maps")) as (mapper, notes, _):
        with pytest.raises(ValueError, match="nothing to save yet"):
            mapper.save()
        mapper.process(messages(2))
        ply, tum = map(Path, mapper.save().splitlines())
        assert ply.name == "map.ply" and ply.read_bytes().startswith(b"ply\n")
        assert [line.split()[0] for line in tum.read_text().splitlines()] == ["10.000000000", "10.100000000"]
        mapper.reset()
        assert notes.streams == [False] and len(mapper.map) == 0 and len(mapper.trajectory) == 0
        assert mapper.session_stats.cache.frames_seen == 0
        mapper.process(messages(1, 5))  # earlier than before: no jump, since nothing came before
        assert notes.streams == [False] and len(mapper.trajectory) == 1


def test_a_map_that_cannot_be_written_is_an_error_that_names_the_folder(network, tmp_path):
    (tmp_path / "file").write_text("in the way")
    with mapper_of(network, map__directory=str(tmp_path / "file")) as (mapper, _, _):
        mapper.process(messages(1))
        with pytest.raises(
            OSError, match=r"map.directory = '.*file' cannot be written: .*; set it to another"
        ):
            mapper.save()
        assert len(mapper.map) > 0, "it can be saved elsewhere"


class Robot:
    """Odometry that knows where the camera is from a given time on."""

    def odom_from_camera(self, camera: str, stamp_ns: int) -> np.ndarray:
        if camera != "front" or stamp_ns < 10_000_000_000:
            raise NoOdometry(TransformError(f"no {camera}"))
        pose = MAP_FROM_OPTICAL.copy()
        pose[:3, 3] = 3.0, stamp_ns / 1e9, 1.0
        return pose


def test_with_odometry_the_map_begins_where_odometry_is(network, caplog):
    robot = Robot()
    with mapper_of(network, robot, frames__odom="odom", frames__camera="front") as (
        mapper,
        notes,
        statistics,
    ):
        mapper.process([*messages(1, 9), *messages(2, 10)])
        assert statistics.snapshot().dropped == {"no odometry": 1}
        assert "the camera's mount), or leave frames.odom empty" in caplog.text
        first = notes.frames[0]
        assert first.header.frame_id == "front" and stamp_nanoseconds(first.header.stamp) == 10_000_000_000
        assert np.allclose(first.map_from_camera, robot.odom_from_camera("front", 10_000_000_000))
        mapper.process(messages(1, 5))
        assert notes.streams == [], "an image without odometry is dropped before its stamp counts"


class DriverTree:
    """The frames of a camera's own driver: nothing in them moves, but for a mount that shakes."""

    def odom_from_camera(self, camera: str, stamp_ns: int) -> np.ndarray:
        pose = MAP_FROM_OPTICAL.copy()
        pose[0, 3] = 0.01 * np.sin(stamp_ns)
        return pose


@pytest.mark.parametrize(("odometry", "mode", "warned"), [
    (Robot(), "none", True), (Robot(), "fixed", False), (DriverTree(), "none", False),
])  # fmt: skip
def test_metres_are_missed_only_where_odometry_moves(network, caplog, odometry, mode, warned):
    given = {"frames__odom": "odom", "frames__camera": "front", "scale__mode": mode}
    with mapper_of(network, odometry, **given) as (mapper, notes, _):
        mapper.process(messages(3))
        mapper.process(messages(1, 11))
    assert len(notes.frames) == 4
    assert caplog.text.count("the camera moves in frames.odom, in metres, but scale.mode is none") == warned


class MetricRobot:
    """Odometry of a robot that moves as the network sees it, in metres and in a frame of its own."""

    metres_per_unit = 2.31

    def __init__(self, frames: list[MappedFrame]) -> None:
        """frames: of the same images, mapped in the network's unit."""
        self._odom_from_world = np.eye(4)
        self._odom_from_world[:3, :3] = [[0.6, -0.8, 0], [0.8, 0.6, 0], [0, 0, 1]]
        self._odom_from_world[:3, 3] = 5, -2, 0.3
        self._cameras = {stamp_nanoseconds(f.header.stamp): f.map_from_camera for f in frames}

    def odom_from_camera(self, camera: str, stamp_ns: int) -> np.ndarray:
        world_from_camera = self._cameras[stamp_ns].copy()
        world_from_camera[:3, 3] *= self.metres_per_unit
        return self._odom_from_world @ world_from_camera

    @property
    def shortest_step(self) -> float:
        positions = [camera[:3, 3] for camera in self._cameras.values()]
        steps = np.linalg.norm(np.diff(positions, axis=0), axis=1)
        return float(steps.min() * self.metres_per_unit)


def chunks() -> list[list[Image]]:
    """A stream of 16 images in four steps."""
    sent = messages(16)
    return [sent[first : first + 4] for first in range(0, 16, 4)]


def process(mapper: InSeries, *chunks: list[Image]) -> None:
    for chunk in chunks:
        mapper.process(chunk)


@pytest.fixture(scope="module")
def metric_robot(network) -> MetricRobot:
    with mapper_of(network) as (mapper, notes, _):
        process(mapper, *chunks())
    return MetricRobot(notes.frames)


def numbers(trajectory: Trajectory) -> np.ndarray:
    return np.array([line.split() for line in trajectory.tum()], float)


def sorted_points(voxel_map: VoxelMap) -> np.ndarray:
    positions, colours = voxel_map.points()
    rows = np.hstack([positions.round(3), colours])
    return rows[np.lexsort(rows.T)]


FINE = {"frames__odom": "odom", "map__voxel_size": 1e-5}  # no two points in a voxel, in whatever unit


def test_along_odometry_map_and_path_become_metric_as_if_they_had_always_been(network, metric_robot):
    sent, factor = chunks(), metric_robot.metres_per_unit
    with mapper_of(network, metric_robot, scale__mode="fixed", scale__factor=factor, **FINE) as (right, *_):
        process(right, *sent)
    given = {"scale__mode": "odometry", "scale__baseline": 9.99 * metric_robot.shortest_step}
    with mapper_of(network, metric_robot, **given, **FINE) as (mapper, notes, _):
        process(mapper, *sent[:2])
        assert not notes.moves and "travelled" in str(mapper.scale)
        assert not np.allclose(
            numbers(mapper.trajectory)[:, 1:4], numbers(right.trajectory)[:8, 1:4], atol=1e-3
        )
        process(mapper, *sent[2:])
        (moves,) = notes.moves
        assert moves.scale[0] == pytest.approx(factor, rel=1e-5) and "2.31 m per unit" in str(mapper.scale)
        assert np.allclose(numbers(mapper.trajectory), numbers(right.trajectory), atol=1e-5)
        found, expected = sorted_points(mapper.map), sorted_points(right.map)
        assert len(found) == len(expected) and np.allclose(found.mean(0), expected.mean(0), atol=1e-3)
        assert np.allclose(found.std(0), expected.std(0), atol=1e-3)
    map_from_odom = [frame.map_from_camera @ np.linalg.inv(frame.odom_from_camera) for frame in notes.frames]
    assert np.allclose(map_from_odom[0], np.eye(4), atol=1e-6)
    assert np.allclose(map_from_odom[11:], np.eye(4), atol=1e-5), "such odometry needs no correction"
    assert np.abs(map_from_odom[9] - np.eye(4)).max() > 1e-3


class RoughRobot(MetricRobot):
    """One whose odometry tells the first stretch half as long again."""

    def __init__(self, frames: list[MappedFrame]) -> None:
        super().__init__(frames)
        way = np.array([camera[:3, 3] for camera in self._cameras.values()])
        steps = np.diff(way, axis=0)
        steps[:STEPS] *= 1.5
        for camera, position in zip(
            self._cameras.values(), np.vstack([way[:1], way[0] + np.cumsum(steps, axis=0)]), strict=True
        ):
            camera[:3, 3] = position


def test_a_better_scale_moves_map_and_path_as_if_it_had_always_been_known(network, tmp_path):
    sent = [messages(48)[first : first + 4] for first in range(0, 48, 4)]
    with mapper_of(network, **FINE | {"frames__odom": ""}) as (plain, notes, _):
        process(plain, *sent)
    robot = RoughRobot(notes.frames)
    given = {"scale__mode": "odometry", "scale__baseline": 9.99 * robot.shortest_step}
    with mapper_of(network, robot, **given, **FINE) as (mapper, notes, _):
        process(mapper, *sent)
        mapper.mapper.save(tmp_path)
        factor = float(SavedMap.read(tmp_path / MAP).factor)
        stretches = SavedMap.read(tmp_path / MAP).stretches[:, 0]
    assert len(notes.moves) > 1, "it has been put right"
    assert stretches[0] > 1.2 * factor and factor == pytest.approx(np.median(stretches), rel=TOLERANCE)
    with mapper_of(network, robot, scale__mode="fixed", scale__factor=factor, **FINE) as (right, *_):
        process(right, *sent)
    assert np.allclose(numbers(mapper.trajectory), numbers(right.trajectory), atol=1e-4)
    assert len(mapper.map) == pytest.approx(len(right.map), rel=1e-3)


def test_no_scale_is_measured_across_a_jump(network, metric_robot, monkeypatch):
    """From the second chunk on, the network's camera is elsewhere, as where drift has been taken back."""
    step, seen = StreamSession.step, []

    def jumping(session, *given, **named):
        prediction = step(session, *given, **named)
        seen.append(prediction.frames)
        poses = prediction.world_from_camera.clone()
        poses[:, :3, 3] += 2 * metric_robot.shortest_step * (len(seen) > 1)
        return replace(prediction, world_from_camera=poses, continues=len(seen) != 2)

    monkeypatch.setattr(StreamSession, "step", jumping)
    given = {"scale__mode": "odometry", "scale__baseline": 9.99 * metric_robot.shortest_step}
    with mapper_of(network, metric_robot, **given, **FINE) as (mapper, notes, _):
        process(mapper, *chunks())
    (moves,) = notes.moves
    assert moves.scale[0] == pytest.approx(metric_robot.metres_per_unit, rel=1e-5)


def test_every_stream_has_its_own_scale(network, metric_robot):
    sent = chunks()
    given = {"scale__mode": "odometry", "scale__baseline": 9.99 * metric_robot.shortest_step}
    with mapper_of(network, metric_robot, **given, **FINE) as (mapper, notes, _):
        process(mapper, *sent)
        assert str(mapper.scale) == "odometry, 2.31 m per unit"
        process(mapper, *sent[:2])  # stamps go back
        assert notes.streams == [False] and str(mapper.scale).endswith("m travelled")
        for old, new in zip(notes.frames[:8], notes.frames[16:], strict=True):
            assert np.array_equal(old.depth_image(), new.depth_image()), "in its own unit again"


@pytest.mark.parametrize("keep", [False, True])
def test_a_factor_set_while_running_holds_for_the_whole_stream_or_for_the_next(network, keep):
    with parameters_of(scale__mode="fixed", scale__factor=2.0, map__keep_on_new_stream=keep) as (node, given):
        mapper = InSeries(StreamSession(network, CONFIG), given, Statistics(), notes := Notes())
        mapper.process(messages(2))
        before = numbers(mapper.trajectory)
        assert all(node.set_parameters([Parameter("scale.factor", value=3.0)]))
        mapper.process(messages(1, 11))
        now = 1.0 if keep else 1.5
        assert np.allclose(numbers(mapper.trajectory)[:2, 1:4], now * before[:, 1:4], atol=1e-6)
        assert len(notes.moves) == (not keep) and str(mapper.scale) == f"fixed, {2 * now:g} m per unit"
        mapper.process(messages(2))  # stamps go back
        assert np.allclose(notes.frames[-2].depth_image(), 1.5 * notes.frames[0].depth_image(), rtol=1e-5)


def odometry_between(first_s: float, last_s: float) -> OdometryLink:
    """odom → base → camera, known from one time to another, as /tf would fill it."""
    tree, unit = TransformTree(), np.array([0.0, 0, 0, 1])
    tree.add("camera", 0, Sample("base", np.zeros(3), unit), static=True)
    for stamp_s in (first_s, last_s):
        tree.add("base", int(stamp_s * 1e9), Sample("odom", np.array([stamp_s, 0, 0]), unit))
    return OdometryLink(tree, FrameSettings(odom="odom", transform_timeout=0.01))


@pytest.mark.parametrize(
    ("stamp_s", "frame", "cause", "cure"),
    [
        (20.5, "nowhere", "no odometry", "unknown.*Publish .*the camera's mount.*leave frames.odom empty"),
        (
            23.5,
            "camera",
            "no odometry (stamp)",
            r"ahead of odometry by 2\.500 s: synch.*transform_timeout",
        ),
        (17, "camera", "no odometry (stamp)", r"behind all known odometry by 2\.000 s: synchronise"),
    ],
)
def test_what_is_missing_of_odometry_has_its_own_cure(network, stamp_s, frame, cause, cure, caplog):
    with mapper_of(network, odometry_between(19, 21), frames__odom="odom") as (mapper, notes, statistics):
        both = [*of_frame(frame, stamp_s), *of_frame("camera", 20)]
        mapper.process(sorted(both, key=lambda image: stamp_nanoseconds(image.header.stamp)))
        assert len(notes.frames) == 1 and statistics.snapshot().dropped == {cause: 1}
        assert re.search(cure, caplog.text)
        assert ("Publish what leads" in caplog.text) == (frame == "nowhere"), "it is published"


def test_unheard_topics_cost_nothing(network, monkeypatch):
    with mapper_of(network) as (mapper, notes, _):
        mapper.process(messages(1))

    def refuse(*_):
        raise AssertionError("nobody asked for this")

    for name in ("depth_image", "confidence_image", "camera_intrinsics"):
        monkeypatch.setattr(MappedFrame, name, refuse)
    monkeypatch.setattr("stac_ros.outputs.cloud_message", refuse)
    with parameters_of() as (node, parameters):
        outputs = Outputs(node, parameters, CameraCalibration())
        outputs.publish(notes.frames[0], notes.points[0])
        assert not outputs.whole_is_due()


def test_velocity_is_that_between_two_images():
    """A camera that drives a circle of radius 2 at 0.5 rad/s sees a constant velocity ahead."""
    odometry, poses = OdometryMessages(), []
    for step in range(3):
        angle = 0.05 * step
        pose = np.eye(4)  # x ahead, y left, turning left
        pose[:2, :2] = [[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]]
        pose[:2, 3] = 2 * np.sin(angle), 2 * (1 - np.cos(angle))
        header = Header(stamp=Time(nanosec=100_000_000 * step), frame_id="map")
        covered = pose_with_covariance(pose_message(pose), None)
        poses.append(pose)
        moved = np.linalg.inv(poses[-2]) @ pose if step else None
        found = odometry.next(header, "camera", covered, moved).twist.twist
        if step == 0:
            assert (found.linear.x, found.angular.z) == (0, 0)
        else:
            assert np.allclose([found.linear.x, found.linear.y, found.linear.z], [1, 0, 0], atol=0.03)
            assert np.allclose([found.angular.x, found.angular.y, found.angular.z], [0, 0, 0.5], atol=1e-6)
    same_time = odometry.next(header, "camera", covered, moved).twist.twist
    assert same_time.linear.x == 0


def test_no_velocity_leads_to_where_a_camera_is_found(network, monkeypatch):
    with mapper_of(network) as (mapper, notes, _):
        mapper.process(messages(2))
        step = StreamSession.step
        monkeypatch.setattr(
            StreamSession, "step", lambda *given, **named: replace(step(*given, **named), continues=False)
        )
        mapper.process(messages(2, 11.0))
    assert notes.jumps == [2]
    heard = []
    with parameters_of() as (node, parameters):
        outputs, topic = Outputs(node, parameters, CameraCalibration()), topics.ODOMETRY
        node.create_subscription(topic.type, topic.name, heard.append, topic.qos())
        spin_until([node], lambda: outputs.has_subscribers(topic), "the subscription")
        for frame, points in zip(notes.frames, notes.points, strict=True):
            outputs.publish(frame, points)
        spin_until([node], lambda: len(heard) == 4, "odometry")
    assert [message.twist.twist.linear.x != 0 for message in heard] == [False, True, False, True]


def test_the_path_is_bounded(network):
    with mapper_of(network) as (mapper, notes, _):
        mapper.process(messages(4))
    heard: list = []
    with parameters_of(publish__path_length=3) as (node, parameters):
        node.create_subscription(topics.PATH.type, topics.PATH.name, heard.append, topics.PATH.qos())
        outputs = Outputs(node, parameters, CameraCalibration())
        for frame, points in zip(notes.frames, notes.points, strict=True):
            outputs.publish(frame, points)
        spin_until([node], outputs.whole_is_due, "the own subscription")
        outputs.publish_whole(mapper.map, mapper.mapper.grid)
        spin_until([node], lambda: heard, "the path")
        assert not outputs.whole_is_due(), "it has been said"
    assert [pose.header.stamp.nanosec for pose in heard[0].poses] == [100_000_000, 200_000_000, 300_000_000]


@pytest.mark.parametrize("grow", [True, False])
def test_a_map_is_said_again_only_after_it_has_changed(network, grow):
    with mapper_of(network) as (mapper, notes, _):
        mapper.process(messages(2))
    heard: list = []
    with parameters_of(map__grow=grow) as (node, parameters):
        topic = topics.MAP_POINTS
        node.create_subscription(topic.type, topic.name, heard.append, topic.qos())
        outputs = Outputs(node, parameters, CameraCalibration())
        outputs.loaded()
        spin_until([node], outputs.whole_is_due, "the own subscription")
        outputs.publish_whole(mapper.map, mapper.mapper.grid)
        spin_until([node], lambda: heard, "the map")
        outputs.publish(notes.frames[0], notes.points[0])
        assert outputs.whole_is_due() == grow


def test_listeners_that_are_gone_hold_up_the_end_once(monkeypatch):
    """Not once for each topic."""
    waits = []

    def in_vain(publisher, limit):
        waits.append(limit.nanoseconds / 1e9)
        time.sleep(waits[-1])

    monkeypatch.setattr("stac_ros.outputs.FLUSH_S", 0.2)
    monkeypatch.setattr(Publisher, "wait_for_all_acked", in_vain)
    with parameters_of() as (node, parameters):
        Outputs(node, parameters, CameraCalibration()).flush()
    assert len(waits) > 1 and 0.1 < sum(waits) < 0.2 + 1e-6
