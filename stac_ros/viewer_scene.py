"""What the web viewer shows: map, camera, path and figures. No ROS in here."""

from __future__ import annotations

from typing import Any

import numpy as np
import viser
from numpy.typing import NDArray

from stac_ros.output_listener import LEVELS, Seen
from stac_ros.quaternions import quaternion_from_rotation

HOST = "127.0.0.1"  # nobody else: a map shows the inside of a home
_MOST_POINTS = 400_000  # what a browser draws fluently; beyond, evenly spread ones
_PATH_COLOUR, _CAMERA_COLOUR = (240, 80, 140), (60, 200, 100)
_CAMERA_SHARE = 0.06  # sizes as shares of the map's extent: its unit of length is unknown
_PATH_SHARE = 0.004
_SHOWN = (  # part of diagnostics, key
    ("inference", "weights"),
    ("inference", "device"),
    ("inference", "step mean [ms]"),
    ("input", "rate [Hz]"),
    ("input", "topic"),
    ("map", "points"),
    ("map", "scale"),
)


class Scene:
    """A web server with one scene; `show` sends only what has changed."""

    def __init__(self, port: int) -> None:
        self._server = viser.ViserServer(host=HOST, port=port, label="stac_ros", verbose=False)
        self._server.scene.set_up_direction("+z")
        self._server.gui.configure_theme(dark_mode=True, show_share_button=False)
        self._figures = self._server.gui.add_markdown("*waiting for the mapping node*")
        self._picture = self._server.gui.add_image(np.zeros((9, 16, 3), np.uint8), label="camera")
        self._point_size = self._server.gui.add_slider("point size", 0.5, 10.0, 0.5, 2.0)
        self._point_size.on_update(self._resize_points)
        self._cloud: viser.PointCloudHandle | None = None
        self._map_stamp_ns = -1
        self._poses: tuple[int, int, list[int]] | None = None  # shown: corrections, how many, the last stamp
        self._extent = 0.0  # of the map shown; 0 = none yet

    @property
    def address(self) -> str:
        return f"http://{HOST}:{self._server.get_port()}"

    def show(self, seen: Seen) -> None:
        if seen.map_stamp_ns != self._map_stamp_ns:
            self._map_stamp_ns = seen.map_stamp_ns
            self._show_map(seen)
        poses = seen.corrections, len(seen.stamps_ns), seen.stamps_ns[-1:]
        if poses != self._poses:
            self._poses = poses
            self._show_camera(seen)
            self._show_path(seen)
        self._figures.content = figures(seen)

    def close(self) -> None:
        self._server.stop()

    def _look_from_behind(self, positions: NDArray[np.float32]) -> None:
        """The first view: from behind and above the start, as the camera looked."""
        middle = np.median(positions, axis=0)
        position = middle + self._extent * np.array([-1.0, 0.35, 0.8])
        clients = self._server.get_clients().values()
        cameras: list[Any] = [self._server.initial_camera, *(client.camera for client in clients)]
        for camera in cameras:
            camera.position, camera.look_at = position, middle

    def _show_map(self, seen: Seen) -> None:
        count = len(seen.map_positions)
        kept = np.linspace(0, count - 1, min(count, _MOST_POINTS)).astype(np.int64)
        positions = seen.map_positions[kept]
        first = not self._extent and len(positions)
        self._extent = extent(positions)
        if first:
            self._look_from_behind(positions)
        self._cloud = self._server.scene.add_point_cloud(
            "/map",
            positions,
            seen.map_colours[kept],
            point_size=self._relative_point_size(),
            point_shape="rounded",
        )

    def _relative_point_size(self) -> float:
        return 1e-3 * self._point_size.value * self._extent

    def _resize_points(self, _: object) -> None:
        if self._cloud is not None:
            self._cloud.point_size = self._relative_point_size()

    def _show_camera(self, seen: Seen) -> None:
        if not seen.map_from_camera:
            self._server.scene.remove_by_name("/camera")
            return
        pose = seen.map_from_camera[-1]
        x, y, z, w = quaternion_from_rotation(pose[:3, :3])
        image = None if seen.view is None else seen.view.image
        fov, aspect = field_of_view(seen)
        self._server.scene.add_camera_frustum(
            "/camera",
            fov,
            aspect,
            scale=_CAMERA_SHARE * self._extent,
            thickness=_PATH_SHARE * self._extent,
            color=_CAMERA_COLOUR,
            image=image,
            wxyz=(w, x, y, z),
            position=pose[:3, 3],
        )
        if image is not None:
            self._picture.image = image

    def _show_path(self, seen: Seen) -> None:
        path = np.array([pose[:3, 3] for pose in seen.map_from_camera])
        if len(path) < 2:
            self._server.scene.remove_by_name("/path")
            return
        segments = np.stack([path[:-1], path[1:]], axis=1)
        width = _PATH_SHARE * self._extent
        self._server.scene.add_line_segments("/path", segments, _PATH_COLOUR, thickness=width)


def extent(positions: NDArray[np.float32]) -> float:
    """The largest side of the box that holds nearly all points; 1 without points."""
    if not len(positions):
        return 1.0
    low, high = np.percentile(positions, [2, 98], axis=0)
    return max(float((high - low).max()), 1e-6)


def field_of_view(seen: Seen) -> tuple[float, float]:
    """Vertical field of view in radians, and width ÷ height, of the camera."""
    if seen.view is None or seen.intrinsics is None:
        return np.radians(60.0), 4 / 3
    height, width, _ = seen.view.image.shape
    return float(2 * np.arctan2(height / 2, seen.intrinsics[1, 1])), width / height


def figures(seen: Seen) -> str:
    """Diagnostics as a table in Markdown."""
    rows = [f"| poses | {len(seen.stamps_ns)} |"]
    if seen.memory:
        rows.append(f"| cache | {seen.memory[-1].cache_bytes / 2**20:.1f} MiB |")
    rows += [f"| {key} | {told} |" for part, key in _SHOWN if (told := seen.told(part, key)) is not None]
    rows += [
        f"| **{part}** | **{LEVELS[health.level]}**: {health.message} |"
        for part, health in seen.health.items()
        if health.level
    ]
    return "\n".join(["| | |", "|---|---|", *rows])
