"""What can be replayed becomes the messages that were recorded; what cannot is refused with reasons."""

from __future__ import annotations

import time

import cv2
import numpy as np
import pytest
from rclpy.serialization import deserialize_message
from ros_recordings import BAG_START_NS, NOTE, PERIOD_NS, picture, write_bag, write_calibration, write_images
from rosbags.rosbag2 import StoragePlugin
from sensor_msgs.msg import CameraInfo, CompressedImage, Image
from tf2_msgs.msg import TFMessage

from stac_ros.calibrated_source import CalibratedSource
from stac_ros.open_source import open_source
from stac_ros.restamp import header_stamp_ns, restamp
from stac_ros.sources import Item


def open_plain(name, topic="", more_topics=(), compressed=False, calibration=""):
    return open_source(str(name), topic, more_topics, compressed, "camera_optical_frame", str(calibration))


def pixels(message: Image) -> np.ndarray:
    return np.frombuffer(message.data, np.uint8).reshape(message.height, message.width, 3)


def test_a_folder_of_images_in_natural_order(tmp_path):
    source = open_plain(write_images(tmp_path, 12))
    items = list(source.items())
    assert source.types == {"image": Image}  # no calibration is known, so none is sent
    assert [item.due_ns for item in items] == sorted(item.due_ns for item in items)
    for index, item in enumerate(items):
        assert np.array_equal(pixels(item.payload), picture(index))
        assert item.payload.header.frame_id == "camera_optical_frame"
        assert header_stamp_ns(item.payload) == item.due_ns > 0, "0 would be no stamp at all"


def test_compressed_images_carry_the_same_picture(tmp_path):
    source = open_plain(write_images(tmp_path, 1), compressed=True)
    (item,) = source.items()
    assert source.image_topic == "image/compressed"
    assert isinstance(item.payload, CompressedImage)
    decoded = cv2.imdecode(np.frombuffer(item.payload.data, np.uint8), cv2.IMREAD_COLOR)[:, :, ::-1]
    assert np.abs(decoded.astype(int) - picture(0)).mean() < 4


def test_a_synthetic_world_comes_with_calibration():
    source = open_plain("world:5,frames=2,height=28,width=42")
    items = list(source.items())
    assert [item.topic for item in items] == ["camera_info", "image"] * 2
    info, image = items[0].payload, items[1].payload
    assert isinstance(info, CameraInfo) and (info.height, info.width) == (28, 42)
    assert info.k[2] == 21 and info.k[5] == 14 and info.k[0] > 0
    assert header_stamp_ns(info) == header_stamp_ns(image)


@pytest.mark.parametrize("plugin", [StoragePlugin.MCAP, StoragePlugin.SQLITE3])
def test_a_bag_under_the_nodes_names_static_transforms_first(tmp_path, plugin):
    source = open_plain(write_bag(tmp_path / "bag", 4, plugin))
    items = list(source.items())
    assert source.types == {
        "image": Image,
        "camera_info": CameraInfo,
        "/tf": TFMessage,
        "/tf_static": TFMessage,
    }
    assert items[0].topic == "/tf_static"
    images = [item for item in items if item.topic == "image"]
    assert [item.due_ns for item in images] == [BAG_START_NS + i * PERIOD_NS for i in range(4)]
    for index, item in enumerate(images):
        message = deserialize_message(item.payload, Image)
        assert np.array_equal(pixels(message), picture(index))
        assert header_stamp_ns(item.payload) == header_stamp_ns(message) == item.due_ns


def test_more_topics_and_types_that_are_not_installed(tmp_path, caplog):
    bag = write_bag(tmp_path / "bag", 2, extra_types=("std_msgs/msg/String", NOTE))
    source = open_plain(bag, more_topics=["/other0", "/other1"])
    assert f"/other1 is not replayed: its type {NOTE} is not installed" in caplog.text
    extras = [item.topic for item in source.items() if item.topic.startswith("/other")]
    assert extras == ["/other0"] * 2
    with pytest.raises(
        ValueError, match=r"no topic '/nothing'; it has /camera/camera_info, /camera/image_raw"
    ):
        open_plain(bag, more_topics=["/nothing"])


@pytest.mark.parametrize("plugin", [StoragePlugin.MCAP, StoragePlugin.SQLITE3])
@pytest.mark.parametrize("left", [0, 6, 60])
@pytest.mark.parametrize("topic", ["/camera/image_raw", "/camera/camera_info", "/tf"])
def test_a_damaged_message_is_left_out_and_told(tmp_path, plugin, left, topic, caplog):
    source = open_plain(write_bag(tmp_path / "bag", 5, plugin, damaged=(topic, left)))
    due = [item.due_ns for item in source.items() if source.recorded_name(item.topic) == topic]
    assert due == [BAG_START_NS + i * PERIOD_NS for i in (0, 1, 3, 4)]
    assert f"a message of {topic}, recorded at {BAG_START_NS + 2 * PERIOD_NS} ns, is damaged" in caplog.text


