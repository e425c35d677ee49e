"""A tiny scene with exact truth, and bags written from frames; the samples the tests are made of."""

from pathlib import Path

import cv2
import numpy as np
from rosbags.rosbag2 import StoragePlugin, Writer
from rosbags.typesys import Stores, get_typestore
from scipy.spatial.transform import Rotation

from stac_core.evaluation.datasets import Frame

STORE = get_typestore(Stores.ROS2_KILTED)
PERIOD_NS = 100_000_000
START_NS = 1_700_000_000_000_000_000


def tiny_frames(count: int = 4, height: int = 12, width: int = 16) -> list[Frame]:
    """Frames of random pixels with poses on a curve and depth between 1 and 3 m."""
    random = np.random.default_rng(5)
    intrinsics = np.array([[20.0, 0, width / 2], [0, 21.0, height / 2], [0, 0, 1]])
    frames = []
    for index in range(count):
        pose = np.eye(4)
        pose[:3, :3] = Rotation.from_euler("yx", [5.0 * index, index], degrees=True).as_matrix()
        pose[:3, 3] = [0.1 * index, 0.02 * index**2, 0.3 * np.sin(index)]
        image = random.integers(0, 255, (height, width, 3), np.uint8)
        depth = random.integers(1000, 3000, (height, width)).astype(np.float32) / 1000
        depth[0, 0] = 0
        frames.append(Frame(image, START_NS + index * PERIOD_NS, pose, depth, intrinsics))
    return frames


def write_image(path: Path, image: np.ndarray) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    assert cv2.imwrite(str(path), image[:, :, ::-1])


def write_depth(path: Path, depth_m: np.ndarray, units_per_metre: float, invalid: int = 0) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    raw = np.round(depth_m * units_per_metre).astype(np.uint16)
    raw[depth_m == 0] = invalid
    assert cv2.imwrite(str(path), raw)


def write_text(path: Path, numbers: np.ndarray) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    np.savetxt(path, numbers, fmt="%.12g")


class BagWriter:
    """Messages by type name and keyword, into one bag."""

    def __init__(self, path: Path, plugin: StoragePlugin = StoragePlugin.MCAP) -> None:
        self._writer = Writer(path, version=9, storage_plugin=plugin)
        self._connections: dict[str, object] = {}

    def __enter__(self) -> "BagWriter":
        self._writer.open()
        return self

    def __exit__(self, *_: object) -> None:
        self._writer.close()

    def write(self, topic: str, kind: str, message: object, stamp_ns: int) -> None:
        self.write_raw(topic, kind, STORE.serialize_cdr(message, kind), stamp_ns)

    def write_raw(self, topic: str, kind: str, raw: bytes, stamp_ns: int) -> None:
        if topic not in self._connections:
            self._connections[topic] = self._writer.add_connection(topic, kind, typestore=STORE)
        self._writer.write(self._connections[topic], stamp_ns, raw)


def make(kind: str, *arguments: object) -> object:
    """One message; arguments in the order of the definition."""
    return STORE.types[kind](*arguments)


