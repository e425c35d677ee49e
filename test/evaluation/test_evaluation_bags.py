"""The bag reader on recordings written here, message by message, and on recordings without images."""

import os
from pathlib import Path

import numpy as np
import pytest
from evaluation.evaluation_scene import (
    BagWriter,
    camera_info,
    compressed_message,
    image_message,
    odometry,
    pose_stamped,
    tf,
    tiny_frames,
    transform,
)
from rosbags.rosbag2 import Reader, StoragePlugin
from scipy.spatial.transform import Rotation

from stac_core.evaluation.datasets import bag as bag_reader
from stac_core.evaluation.datasets import open_sequence
from stac_core.evaluation.datasets.bag import BagOptions
from stac_core.evaluation.trajectory import Trajectory, write_tum

DATA = Path(os.environ.get("STAC_TEST_DATA", Path(__file__).resolve().parents[3] / "shared" / "data"))
IMAGE, INFO = "sensor_msgs/msg/Image", "sensor_msgs/msg/CameraInfo"
BODY_FROM_CAMERA = np.eye(4)
BODY_FROM_CAMERA[:3, :3] = Rotation.from_euler("xyz", [-90, 0, -90], degrees=True).as_matrix()
BODY_FROM_CAMERA[:3, 3] = [0.1, 0, 0.3]


def write_bag(
    path: Path, truth: str, plugin: StoragePlugin = StoragePlugin.MCAP, compressed: bool = False
) -> Path:
    """A recording with raw or compressed colour, depth, camera info and one kind of truth."""
    with BagWriter(path, plugin) as bag:
        for frame in tiny_frames(6):
            stamp, pose = frame.stamp_ns, frame.world_from_camera
            body = pose @ np.linalg.inv(BODY_FROM_CAMERA)
            if compressed:
                bag.write("/cam/image/compressed", "sensor_msgs/msg/CompressedImage",
                          compressed_message(frame.image, stamp), stamp + 1000)  # fmt: skip
            else:
                bag.write("/cam/image", IMAGE, image_message(frame.image, stamp, "rgb8"), stamp + 1000)
            millimetres = np.round(frame.depth_m * 1000).astype(np.uint16)
            bag.write("/cam/depth", IMAGE, image_message(millimetres, stamp + 900, "16UC1"), stamp + 2000)
            bag.write("/cam/camera_info", INFO, camera_info(frame), stamp)
            static = transform(BODY_FROM_CAMERA, "base_link", "camera_optical_frame", stamp)
            bag.write("/tf_static", "tf2_msgs/msg/TFMessage", tf(static), stamp)
            if truth == "tf":
                link = transform(body, "odom", "base_link", stamp)
                bag.write("/tf", "tf2_msgs/msg/TFMessage", tf(link), stamp)
            elif truth == "odometry":
                bag.write("/odom", "nav_msgs/msg/Odometry", odometry(body, stamp, "base_link"), stamp)
            elif truth == "pose":
                bag.write("/pose", "geometry_msgs/msg/PoseStamped", pose_stamped(pose, stamp), stamp)
    return path


@pytest.mark.parametrize("truth", ["tf", "odometry", "pose"])
@pytest.mark.parametrize("plugin", [StoragePlugin.MCAP, StoragePlugin.SQLITE3])
@pytest.mark.parametrize("compressed", [False, True])
def test_images_and_truth_come_back(tmp_path, truth, plugin, compressed):
    sequence = open_sequence(write_bag(tmp_path / "bag", truth, plugin, compressed))
    frames = tiny_frames(6)
    assert len(sequence) == 6
    for index in (0, 1, 5, 2):
        read, written = sequence.frame(index), frames[index]
        assert read.stamp_ns == written.stamp_ns
        np.testing.assert_array_equal(read.image, written.image)
        np.testing.assert_allclose(read.depth_m, written.depth_m, atol=5e-4)
        np.testing.assert_allclose(read.intrinsics, written.intrinsics)
        np.testing.assert_allclose(read.world_from_camera, written.world_from_camera, atol=1e-9)


def test_truth_may_be_a_tum_file_or_nothing(tmp_path):
    path, frames = write_bag(tmp_path / "bag", "none"), tiny_frames(6)
    assert bag_reader.read(path).frame(0).world_from_camera is None
    poses = np.array([frame.world_from_camera for frame in frames])
    write_tum(tmp_path / "truth.tum", Trajectory(np.array([f.stamp_ns for f in frames]), poses))
    sequence = bag_reader.read(path, BagOptions(truth=str(tmp_path / "truth.tum")))
    np.testing.assert_allclose(sequence.frame(3).world_from_camera, poses[3], atol=1e-12)
    with pytest.raises(ValueError, match="no topic '/nothing'"):
        bag_reader.read(path, BagOptions(truth="/nothing"))


