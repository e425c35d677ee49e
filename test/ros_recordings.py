"""Small recordings made on the spot: folders of images and rosbag2 files."""

from __future__ import annotations

from pathlib import Path

import cv2
import numpy as np
from rosbags.rosbag2 import StoragePlugin, Writer
from rosbags.typesys import Stores, get_types_from_msg, get_typestore

STORE = get_typestore(Stores.ROS2_KILTED)
NOTE = "unheard_of_msgs/msg/Note"  # a type that no installation has
STORE.register(get_types_from_msg("string data", NOTE))
PERIOD_NS = 50_000_000
BAG_START_NS = 1_700_000_000_000_000_000


def picture(index: int, height: int = 56, width: int = 84) -> np.ndarray:
    """RGB that differs from index to index, smooth enough to survive JPEG."""
    rows, columns = np.mgrid[0:height, 0:width]
    planes = [rows * 4 + index * 9, columns * 2 + index * 5, rows + columns + index * 3]
    return np.stack(planes, axis=-1).astype(np.uint8)


def write_images(folder: Path, count: int, **size: int) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for index in range(count):
        cv2.imwrite(str(folder / f"frame{index}.png"), picture(index, **size)[:, :, ::-1])
    return folder


def write_calibration(path: Path, height: int = 56, width: int = 84, **changes: object) -> Path:
    """A file laid out as camera_calibration does it; changes: by key, text that takes a value's place."""

    def matrix(rows: int, cols: int, data: str) -> str:
        return f"\n  rows: {rows}\n  cols: {cols}\n  data: [{data}]"

    values = {
        "image_width": width,
        "image_height": height,
        "camera_name": "narrow_stereo",
        "camera_matrix": matrix(3, 3, "80.5, 0.0, 42.25, 0.0, 81.5, 27.75, 0.0, 0.0, 1.0"),
        "distortion_model": "plumb_bob",
        "distortion_coefficients": matrix(1, 5, "-0.25, 0.07, 1e-3, -0.002, 0.0"),
        "rectification_matrix": matrix(3, 3, "1.0, 0.0, 0.0, 0.0, 1.0, 0.0, 0.0, 0.0, 1.0"),
        "projection_matrix": matrix(3, 4, "70.0, 0, 41, 0, 0, 71.0, 28, 0, 0, 0, 1, 0"),
    }
    path.write_text("".join(f"{key}: {value}\n" for key, value in (values | changes).items()))
    return path


def write_bag(
    path: Path,
    count: int,
    plugin: StoragePlugin = StoragePlugin.MCAP,
    image_topics: tuple[str, ...] = ("/camera/image_raw",),
    extra_types: tuple[str, ...] = (),
    stamped: bool = True,
    damaged: tuple[str, int] | None = None,
) -> Path:
    """A bag of images with camera_info, /tf and /tf_static, 20 frames per second.

    Images of a topic that ends in /compressed are JPEG. They have no stamp unless `stamped`.
    damaged: topic, and how much is left of its third message, in bytes.
    """
    types = STORE.types
    with Writer(path, version=9, storage_plugin=plugin) as writer:

        def connect(topic: str, kind: str):
            return writer.add_connection(topic, kind, typestore=STORE)

        kinds = ["CompressedImage" if topic.endswith("/compressed") else "Image" for topic in image_topics]
        images = [
            connect(topic, f"sensor_msgs/msg/{kind}") for topic, kind in zip(image_topics, kinds, strict=True)
        ]
        info = connect("/camera/camera_info", "sensor_msgs/msg/CameraInfo")
        tf = connect("/tf", "tf2_msgs/msg/TFMessage")
        tf_static = connect("/tf_static", "tf2_msgs/msg/TFMessage")
        others = [connect(f"/other{number}", kind) for number, kind in enumerate(extra_types)]

        def write(connection, stamp: int, message) -> None:
            whole, left = STORE.serialize_cdr(message, connection.msgtype), None
            if damaged and connection.topic == damaged[0] and stamp == BAG_START_NS + 2 * PERIOD_NS:
                left = damaged[1]
            writer.write(connection, stamp, whole[:left])

        def header(stamp: int, frame: str):
            time = types["builtin_interfaces/msg/Time"](stamp // 10**9, stamp % 10**9)
            return types["std_msgs/msg/Header"](time, frame)

        for index in range(count):
            stamp = BAG_START_NS + index * PERIOD_NS
            pixels = picture(index)
            height, width, _ = pixels.shape
            write(tf, stamp, _transform(types, header(stamp, "odom"), "base", float(index)))
            if index == 2:  # later than the first images, as latched topics often are
                write(tf_static, stamp, _transform(types, header(stamp, "base"), "camera", 1.0))
            jpeg = cv2.imencode(".jpg", pixels[:, :, ::-1])[1].ravel()
            contents = {
                "sensor_msgs/msg/Image": (height, width, "rgb8", 0, 3 * width, pixels.reshape(-1)),
                "sensor_msgs/msg/CompressedImage": ("jpeg", jpeg),
            }
            for connection in images:
                kind = connection.msgtype
                write(connection, stamp, types[kind](header(stamp * stamped, "camera"), *contents[kind]))
            write(info, stamp, _camera_info(types, header(stamp, "camera"), height, width))
            for connection in others:
                write(connection, stamp, types[connection.msgtype](f"message {index}"))
    return path


def _transform(types, header, child: str, x: float):
    vector = types["geometry_msgs/msg/Vector3"](x, 0.0, 0.0)
    quaternion = types["geometry_msgs/msg/Quaternion"](0.0, 0.0, 0.0, 1.0)
    transform = types["geometry_msgs/msg/Transform"](vector, quaternion)
    stamped = types["geometry_msgs/msg/TransformStamped"](header, child, transform)
    return types["tf2_msgs/msg/TFMessage"]([stamped])


def _camera_info(types, header, height: int, width: int):
    k = np.array([80.0, 0, width / 2, 0, 80.0, height / 2, 0, 0, 1])
    region = types["sensor_msgs/msg/RegionOfInterest"](0, 0, 0, 0, False)
    p = np.array([80.0, 0, width / 2, 0, 0, 80.0, height / 2, 0, 0, 0, 1, 0])
    return types["sensor_msgs/msg/CameraInfo"](
        header, height, width, "plumb_bob", np.zeros(5), k, np.eye(3).ravel(), p, 0, 0, region
    )
