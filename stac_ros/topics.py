"""The one table of what the node hears, says and offers; other parts of the package read it.

Names are relative or private (`~/`), so namespaces and remappings work and several robots can share
a network. Sources for the QoS: REP-2003 (sensors: sensor data; maps: reliable and latched).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from diagnostic_msgs.msg import DiagnosticArray
from geometry_msgs.msg import PoseWithCovarianceStamped
from nav_msgs.msg import OccupancyGrid, Odometry, Path
from rclpy.qos import DurabilityPolicy, QoSProfile, ReliabilityPolicy
from sensor_msgs.msg import CameraInfo, CompressedImage, Image, PointCloud2
from std_msgs.msg import Header
from std_srvs.srv import SetBool, Trigger
from tf2_msgs.msg import TFMessage

NODE_NAME = "stac_mapping"
RECORDER_NAME = "stac_record"

# What a user can choose for a subscription; "latched" is for what is sent once, also to late listeners.
INPUT_PROFILES = ("sensor_data", "reliable", "system_default")
INFO_PROFILES = (*INPUT_PROFILES, "latched")
_RELIABILITY = {
    "sensor_data": ReliabilityPolicy.BEST_EFFORT,
    "reliable": ReliabilityPolicy.RELIABLE,
    "system_default": ReliabilityPolicy.SYSTEM_DEFAULT,
    "latched": ReliabilityPolicy.RELIABLE,
}


def qos_profile(name: str, depth: int) -> QoSProfile:
    """A fresh QoSProfile: one of `INPUT_PROFILES`, or latched; keeping the last `depth` messages."""
    durability = DurabilityPolicy.TRANSIENT_LOCAL if name == "latched" else DurabilityPolicy.VOLATILE
    return QoSProfile(depth=depth, reliability=_RELIABILITY[name], durability=durability)


@dataclass(frozen=True)
class Topic:
    """One topic as the node names it."""

    name: str
    type: type[Any]
    profile: str  # as `qos_profile` knows it
    depth: int

    def qos(self) -> QoSProfile:
        return qos_profile(self.profile, self.depth)


@dataclass(frozen=True)
class Service:
    """One service as the node names it."""

    name: str
    type: type[Any]


def type_name(message: type[Any]) -> str:
    """A type of message as the ROS graph tells it, e.g. sensor_msgs/msg/Image."""
    return f"{message.__module__.partition('.')[0]}/msg/{message.__name__}"


IMAGE = Topic("image", Image, "sensor_data", 5)
COMPRESSED_IMAGE = Topic("image/compressed", CompressedImage, "sensor_data", 5)  # JPEG or PNG
CAMERA_INFO = Topic("camera_info", CameraInfo, "sensor_data", 5)
END_OF_INPUT = Topic("~/end_of_input", Header, "latched", 1)  # of a recording's last image: no other follows
INPUTS = (IMAGE, COMPRESSED_IMAGE, CAMERA_INFO, END_OF_INPUT)

POINTS = Topic("~/points", PointCloud2, "reliable", 5)  # what one image adds to the map: x, y, z, rgb
MAP_POINTS = Topic("~/map_points", PointCloud2, "latched", 1)  # the whole map, one point per voxel
GRID = Topic("~/map", OccupancyGrid, "latched", 1)  # for navigation, of a level map in metres
DEPTH = Topic("~/depth", Image, "reliable", 5)  # 32FC1, pixel by pixel of the image; NaN = invalid (REP-118)
DEPTH_INFO = Topic("~/camera_info", CameraInfo, "reliable", 5)  # beside the depth: where RViz looks for it
CONFIDENCE = Topic("~/confidence", Image, "reliable", 5)  # 32FC1, of that depth, from 1 up; NaN = invalid
POSE = Topic("~/pose", PoseWithCovarianceStamped, "reliable", 10)  # camera in map
ODOMETRY = Topic("~/odom", Odometry, "reliable", 10)  # the same pose, with the velocity between two images
PATH = Topic("~/path", Path, "latched", 1)  # bounded in length
PROGRESS = Topic("~/progress", Header, "reliable", 10)  # of the newest image done with, mapped or left out
TF = Topic("/tf", TFMessage, "reliable", 100)  # map → camera, or map → odom where an odometry frame is named
DIAGNOSTICS = Topic("/diagnostics", DiagnosticArray, "reliable", 10)  # once a second
OUTPUTS = (
    POINTS,
    MAP_POINTS,
    GRID,
    DEPTH,
    DEPTH_INFO,
    CONFIDENCE,
    POSE,
    ODOMETRY,
    PATH,
    PROGRESS,
    TF,
    DIAGNOSTICS,
)

RESET = Service("~/reset", Trigger)
PAUSE = Service("~/pause", SetBool)  # true: ignore images until false; the map stays
SAVE_MAP = Service("~/save_map", Trigger)  # the answer names the files
RELOCALIZE = Service("~/relocalize", Trigger)  # the camera was carried away: look for it in the map
SERVICES = (RESET, PAUSE, SAVE_MAP, RELOCALIZE)