def test_truth_of_another_clock_is_told(tmp_path, caplog):
    """Else it would seem that there is none."""
    write_tum(tmp_path / "path.tum", Trajectory(np.arange(3) * 10**9, np.tile(np.eye(4), (3, 1, 1))))
    truth = str(tmp_path / "path.tum")
    sequence = open_sequence(write_bag(tmp_path / "bag", ""), bag_options=BagOptions(truth=truth))
    assert sequence.frame(0).world_from_camera is None and sequence.frame(0).depth_m is not None
    assert "camera path: none of 3 stamps lies within 0.02 s of an image" in caplog.text
    assert "depth" not in caplog.text


def test_a_topic_that_is_no_path_is_no_truth(tmp_path):
    """Nor does another topic take its place."""
    bag = write_bag(tmp_path / "bag", "tf")
    with pytest.raises(ValueError, match=r"/cam/image .*sensor_msgs/msg/Image.* no camera path"):
        open_sequence(bag, bag_options=BagOptions(truth="/cam/image"))
    assert open_sequence(bag, bag_options=BagOptions(truth="/tf")).pose(0) is not None


@pytest.mark.parametrize("truth", ["odometry", "tf"])
def test_lost_poses_of_a_bag_are_absent(tmp_path, truth):
    """As NaN, or as a quaternion that nobody has set."""
    path = tmp_path / "bag"
    with BagWriter(path) as bag:
        for index, frame in enumerate(tiny_frames(5)):
            stamp, pose = frame.stamp_ns, frame.world_from_camera
            bag.write("/image", IMAGE, image_message(frame.image, stamp, "rgb8", "camera"), stamp)
            said = odometry(pose, stamp, "camera")
            link = transform(pose, "odom", "camera", stamp)
            place, turn = said.pose.pose.position, said.pose.pose.orientation
            if truth == "tf":
                place, turn = link.transform.translation, link.transform.rotation
            if index == 1:
                place.x = float("nan")
            if index == 4:
                turn.x = turn.y = turn.z = turn.w = 0.0
            if truth == "tf":
                bag.write("/tf", "tf2_msgs/msg/TFMessage", tf(link), stamp)
            else:
                bag.write("/odom", "nav_msgs/msg/Odometry", said, stamp)
    sequence = open_sequence(path)
    assert sequence.pose(4) is None and np.isfinite(sequence.pose(3)).all()
    assert len(sequence.truth) == (3 if truth == "odometry" else 4)  # transforms are interpolated


def test_moving_transforms_are_interpolated(tmp_path):
    frames = tiny_frames(3)
    with BagWriter(tmp_path / "bag") as bag:
        for index, stamp in enumerate([0, 100_000_000]):
            link = transform(frames[index].world_from_camera, "map", "camera_optical_frame", stamp)
            bag.write("/tf", "tf2_msgs/msg/TFMessage", tf(link), stamp)
        for stamp in (25_000_000, 300_000_000):
            bag.write("/image", IMAGE, image_message(frames[0].image, stamp, "rgb8"), stamp)
    sequence = open_sequence(tmp_path / "bag")
    expected = 0.75 * frames[0].world_from_camera[:3, 3] + 0.25 * frames[1].world_from_camera[:3, 3]
    np.testing.assert_allclose(sequence.frame(0).world_from_camera[:3, 3], expected, atol=1e-9)
    assert sequence.frame(1).world_from_camera is None  # after the last transform


@pytest.mark.parametrize("encoding", ["bgr8", "rgba8", "mono8"])
def test_common_encodings_become_rgb(tmp_path, encoding):
    image = tiny_frames(1)[0].image
    sent = {"bgr8": image[:, :, ::-1], "rgba8": np.dstack([image, image[:, :, 0]]), "mono8": image[:, :, 0]}
    with BagWriter(tmp_path / "bag") as bag:
        bag.write("/image", IMAGE, image_message(sent[encoding], 5, encoding), 5)
    expected = np.repeat(image[:, :, :1], 3, 2) if encoding == "mono8" else image
    np.testing.assert_array_equal(open_sequence(tmp_path / "bag").frame(0).image, expected)


@pytest.mark.parametrize("kind", ["talker_mcap", "talker_sqlite3"])
def test_a_bag_without_images_lists_what_it_has(kind):
    if not (DATA / "rosbag2_no_images" / kind).is_dir():
        pytest.skip(f"no sample recordings at {DATA}")
    with pytest.raises(ValueError, match=r"no image topic .*/topic \(std_msgs/msg/String\)"):
        open_sequence(DATA / "rosbag2_no_images" / kind)


