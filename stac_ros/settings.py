"""Every setting of the node's ROS side, its default and limits; names are ROS parameters and YAML keys alike.

The core's settings are in `stac_core.config`; a node has both. Lengths are in the stream's own unit unless
`scale` makes it metres.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from dataclasses import Field, dataclass, field, fields
from typing import Any

from stac_core.settings import check_settings, refuse, setting
from stac_ros.topics import CAMERA_INFO, IMAGE, INFO_PROFILES, INPUT_PROFILES

NAMELESS_CAMERA = "camera_optical_frame"  # where neither an image nor its user names the frame
LONGEST_S = 1e6  # of a timer or a wait: clocks count nanoseconds in 64 bits
LARGEST_CLOUD = 2_000_000  # points; 32 MB, the largest message of config/fastdds.xml
FARTHEST_CELL = 500  # from the camera: beyond, an image would take the grid too long


@dataclass(frozen=True)
class FrameSettings:
    """Names of frames, and how transforms travel (REP-103, REP-105)."""

    map: str = setting("map", "the fixed frame; x forward, y left, z up from the first image")
    odom: str = setting(
        "",
        "odometry frame of the robot; if named, map → odom is published instead of map → camera. Name it "
        "wherever the camera's frame already has a parent",
    )
    visual_odom: str = setting(
        "",
        "odometry frame of the camera itself, for robots without odometry: map → it → camera (or odom) is "
        "published, and in it no pose jumps where a loop is closed; empty = none",
    )
    camera: str = setting("", "optical frame of the camera; empty = the frame_id of the images")
    publish_tf: bool = setting(True, "publish transforms")
    transform_timeout: float = setting(
        0.2, "how long odom → camera is waited for", minimum=0.0, maximum=10.0, unit="s"
    )
    republish_period: float = setting(
        0.05,
        "map → odom is sent again this often, so that it does not expire; 0 = off",
        minimum=0.0,
        maximum=LONGEST_S,
        unit="s",
    )

    def __post_init__(self) -> None:
        check_settings(self)
        for name in ("map", "odom", "visual_odom", "camera"):
            if getattr(self, name).startswith("/"):
                raise refuse(self, name, "frames have no leading slash", getattr(self, name).lstrip("/"))
        if not self.map:
            raise refuse(self, "map", "the map needs a frame of its own", "map")
        for name in ("odom", "camera"):
            if getattr(self, name) == self.map:
                raise refuse(self, name, "the map needs a frame of its own", "")
        if self.camera and self.camera == self.odom:
            raise refuse(self, "camera", "the camera needs a frame of its own", "")
        if self.visual_odom and self.visual_odom in (self.map, self.odom, self.camera):
            raise refuse(self, "visual_odom", "visual odometry needs a frame of its own", "")


@dataclass(frozen=True)
class InputSettings:
    """What is subscribed to, and what happens when it goes wrong."""

    compressed: bool = setting(False, "subscribe to image/compressed instead of image")
    image_qos: str = setting(
        IMAGE.profile,
        "QoS of the images; sensor_data also hears reliable publishers",
        choices=INPUT_PROFILES,
    )
    camera_info_qos: str = setting(
        CAMERA_INFO.profile,
        "QoS of the camera's calibration; latched = one that is sent once, and kept for whoever comes later",
        choices=INFO_PROFILES,
    )
    rectify: bool = setting(
        False,
        "images are raw: take the distortion of the lens out of them, by their camera_info, before anything "
        "else; images whose camera_info has not come or does not fit are left out",
    )
    silence: float = setting(5.0, "a warning follows after this long without images", minimum=0.1, unit="s")
    time_jump: str = setting(
        "reset",
        "stamps going back by late_tolerance or more, as in a recording that loops: reset = begin a new "
        "stream, continue = only warn",
        choices=("reset", "continue"),
    )
    late_tolerance: float = setting(
        1.0,
        "an image stamped less than this before the one mapped last is late and left out; what lies further "
        "back is a time_jump. Keep it below the length of a recording that loops; 0 = nothing is late",
        minimum=0.0,
        unit="s",
    )

    def __post_init__(self) -> None:
        check_settings(self)


@dataclass(frozen=True)
class WorkerSettings:
    """The queue in front of the network."""

    mailbox_size: int = setting(
        4,
        "images that may wait, a chunk at least; the oldest leaves when a new one comes",
        minimum=1,
        maximum=10000,
    )
    chunk_wait: float = setting(
        0.0,
        "a chunk that is not full waits this long for its next image; 0 = not at all, the least delay. "
        "With a long wait the chunks of a recording depend on it alone",
        minimum=0.0,
        maximum=LONGEST_S,
        unit="s",
    )

    def __post_init__(self) -> None:
        check_settings(self)


@dataclass(frozen=True)
class PointSettings:
    """Which pixels become points."""

    confidence_percentile: float = setting(
        30.0, "the least confident share of every image is left out", minimum=0.0, maximum=100.0, unit="%"
    )
    confidence_minimum: float = setting(1.0, "so are pixels below this confidence, from 1 up", minimum=0.0)
    depth_limit: float = setting(0.0, "and pixels further away; 0 = no limit", minimum=0.0)
    max_points: int = setting(
        250_000,
        "points of one message at most, spread over the image",
        minimum=1,
        maximum=LARGEST_CLOUD,
    )

    def __post_init__(self) -> None:
        check_settings(self)


@dataclass(frozen=True)
class PublishSettings:
    """How often and how much."""

    map_period: float = setting(
        1.0, "the whole map is sent this often, if it has changed", minimum=0.05, maximum=LONGEST_S, unit="s"
    )
    path_length: int = setting(2000, "poses of ~/path at most; the oldest leave", minimum=1)

    def __post_init__(self) -> None:
        check_settings(self)


@dataclass(frozen=True)
class ScaleSettings:
    """From the stream's own unit of length to metres."""

    mode: str = setting(
        "none",
        "none = the stream's own unit, fixed = times factor, odometry = measured along frames.odom, by which "
        "the map becomes metric, and better and better; a stream has one factor: drift is not followed",
        choices=("none", "fixed", "odometry"),
    )
    factor: float = setting(
        1.0,
        "metres per unit of the stream, in mode fixed; a change rescales the map with the next image, or, "
        "with map.keep_on_new_stream, only the next stream",
        minimum=1e-6,
        maximum=1e6,
    )
    baseline: float = setting(
        0.5,
        "way of the camera along which mode odometry measures each time, in steps of at least a tenth",
        minimum=0.01,
        unit="m",
    )

    def __post_init__(self) -> None:
        check_settings(self)
        if self.mode != "fixed" and self.factor != 1.0:
            raise refuse(self, "mode", f"factor {self.factor} would do nothing", "fixed")


