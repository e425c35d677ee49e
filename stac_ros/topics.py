"""The one table of what the node hears, says and offers; other parts of the package read it.

Names are relative or private (`~/`), so namespaces and remappings work and several robots can share
a network. Sources for the QoS: REP-2003 (sensors: sensor data; maps: reliable and latched).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from diagnostic_msgs.msg import DiagnosticArray
from geometry_msgs.msg import PoseWithCovarianceStamped
from nav_msgs.msg import Odometry, Path
from rclpy.qos import (
    DurabilityPolicy,
    QoSProfile,
    ReliabilityPolicy,
    qos_profile_sensor_data,
    qos_profile_system_default,
)
from sensor_msgs.msg import CameraInfo, CompressedImage, Image, PointCloud2
from std_srvs.srv import SetBool, Trigger
from tf2_msgs.msg import TFMessage

NODE_NAME = "stac_mapping"
RECORDER_NAME = "stac_record"

# What a user can choose for a subscription; "latched" is for maps, which late listeners need too.
INPUT_PROFILES = ("sensor_data", "reliable", "system_default")
PROFILES = (*INPUT_PROFILES, "latched")


def qos_profile(name: str, depth: int) -> QoSProfile:
    """A fresh QoSProfile: one of `PROFILES`, keeping the last `depth` messages."""
    if name == "sensor_data":
        reliability = qos_profile_sensor_data.reliability
    elif name == "system_default":
        reliability = qos_profile_system_default.reliability
    elif name in PROFILES:
        reliability = ReliabilityPolicy.RELIABLE
    else:
        raise ValueError(f"QoS profile {name!r} is unknown; choose one of {', '.join(PROFILES)}")
    durability = DurabilityPolicy.TRANSIENT_LOCAL if name == "latched" else DurabilityPolicy.VOLATILE
    return QoSProfile(depth=depth, reliability=reliability, durability=durability)


@dataclass(frozen=True)
class Topic:
    """One topic as the node names it."""

    name: str
    type: type[Any]
    profile: str  # of `PROFILES`
    depth: int
    help: str

    def qos(self) -> QoSProfile:
        return qos_profile(self.profile, self.depth)


@dataclass(frozen=True)
class Service:
    """One service as the node names it."""

    name: str
    type: type[Any]
    help: str


IMAGE = Topic("image", Image, "sensor_data", 5, "camera images, the input")
COMPRESSED_IMAGE = Topic(
    "image/compressed", CompressedImage, "sensor_data", 5, "JPEG or PNG images, the input where chosen"
)
CAMERA_INFO = Topic("camera_info", CameraInfo, "sensor_data", 5, "the camera's calibration, if there is one")
INPUTS = (IMAGE, COMPRESSED_IMAGE, CAMERA_INFO)

POINTS = Topic("~/points", PointCloud2, "reliable", 5, "what one image adds to the map: x, y, z, rgb")
MAP_POINTS = Topic(
    "~/map_points", PointCloud2, "latched", 1, "the whole map, one point per voxel: x, y, z, rgb"
)
DEPTH = Topic(
    "~/depth", Image, "reliable", 5, "32FC1 depth of one image, pixel by pixel; NaN = invalid (REP-118)"
)
DEPTH_INFO = Topic(
    "~/depth/camera_info", CameraInfo, "reliable", 5, "the camera of the depth image, same stamp"
)
CONFIDENCE = Topic(
    "~/confidence", Image, "reliable", 5, "32FC1 confidence of that depth, from 1 upwards; NaN = invalid"
)
POSE = Topic(
    "~/pose", PoseWithCovarianceStamped, "reliable", 10, "the camera in the map; covariance unknown (0)"
)
ODOMETRY = Topic("~/odom", Odometry, "reliable", 10, "the same pose, with the velocity between two images")
PATH = Topic("~/path", Path, "latched", 1, "the poses so far, bounded in length")
TF = Topic("/tf", TFMessage, "reliable", 100, "map → camera, or map → odom where an odometry frame is named")
DIAGNOSTICS = Topic(
    "/diagnostics", DiagnosticArray, "reliable", 10, "health of input, inference and map, once a second"
)
OUTPUTS = (POINTS, MAP_POINTS, DEPTH, DEPTH_INFO, CONFIDENCE, POSE, ODOMETRY, PATH, TF, DIAGNOSTICS)

RESET = Service("~/reset", Trigger, "forget the stream and the map; the next image begins a new one")
PAUSE = Service("~/pause", SetBool, "true: ignore images until false; the map stays")
SAVE_MAP = Service("~/save_map", Trigger, "write map and trajectory to files; the answer names them")
SERVICES = (RESET, PAUSE, SAVE_MAP)