def test_several_image_topics_are_listed_for_a_choice(tmp_path):
    frames = tiny_frames(2)
    with BagWriter(tmp_path / "bag") as bag:
        for side in ("left", "right"):
            bag.write(f"/{side}/image", IMAGE, image_message(frames[0].image, 5, "rgb8"), 5)
    with pytest.raises(ValueError, match="--topic: /left/image, /right/image"):
        open_sequence(tmp_path / "bag")
    assert len(bag_reader.read(tmp_path / "bag", BagOptions(topic="/right/image"))) == 1
    with pytest.raises(ValueError, match="no image topic '/up/image'"):
        bag_reader.read(tmp_path / "bag", BagOptions(topic="/up/image"))


def test_unknown_encodings_name_themselves(tmp_path):
    with BagWriter(tmp_path / "bag") as bag:
        bag.write("/image", IMAGE, image_message(np.zeros((4, 4), np.uint8), 5, "plasma7"), 5)
    with pytest.raises(ValueError, match="plasma7"):
        open_sequence(tmp_path / "bag").frame(0)


@pytest.mark.parametrize("keep", [0.0, 0.3, 0.9])
@pytest.mark.parametrize("plugin", [StoragePlugin.MCAP, StoragePlugin.SQLITE3])
def test_truncated_recordings_are_refused_with_the_cure(tmp_path, keep, plugin):
    path = write_bag(tmp_path / "bag", "tf", plugin)
    file = next(path.glob("bag.*"))
    file.write_bytes(file.read_bytes()[: int(file.stat().st_size * keep)])
    with pytest.raises(ValueError, match="mcap recover"):
        open_sequence(path)


def damaged(whole: Path, target: Path, topic: str, numbers: range) -> Path:
    """The same recording with messages of a topic cut short."""
    seen = -1
    with Reader(whole) as reader, BagWriter(target) as bag:
        for connection, stamp, raw in reader.messages():
            seen += connection.topic == topic
            cut = connection.topic == topic and seen in numbers
            bag.write_raw(connection.topic, connection.msgtype, raw[: 50 if cut else None], stamp)
    return target


@pytest.mark.parametrize("topic", ["/cam/image", "/cam/depth", "/cam/camera_info", "/pose", "/tf_static"])
def test_a_damaged_message_is_left_out_and_told(tmp_path, caplog, topic):
    whole = open_sequence(write_bag(tmp_path / "whole", "pose"))
    numbers = range(1) if topic == "/cam/camera_info" else range(2, 3)  # the first is all that is read
    sequence = open_sequence(damaged(tmp_path / "whole", tmp_path / "bag", topic, numbers))
    kept = [0, 1, 3, 4, 5] if topic == "/cam/image" else range(6)
    assert len(sequence) == len(kept)
    for index, number in enumerate(kept):
        frame, expected = sequence.frame(index), whole.frame(number)
        assert np.array_equal(frame.image, expected.image) and frame.stamp_ns == expected.stamp_ns
        assert (frame.depth_m is None) == (number == 2 and topic == "/cam/depth")
        assert (frame.world_from_camera is None) == (number == 2 and topic == "/pose")
        assert np.array_equal(frame.intrinsics, expected.intrinsics)
    assert f"{tmp_path}/bag: a message of {topic}, recorded at" in caplog.text


def test_a_bag_of_damaged_images_has_none(tmp_path):
    write_bag(tmp_path / "whole", "pose")
    with pytest.raises(ValueError, match=r"no image topic .*; it has .*/cam/image \(sensor_msgs/msg/Image\)"):
        open_sequence(damaged(tmp_path / "whole", tmp_path / "bag", "/cam/image", range(6)))


@pytest.mark.parametrize("plugin", [StoragePlugin.MCAP, StoragePlugin.SQLITE3])
def test_a_folder_is_read_whatever_its_name(tmp_path, plugin):
    """A name that ends in .bag is that of a ROS 1 recording, elsewhere."""
    sequence = open_sequence(write_bag(tmp_path / "walk.bag", "odom", plugin))
    assert len(sequence) == 6 and sequence.name == "walk"
    assert np.array_equal(sequence.frame(2).image, tiny_frames(6)[2].image)


def test_what_is_no_recording_is_told_apart_from_a_damaged_one(tmp_path):
    bag = write_bag(tmp_path / "bag", "tf")
    (bag / "metadata.yaml").unlink()
    with pytest.raises(
        ValueError, match=r"without metadata.yaml is no recording; 'ros2 bag reindex' .*bag.mcap"
    ):
        bag_reader.read(bag)
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match=r"without metadata.yaml is no recording; there is no .mcap or .db3"):
        bag_reader.read(tmp_path / "empty")
    (tmp_path / "old.bag").write_bytes(b"#ROSBAG V2.0\n")
    with pytest.raises(ValueError, match=r"no file of a rosbag2 .* rosbags-convert"):
        bag_reader.read(tmp_path / "old.bag")