@dataclass(frozen=True)
class MapSettings:
    """The whole map: one point per voxel."""

    voxel_size: float = setting(0.01, "edge of a voxel", minimum=1e-6)
    max_points: int = setting(
        1_000_000,
        "voxels at most; beyond, the edge doubles and the map gets coarser",
        minimum=1000,
        maximum=LARGEST_CLOUD,
    )
    keep_on_new_stream: bool = setting(
        False, "keep the map when a new stream begins, though the two do not align"
    )
    grow: bool = setting(
        True, "false = the camera is only localised: nothing is added to the map, and nothing in it moves"
    )
    max_poses: int = setting(1_000_000, "poses of the saved trajectory at most; the oldest leave", minimum=1)
    directory: str = setting("~/.ros/stac_maps", "where ~/save_map and autosave write")
    autosave: float = setting(
        0.0,
        "what is new is saved this often and when the node stops, in place of the stream's autosave before; "
        "0 = never, else 1 or more",
        minimum=0.0,
        maximum=LONGEST_S,
        unit="s",
    )
    load: str = setting(
        "",
        "folder that ~/save_map or autosave wrote: its map is gone on with, from where the camera is found "
        "in it; images before that are left out; empty = a new map",
    )

    def __post_init__(self) -> None:
        check_settings(self)
        if not self.directory:
            raise refuse(self, "directory", "maps need a folder", MapSettings.directory)
        if 0 < self.autosave < 1:
            raise refuse(self, "autosave", "the node would do little else", 1.0)