def write_film(path):
    writer = cv2.VideoWriter(str(path), cv2.VideoWriter.fourcc(*"MJPG"), 30, (84, 56))
    for index in range(3):
        writer.write(np.ascontiguousarray(picture(index)[:, :, ::-1]))
    writer.release()
    return path


def test_a_camera_is_stamped_with_the_wall_clock(tmp_path):
    """OpenCV opens a file as it opens a camera or a stream."""
    film = write_film(tmp_path / "film.avi")
    begin = time.time_ns()
    source = open_plain(f"camera:{film}")
    items = list(source.items())
    assert len(items) == 3 and source.types == {"image": Image}
    assert begin < items[0].due_ns < items[2].due_ns < time.time_ns()
    assert np.abs(pixels(items[2].payload).astype(int) - picture(2)).mean() < 12
    with pytest.raises(OSError, match=r"film.avi gives no image: it has stopped"):
        list(source.items())
    with pytest.raises(ValueError, match="camera:73: no such camera"):
        open_plain("camera:73")


def test_several_image_topics_need_a_choice(tmp_path):
    bag = write_bag(tmp_path / "bag", 2, image_topics=("/left/image_raw", "/right/image_raw"))
    with pytest.raises(ValueError, match=r"several image topics.*--topic: /left/image_raw, /right/image_raw"):
        open_plain(bag)
    assert open_plain(bag, topic="/right/image_raw").image_topic == "image"
    with pytest.raises(ValueError, match=r"no image topic '/up'; image topics: /left/image_raw"):
        open_plain(bag, topic="/up")


def test_a_bag_without_images_lists_what_it_has(tmp_path):
    bag = write_bag(tmp_path / "bag", 2, image_topics=())
    with pytest.raises(ValueError, match=r"no image topic.*it has /camera/camera_info \(sensor_msgs"):
        open_plain(bag)


def test_unreadable_recordings_are_refused_before_anything_plays(tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match=r"empty: no images, no video, no rosbag2"):
        open_plain(tmp_path / "empty")
    with pytest.raises(FileNotFoundError, match="no such file or folder"):
        open_plain(tmp_path / "missing")
    (tmp_path / "film.mp4").write_bytes(b"not a film" * 100)
    with pytest.raises(ValueError, match=r"film.mp4: cannot be decoded as a video"):
        open_plain(tmp_path / "film.mp4")
    with pytest.raises(ValueError, match="is not a rosbag2 recording and has no topics"):
        open_plain(write_images(tmp_path / "images", 1), topic="/camera")