def header(stamp_ns: int, frame: str) -> object:
    time = make("builtin_interfaces/msg/Time", stamp_ns // 10**9, stamp_ns % 10**9)
    return make("std_msgs/msg/Header", time, frame)


def image_message(
    image: np.ndarray, stamp_ns: int, encoding: str, frame: str = "camera_optical_frame"
) -> object:
    height, width = image.shape[:2]
    data = np.ascontiguousarray(image).view(np.uint8).reshape(-1)
    step = data.size // height
    return make("sensor_msgs/msg/Image", header(stamp_ns, frame), height, width, encoding, 0, step, data)


def compressed_message(image: np.ndarray, stamp_ns: int, frame: str = "camera_optical_frame") -> object:
    data = cv2.imencode(".png", image[:, :, ::-1])[1].reshape(-1)
    return make("sensor_msgs/msg/CompressedImage", header(stamp_ns, frame), "png", data)


def camera_info(frame: Frame, frame_id: str = "camera_optical_frame") -> object:
    height, width = frame.image.shape[:2]
    k = frame.intrinsics.reshape(-1)
    p = np.hstack([frame.intrinsics, np.zeros((3, 1))]).reshape(-1)
    region = make("sensor_msgs/msg/RegionOfInterest", 0, 0, 0, 0, False)
    return make(
        "sensor_msgs/msg/CameraInfo", header(frame.stamp_ns, frame_id), height, width, "plumb_bob",
        np.zeros(5), k, np.eye(3).reshape(-1), p, 0, 0, region,
    )  # fmt: skip


def _vector_and_quaternion(pose: np.ndarray, vector: str) -> tuple[object, object]:
    turn = make("geometry_msgs/msg/Quaternion", *map(float, Rotation.from_matrix(pose[:3, :3]).as_quat()))
    return make(f"geometry_msgs/msg/{vector}", *map(float, pose[:3, 3])), turn


def transform(pose: np.ndarray, parent: str, child: str, stamp_ns: int) -> object:
    moved = make("geometry_msgs/msg/Transform", *_vector_and_quaternion(pose, "Vector3"))
    return make("geometry_msgs/msg/TransformStamped", header(stamp_ns, parent), child, moved)


def tf(*transforms: object) -> object:
    return make("tf2_msgs/msg/TFMessage", list(transforms))


def pose_stamped(pose: np.ndarray, stamp_ns: int, parent: str = "world") -> object:
    placed = make("geometry_msgs/msg/Pose", *_vector_and_quaternion(pose, "Point"))
    return make("geometry_msgs/msg/PoseStamped", header(stamp_ns, parent), placed)


def odometry(pose: np.ndarray, stamp_ns: int, child: str, parent: str = "odom") -> object:
    placed = make("geometry_msgs/msg/Pose", *_vector_and_quaternion(pose, "Point"))
    zero = make("geometry_msgs/msg/Vector3", 0.0, 0.0, 0.0)
    twist = make("geometry_msgs/msg/Twist", zero, zero)
    return make(
        "nav_msgs/msg/Odometry", header(stamp_ns, parent), child,
        make("geometry_msgs/msg/PoseWithCovariance", placed, np.zeros(36)),
        make("geometry_msgs/msg/TwistWithCovariance", twist, np.zeros(36)),
    )  # fmt: skip


def pose_with_covariance(pose: np.ndarray, stamp_ns: int, parent: str = "map") -> object:
    placed = make("geometry_msgs/msg/Pose", *_vector_and_quaternion(pose, "Point"))
    covered = make("geometry_msgs/msg/PoseWithCovariance", placed, np.zeros(36))
    return make("geometry_msgs/msg/PoseWithCovarianceStamped", header(stamp_ns, parent), covered)


def path(poses: dict[int, np.ndarray]) -> object:
    """Of poses by stamp."""
    stamped = [pose_stamped(pose, stamp_ns, "map") for stamp_ns, pose in poses.items()]
    return make("nav_msgs/msg/Path", header(max(poses), "map"), stamped)


def cloud_message(points: np.ndarray, colours: np.ndarray, stamp_ns: int, frame: str = "map") -> object:
    """x, y, z and packed rgb, with four bytes of padding as drivers like to have."""
    table = np.zeros(len(points), [("x", "<f4"), ("y", "<f4"), ("z", "<f4"), ("pad", "<f4"), ("rgb", "<u4")])
    table["x"], table["y"], table["z"] = points.T
    packed = colours.astype(np.uint32)
    table["rgb"] = packed[:, 0] << 16 | packed[:, 1] << 8 | packed[:, 2]
    fields = [make("sensor_msgs/msg/PointField", name, offset, 7, 1)
              for name, offset in (("x", 0), ("y", 4), ("z", 8), ("rgb", 16))]  # fmt: skip
    data = np.frombuffer(table.tobytes(), np.uint8)
    return make("sensor_msgs/msg/PointCloud2", header(stamp_ns, frame), 1, len(points), fields, False, 20,
                data.size, data, False)  # fmt: skip


def diagnostics(values: dict[str, str], stamp_ns: int, name: str = "stac_mapping: memory") -> object:
    pairs = [make("diagnostic_msgs/msg/KeyValue", key, value) for key, value in values.items()]
    status = make("diagnostic_msgs/msg/DiagnosticStatus", 0, name, "ok", "stac", pairs)
    return make("diagnostic_msgs/msg/DiagnosticArray", header(stamp_ns, ""), [status])