@dataclass(frozen=True)
class GridSettings:
    """The occupancy grid for navigation, which only a level map in metres has: frames.odom and scale.mode."""

    cell_size: float = setting(0.05, "edge of a cell", minimum=1e-3, maximum=10.0, unit="m")
    floor: float = setting(0.0, "height of the floor in the map, 0 = that of frames.odom", unit="m")
    step: float = setting(
        0.1,
        "what is no further than this from the floor is floor: the robot drives over it",
        minimum=0.0,
        unit="m",
    )
    height: float = setting(
        1.5, "what is higher above the floor is no obstacle: the robot drives under it", minimum=0.0, unit="m"
    )
    range: float = setting(
        5.0, "what is further from the camera is not believed", minimum=0.1, maximum=100.0, unit="m"
    )

    def __post_init__(self) -> None:
        check_settings(self)
        if self.height <= self.step:
            why = f"nothing is an obstacle unless above step = {self.step}"
            raise refuse(self, "height", why, self.step + 0.1)
        if self.cell_size < self.range / FARTHEST_CELL:
            why = f"{FARTHEST_CELL} cells are the farthest that fit range = {self.range}"
            raise refuse(self, "cell_size", why, self.range / FARTHEST_CELL)


@dataclass(frozen=True)
class RosConfig:
    """All sections of the ROS side."""

    frames: FrameSettings = field(default_factory=FrameSettings)
    input: InputSettings = field(default_factory=InputSettings)
    worker: WorkerSettings = field(default_factory=WorkerSettings)
    points: PointSettings = field(default_factory=PointSettings)
    publish: PublishSettings = field(default_factory=PublishSettings)
    scale: ScaleSettings = field(default_factory=ScaleSettings)
    map: MapSettings = field(default_factory=MapSettings)
    grid: GridSettings = field(default_factory=GridSettings)

    def __post_init__(self) -> None:
        if self.scale.mode == "odometry" and not self.frames.odom:
            raise refuse(self.scale, "mode", "frames.odom must name the odometry frame of the robot", "none")
        if self.scale.mode == "odometry" and self.map.keep_on_new_stream:
            why = "scale.mode odometry rescales a map, which must not hold earlier streams"
            raise refuse(self.map, "keep_on_new_stream", why, False)

    @property
    def has_grid(self) -> bool:
        """Whether the map is level and, once its scale is known, in metres, as a grid must be."""
        return bool(self.frames.odom) and self.scale.mode != "none"


# Sections and settings that take effect while the node runs; all others are read once, at start.
LIVE = ("points", "map.directory", "map.grow", "scale.factor")


def settings_of(*configs: type[Any]) -> dict[str, Field[Any]]:
    """Every setting of the configurations by its dotted name, which is that of its ROS parameter."""
    return {
        f"{section.name}.{setting.name}": setting
        for config in configs
        for section in fields(config)
        for setting in fields(class_of(section))
    }


def class_of(section: Field[Any]) -> type[Any]:
    """Of a section of `Config` or `RosConfig`."""
    return section.default_factory  # type: ignore[return-value]


def unknown(name: str, known: Iterable[str]) -> str:
    """A name that nobody knows, and the one that may have been meant."""
    near = difflib.get_close_matches(name, known, 1)
    return f"{name!r}" + (f" (did you mean {near[0]!r}?)" if near else "")


def is_live(name: str) -> bool:
    """Whether the setting `section.field` takes effect while the node runs."""
    return name in LIVE or name.split(".")[0] in LIVE