@pytest.mark.parametrize("plugin", [StoragePlugin.MCAP, StoragePlugin.SQLITE3])
def test_damaged_bags_and_unknown_compression_are_refused(tmp_path, plugin):
    bag = write_bag(tmp_path / "bag", 3, plugin)
    (data,) = [file for file in bag.iterdir() if file.suffix in (".mcap", ".db3")]
    whole = data.read_bytes()
    data.write_bytes(whole[: len(whole) // 3])
    with pytest.raises(ValueError, match=r"cannot be read as a bag|breaks off"):
        list(open_plain(bag).items())
    data.write_bytes(whole)
    metadata = bag / "metadata.yaml"
    changed = metadata.read_text().replace("compression_mode: ''", "compression_mode: file")
    metadata.write_text(changed.replace("compression_format: ''", "compression_format: rar"))
    with pytest.raises(ValueError, match="rar"):
        list(open_plain(bag).items())


def test_restamping_reaches_messages_and_serialised_bytes(tmp_path):
    source = open_plain(write_bag(tmp_path / "bag", 3))
    for item in source.items():
        kind = source.types[item.topic]
        changed = restamp(item.payload, kind, lambda old: old + 3 * 10**9 + 7)
        message = changed if isinstance(changed, kind) else deserialize_message(changed, kind)
        original = deserialize_message(item.payload, kind)
        if kind is TFMessage:
            message, original = message.transforms[0], original.transforms[0]
        assert header_stamp_ns(message) == header_stamp_ns(original) + 3 * 10**9 + 7
        message.header.stamp = original.header.stamp
        assert message == original


@pytest.mark.parametrize("compressed", [False, True])
def test_an_image_that_shares_its_header_with_the_calibration_is_restamped_once(compressed):
    source = open_plain("world:5,frames=2,height=28,width=42", compressed=compressed)
    items = []
    for item in source.items():
        changed = restamp(item.payload, source.types[item.topic], lambda old: old + 1000 * 10**9)
        items.append((item.topic, header_stamp_ns(changed) - item.due_ns, changed.header.frame_id))
    later = [(topic, 1000 * 10**9, "camera_optical_frame") for topic in ("camera_info", source.image_topic)]
    assert items == later * 2


@pytest.mark.parametrize("kind", ["folder", "compressed", "film", "camera", "bag", "compressed bag", "world"])
def test_a_calibration_goes_with_every_image_in_place_of_any_other(tmp_path, kind, caplog):
    caplog.set_level("INFO")
    sources = {
        "folder": lambda: write_images(tmp_path / "images", 3),
        "film": lambda: write_film(tmp_path / "film.avi"),
        "bag": lambda: write_bag(
            tmp_path / "bag",
            3,
            image_topics=("/camera/compressed" if "comp" in kind else "/camera/image_raw",),
        ),
        "world": lambda: "world:5,frames=3,height=56,width=84",
        "camera": lambda: f"camera:{write_film(tmp_path / 'film.avi')}",
    }
    name = sources[{"compressed": "folder", "compressed bag": "bag"}.get(kind, kind)]()
    file = write_calibration(tmp_path / "ost.yaml")
    source = open_plain(name, compressed=kind == "compressed", calibration=file)
    assert source.types["camera_info"] is CameraInfo
    sent = [item for item in source.items() if item.topic in ("camera_info", source.image_topic)]
    assert [item.topic for item in sent] == ["camera_info", source.image_topic] * 3
    for info, image in zip(sent[::2], sent[1::2], strict=True):
        message, calibration = image.payload, info.payload
        if isinstance(message, bytes):
            message = deserialize_message(message, source.types[source.image_topic])
        assert calibration.header == message.header and info.due_ns == image.due_ns
        assert (calibration.height, calibration.width) == (56, 84)
        assert calibration.distortion_model == "plumb_bob"
        assert list(calibration.d) == [-0.25, 0.07, 0.001, -0.002, 0.0]
        assert list(calibration.k) == [80.5, 0, 42.25, 0, 81.5, 27.75, 0, 0, 1]
        assert list(calibration.r) == [1, 0, 0, 0, 1, 0, 0, 0, 1]
        assert list(calibration.p) == [70, 0, 41, 0, 0, 71, 28, 0, 0, 0, 1, 0]
    replaced = kind in ("bag", "compressed bag", "world")
    assert ("takes the place of the recorded one" in caplog.text) == replaced


@pytest.mark.parametrize("kind", ["folder", "compressed", "bag"])
def test_a_calibration_for_another_size_is_refused_before_anything_plays(tmp_path, kind):
    name = write_bag(tmp_path / "bag", 2) if kind == "bag" else write_images(tmp_path / "images", 2)
    file = write_calibration(tmp_path / "ost.yaml", 480, 640)
    with pytest.raises(ValueError, match=r"ost.yaml is for images of 640×480 pixels, and these are 84×56"):
        open_plain(name, compressed=kind == "compressed", calibration=file)


def test_a_camera_tells_its_size_by_its_first_image(tmp_path):
    film, file = write_film(tmp_path / "film.avi"), write_calibration(tmp_path / "ost.yaml", 480, 640)
    items = open_plain(f"camera:{film}", calibration=file).items()
    with pytest.raises(ValueError, match=r"is for images of 640×480 pixels, and these are 84×56"):
        next(items)


class BrokenFirst:
    """Two JPEGs, of which the first one breaks off and so has no size."""

    image_topic, types = "image/compressed", {"image/compressed": CompressedImage}

    def items(self):
        jpeg = cv2.imencode(".jpg", picture(0))[1].tobytes()
        for due_ns, data in enumerate((jpeg[:-20], jpeg)):
            yield Item(due_ns, self.image_topic, CompressedImage(format="jpeg", data=data))


@pytest.mark.parametrize("live", [False, True])
def test_an_image_that_cannot_be_decoded_ends_nothing(tmp_path, live):
    source = CalibratedSource(BrokenFirst(), write_calibration(tmp_path / "ost.yaml"), live)
    assert len(list(source.items())) == 4
    with pytest.raises(ValueError, match="is for images of 640×480 pixels, and these are 84×56"):
        list(CalibratedSource(BrokenFirst(), write_calibration(tmp_path / "b", 480, 640), live).items())
