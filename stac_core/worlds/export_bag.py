"""A world as a rosbag2 recording in MCAP: images, camera info, depth, TF and odometry.

Frames follow REP-105: `odom → base_link` moves as the truth says, `base_link →
camera_optical_frame` is static, and nothing above `odom` is claimed, so that a mapping node may
publish `map → odom` while the bag plays.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.spatial.transform import Rotation

from stac_core.geometry import quaternion_from_rotation
from stac_core.settings import check_settings, setting
from stac_core.worlds.recording import Camera, RecordedFrame, millimetres

# Columns: the camera's right, down and forward in base axes (x forward, y left, z up; REP-103).
BASE_FROM_CAMERA = np.array([[0.0, 0, 1], [-1, 0, 0], [0, -1, 0]])


OPTIONAL = ("depth_topic", "odom_topic")


@dataclass(frozen=True)
class BagSettings:
    """What a bag holds, and under which names."""

    image_topic: str = setting("/camera/image_raw", "images; compressed ones add /compressed")
    camera_info_topic: str = setting("/camera/camera_info", "intrinsics, one message per image")
    depth_topic: str = setting("/camera/depth/image_raw", "true depth (16UC1, mm); empty = none")
    odom_topic: str = setting("/odom", "true odometry; empty = none")
    odom_frame: str = setting("odom", "fixed frame of TF and odometry")
    base_frame: str = setting("base_link", "moving frame of TF and odometry")
    camera_frame: str = setting("camera_optical_frame", "frame of images and depth")
    bag_images: str = setting(
        "raw", "Image, CompressedImage (JPEG), or both", choices=("raw", "compressed", "both")
    )
    bag_quality: int = setting(90, "JPEG quality of compressed images", minimum=1, maximum=100)

    def __post_init__(self) -> None:
        check_settings(self)
        self._check_names("/tf", "/tf_static", names=[k for k in vars(self) if k.endswith("_topic")])
        self._check_names(names=[k for k in vars(self) if k.endswith("_frame")])

    def _check_names(self, *taken: str, names: list[str]) -> None:
        """ValueError where one is missing, or means two things."""
        known = dict.fromkeys(taken, "the transforms")
        for name in names:
            value = getattr(self, name)
            if value in known or not (value or name in OPTIONAL):
                why = f"is the name of {known[value]} already" if value else "is missing"
                raise ValueError(f"BagSettings.{name} = {value!r}: {why}; choose a name of its own")
            known |= {value: name} if value else {}


class BagWriter:
    """Writes frames one by one into a bag that is complete when the `with` block ends."""

    def __init__(self, path: Path, settings: BagSettings, camera: Camera) -> None:
        self._settings, self._camera = settings, camera
        self._previous: RecordedFrame | None = None
        self._open(path)

    def _open(self, path: Path) -> None:
        try:
            from rosbags.rosbag2 import StoragePlugin, Writer
            from rosbags.typesys import Stores, get_typestore
        except ImportError as error:
            raise RuntimeError("writing a bag needs the package rosbags: pip install rosbags") from error
        self._store = get_typestore(Stores.ROS2_KILTED)
        self._types = self._store.types
        self._writer = Writer(path, version=9, storage_plugin=StoragePlugin.MCAP)
        self._connections: dict[str, Any] = {}

    def __enter__(self) -> BagWriter:
        self._writer.open()
        return self

    def __exit__(self, kind: Any, error: Any, trace: Any) -> None:
        self._writer.close()

    def write(self, frame: RecordedFrame) -> None:
        """Write every message of one frame, all with the frame's stamp."""
        settings, stamp = self._settings, frame.stamp_ns
        if self._previous is None:
            self._send("/tf_static", stamp, self._static_transform(stamp))
        pose = frame.world_from_camera.copy()
        pose[:3, :3] = pose[:3, :3] @ BASE_FROM_CAMERA.T
        self._send("/tf", stamp, self._transform(stamp, settings.odom_frame, settings.base_frame, pose))
        if settings.odom_topic:
            self._send(settings.odom_topic, stamp, self._odometry(frame, pose))
        self._send(settings.camera_info_topic, stamp, self._camera_info(stamp))
        if settings.depth_topic:
            self._send(settings.depth_topic, stamp, self._image(stamp, millimetres(frame.depth), "16UC1"))
        if settings.bag_images in ("raw", "both"):
            self._send(settings.image_topic, stamp, self._image(stamp, frame.image, "rgb8"))
        if settings.bag_images in ("compressed", "both"):
            self._send(f"{settings.image_topic}/compressed", stamp, self._compressed(frame))
        self._previous = frame

    def _send(self, topic: str, stamp: int, message: Any) -> None:
        kind = message.__msgtype__
        if topic not in self._connections:
            self._connections[topic] = self._writer.add_connection(topic, kind, typestore=self._store)
        self._writer.write(self._connections[topic], stamp, self._store.serialize_cdr(message, kind))

    def _new(self, kind: str, **fields: Any) -> Any:
        return self._types[kind](**fields)

    def _header(self, stamp: int, frame: str) -> Any:
        time = self._new("builtin_interfaces/msg/Time", sec=stamp // 10**9, nanosec=stamp % 10**9)
        return self._new("std_msgs/msg/Header", stamp=time, frame_id=frame)

    def _image(self, stamp: int, pixels: NDArray, encoding: str) -> Any:
        height, width = pixels.shape[:2]
        little_endian = pixels.astype(pixels.dtype.newbyteorder("<"), copy=False)
        return self._new(
            "sensor_msgs/msg/Image",
            header=self._header(stamp, self._settings.camera_frame),
            height=height,
            width=width,
            encoding=encoding,
            is_bigendian=0,
            step=pixels.nbytes // height,
            data=np.frombuffer(little_endian.tobytes(), np.uint8),
        )

    def _compressed(self, frame: RecordedFrame) -> Any:
        return self._new(
            "sensor_msgs/msg/CompressedImage",
            header=self._header(frame.stamp_ns, self._settings.camera_frame),
            format="rgb8; jpeg compressed bgr8",  # as image_transport writes it
            data=frame.encode("jpg", self._settings.bag_quality),
        )

    def _camera_info(self, stamp: int) -> Any:
        camera = self._camera
        region = self._new(
            "sensor_msgs/msg/RegionOfInterest", x_offset=0, y_offset=0, height=0, width=0, do_rectify=False
        )
        return self._new(
            "sensor_msgs/msg/CameraInfo",
            header=self._header(stamp, self._settings.camera_frame),
            height=camera.height,
            width=camera.width,
            distortion_model="plumb_bob",
            d=np.zeros(5),
            k=camera.matrix.reshape(-1),
            r=np.eye(3).reshape(-1),
            p=np.hstack([camera.matrix, np.zeros((3, 1))]).reshape(-1),
            binning_x=0,
            binning_y=0,
            roi=region,
        )

    def _static_transform(self, stamp: int) -> Any:
        mount = np.eye(4)
        mount[:3, :3] = BASE_FROM_CAMERA
        return self._transform(stamp, self._settings.base_frame, self._settings.camera_frame, mount)

    def _transform(self, stamp: int, parent: str, child: str, pose: NDArray[np.float64]) -> Any:
        transform = self._new(
            "geometry_msgs/msg/Transform",
            translation=self._vector(pose[:3, 3]),
            rotation=self._quaternion(pose[:3, :3]),
        )
        link = self._new(
            "geometry_msgs/msg/TransformStamped",
            header=self._header(stamp, parent),
            child_frame_id=child,
            transform=transform,
        )
        return self._new("tf2_msgs/msg/TFMessage", transforms=[link])

    def _odometry(self, frame: RecordedFrame, pose: NDArray[np.float64]) -> Any:
        x, y, z = map(float, pose[:3, 3])
        place = self._new(
            "geometry_msgs/msg/Pose",
            position=self._new("geometry_msgs/msg/Point", x=x, y=y, z=z),
            orientation=self._quaternion(pose[:3, :3]),
        )
        linear, angular = _velocity(self._previous, frame)
        speed = self._new(
            "geometry_msgs/msg/Twist", linear=self._vector(linear), angular=self._vector(angular)
        )
        exact = np.zeros(36)
        return self._new(
            "nav_msgs/msg/Odometry",
            header=self._header(frame.stamp_ns, self._settings.odom_frame),
            child_frame_id=self._settings.base_frame,
            pose=self._new("geometry_msgs/msg/PoseWithCovariance", pose=place, covariance=exact),
            twist=self._new("geometry_msgs/msg/TwistWithCovariance", twist=speed, covariance=exact),
        )

    def _vector(self, values: NDArray[np.float64]) -> Any:
        x, y, z = map(float, values)
        return self._new("geometry_msgs/msg/Vector3", x=x, y=y, z=z)

    def _quaternion(self, rotation: NDArray[np.float64]) -> Any:
        x, y, z, w = quaternion_from_rotation(torch.from_numpy(np.ascontiguousarray(rotation))).tolist()
        return self._new("geometry_msgs/msg/Quaternion", x=x, y=y, z=z, w=w)


def _velocity(
    before: RecordedFrame | None, now: RecordedFrame
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Linear and angular velocity since the frame before, in the base's axes."""
    if before is None:
        return np.zeros(3), np.zeros(3)
    seconds = (now.stamp_ns - before.stamp_ns) / 1e9
    rotation = now.world_from_camera[:3, :3] @ BASE_FROM_CAMERA.T
    moved = rotation.T @ (now.world_from_camera[:3, 3] - before.world_from_camera[:3, 3])
    turned = before.world_from_camera[:3, :3].T @ now.world_from_camera[:3, :3]
    return moved / seconds, BASE_FROM_CAMERA @ Rotation.from_matrix(turned).as_rotvec() / seconds
