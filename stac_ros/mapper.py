"""From image messages to the map: the node's work apart from topics, all on one thread."""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray
from sensor_msgs.msg import CompressedImage, Image
from std_msgs.msg import Header

from stac_core import ImageGeometry, Prediction, SessionStats, StreamSession
from stac_core.files import write_whole
from stac_core.ply import write_ply
from stac_ros.continuity import Change, Continuity, StrayImage
from stac_ros.images import ImageError, decode_colour, wastes_bits
from stac_ros.map import VoxelMap
from stac_ros.map_directory import explained, new_folder
from stac_ros.mapped_frame import MappedFrame, Points
from stac_ros.odometry import NoOdometry, OdometryLink
from stac_ros.parameters import Parameters
from stac_ros.rescaling import Rescaling
from stac_ros.run_statistics import Statistics
from stac_ros.scale import StreamScale
from stac_ros.settings import NAMELESS_CAMERA
from stac_ros.stamps import stamp_nanoseconds
from stac_ros.trajectory import Trajectory
from stac_ros.unscaled import UnscaledOdometry

# REP-103: a map has x forward, y left and z up, where the first camera has z, −x and −y.
MAP_FROM_OPTICAL = np.array([[0.0, 0, 1, 0], [-1, 0, 0, 0], [0, -1, 0, 0], [0, 0, 0, 1]])
_WASTED_BITS = (
    "images of 16 bits use their lowest 12 at most and come out nearly black: unless the scene is as dark, "
    "have the driver scale them to 16 bits, or send mono8"
)

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class _View:
    """A decoded image."""

    header: Header
    image: NDArray[np.uint8]  # RGB [height, width, 3]
    odom_from_camera: NDArray[np.float64] | None
    change: Change | None  # against the stream so far

    @property
    def stamp_ns(self) -> int:
        return stamp_nanoseconds(self.header.stamp)

    @property
    def size(self) -> tuple[int, int]:
        return _size(self.image)


class Output(Protocol):
    """Who is told what has been mapped."""

    def publish(self, frame: MappedFrame, points: Points) -> None:
        """The next image in order, and the points it adds."""

    def begin_stream(self, keep: bool) -> None:
        """What follows is a new stream; keep = so far published poses and points remain valid."""

    def rescale(self, rescaling: Rescaling) -> None:
        """What has been published of this stream has other lengths now."""


class Mapper:
    """One stream, its map and its trajectory. Not safe to share: only the worker's thread calls it.

    odometry: None where the robot has no odometry frame.
    """

    def __init__(
        self,
        session: StreamSession,
        parameters: Parameters,
        statistics: Statistics,
        output: Output,
        odometry: OdometryLink | None = None,
    ) -> None:
        self._session, self._parameters, self._statistics = session, parameters, statistics
        self._output, self._odometry = output, odometry
        self._unscaled = UnscaledOdometry()
        settings = parameters.ros.map
        self.map = VoxelMap(settings.voxel_size, settings.max_points)
        self.trajectory = Trajectory(settings.max_poses)
        self.scale = StreamScale(parameters)
        self.paused = False
        self.session_stats: SessionStats = session.stats()
        self._continuity = Continuity(parameters.ros.input)
        self._map_from_world: NDArray[np.float64] | None = None  # known from the first image on
        self._factor = 1.0  # lengths of the map per length of the network

    def process(self, messages: Sequence[Image | CompressedImage]) -> None:
        """Map up to a chunk of images in order of arrival; bad ones are counted and left out."""
        if self.paused:
            self._statistics.drop("paused", len(messages))
            return
        run: list[_View] = []  # what belongs to one stream is mapped together
        for message in messages:
            view = self._view(message)
            if view is None:
                continue
            if view.change is not None and view.change.ends_stream:
                self._statistics.event(view.change.event)
                self._map_run(run)
                self._restart(view.change.text)
                run = []
            elif view.change is not None:
                self._statistics.event(view.change.event, view.change.text)
            self._continuity.accept(view.size, view.stamp_ns, view.header.frame_id)
            run.append(view)
        self._map_run(run)

    def pause(self, paused: bool) -> str:
        self.paused = paused
        return "paused: images are ignored, the map stays" if paused else "running"

    def reset(self) -> str:
        """Forget stream, map and trajectory."""
        logger.info("reset on request: the next image begins a new stream and a new map")
        self._begin_stream(keep=False)
        return "stream, map and trajectory are empty; the next image begins a new stream"

    def save(self) -> str:
        """Write map.ply and trajectory.tum to a new folder; the two paths, on a line each.

        ValueError while there is nothing to save; OSError where the folder cannot be written.
        """
        if not len(self.trajectory):
            raise ValueError("nothing to save yet: no image has been mapped")
        directory = self._parameters.ros.map.directory
        folder = new_folder(directory)
        try:
            write_ply(folder / "map.ply", *self.map.points())
            write_whole(folder / "trajectory.tum", self.trajectory.tum())
        except OSError as error:
            raise explained(error, directory) from error
        logger.info("saved %d points and %d poses to %s", len(self.map), len(self.trajectory), folder)
        return f"{folder / 'map.ply'}\n{folder / 'trajectory.tum'}"

    def _begin_stream(self, keep: bool) -> None:
        self._session.reset()
        self.session_stats = self._session.stats()
        self.scale.begin_stream()
        self._continuity.forget()
        self._map_from_world = None
        self._factor = 1.0
        if not keep:
            self.map.clear()
            self.trajectory.clear()
        self._statistics.log_again()
        self._output.begin_stream(keep)

    def _restart(self, reason: str) -> None:
        """Begin a new stream by oneself; its map does not align with the old one."""
        keep = self._parameters.ros.map.keep_on_new_stream
        logger.warning("%s: a new stream begins, the map is %s", reason, "kept" if keep else "cleared")
        self._statistics.event("new streams")
        self._begin_stream(keep)

    def _view(self, message: Image | CompressedImage) -> _View | None:
        """The image decoded and placed; None, and counted, if it is not to be mapped."""
        try:
            header = self._header(message.header)
            image = decode_colour(message)
            self._check_size(image)
            if wastes_bits(message, image):
                self._statistics.event("wasted bits", _WASTED_BITS)
            stamp_ns, odom = stamp_nanoseconds(header.stamp), None
            change = self._continuity.judge(_size(image), stamp_ns, header.frame_id)
            if self._odometry is not None:
                odom = self._odometry.odom_from_camera(header.frame_id, stamp_ns)
                if self._parameters.ros.scale.mode == "none":
                    self._unscaled.see(odom)
        except ImageError as error:
            self._statistics.error(f"bad image ({error.cause})", str(error), 1)
            return None
        except StrayImage as stray:
            self._statistics.drop(stray.cause, 1, str(stray))
            return None
        except NoOdometry as error:
            self._statistics.error(error.cause, str(error), 1)
            return None
        return _View(header, image, odom, change)

    def _check_size(self, image: NDArray[np.uint8]) -> None:
        """ImageError if the network could see nothing of it; better now than after it has ended a stream."""
        try:
            self._session.check_image_size(*_size(image))
        except ValueError as error:
            raise ImageError("size", str(error)) from error

    def _header(self, header: Header) -> Header:
        """The image's own, but in the frame that the settings name. ImageError if it cannot be placed."""
        if not stamp_nanoseconds(header.stamp):
            raise ImageError(
                "stamp",
                "the image carries no stamp: have its driver set header.stamp; recordings without stamps "
                "play with stac-replay --use-wall-stamps",
            )
        frames = self._parameters.ros.frames
        frame = frames.camera or header.frame_id.lstrip("/") or NAMELESS_CAMERA  # tf2 refuses the slash
        if frame in (frames.map, frames.odom):
            own = "frames.map" if frame == frames.map else "frames.odom"
            raise ImageError(
                "frame",
                f"frame_id {header.frame_id!r} of the image is the {own} of this node: name the camera's "
                "optical frame in frames.camera",
            )
        return header if frame == header.frame_id else Header(stamp=header.stamp, frame_id=frame)

    def _map_run(self, views: list[_View]) -> None:
        if not views:
            return
        started = time.monotonic()
        try:
            prediction = self._session.step([view.image for view in views]).to_host()
        except Exception as error:  # of any kind; the session is as it was before
            self._statistics.error("inference", _with_cure(error), len(views), failing=True)
            return
        if not bool(prediction.world_from_camera.isfinite().all()):
            text = "the predicted pose is not finite: check the images, or use model.dtype float32"
            self._statistics.error("not finite", text, len(views), failing=True)
            self._restart("the stream's memory may be spoilt")
            return
        geometry = self._session.geometry
        assert geometry is not None  # a step has just succeeded
        for index, view in enumerate(views):
            self._map_frame(self._frame(view, prediction, index, geometry))
        self._statistics.step(len(views), time.monotonic() - started)
        self.session_stats = self._session.stats()

    def _map_frame(self, frame: MappedFrame) -> None:
        points = frame.points(self._parameters.ros.points)
        self.map.add(points.positions, points.colours, points.confidences)
        self.trajectory.add(stamp_nanoseconds(frame.header.stamp), frame.map_from_camera)
        self._output.publish(frame, points)

    def _frame(self, view: _View, prediction: Prediction, index: int, geometry: ImageGeometry) -> MappedFrame:
        world_from_camera = prediction.world_from_camera[index].double().numpy()
        self._set_factor(self.scale.next(world_from_camera, view.odom_from_camera))
        world_from_camera[:3, 3] *= self._factor
        if self._map_from_world is None:
            self._map_from_world, self._fixed_point = _place(world_from_camera, view.odom_from_camera)
        return MappedFrame(
            header=view.header,
            image=view.image,
            map_from_camera=self._map_from_world @ world_from_camera,
            odom_from_camera=view.odom_from_camera,
            depth=prediction.depth[index] * self._factor,
            confidence=prediction.depth_confidence[index],
            intrinsics=prediction.intrinsics[index],
            geometry=geometry,
        )

    def _set_factor(self, factor: float) -> None:
        """The lengths of this stream in the map; what has been mapped is rescaled once they change."""
        if self._map_from_world is not None and factor != self._factor:
            rescaling = Rescaling(factor / self._factor, self._fixed_point)
            self.map.rescale(rescaling)
            self.trajectory.rescale(rescaling)
            self._output.rescale(rescaling)
            self._map_from_world = self._map_from_world.copy()
            self._map_from_world[:3, 3] = rescaling.of(self._map_from_world[:3, 3])
        self._factor = factor


def _size(image: NDArray[np.uint8]) -> tuple[int, int]:
    """Height and width."""
    return image.shape[0], image.shape[1]


def _place(
    world_from_camera: NDArray[np.float64], odom_from_camera: NDArray[np.float64] | None
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """map_from_world of a stream by its first image: level as odometry is, else as the camera looks.

    Also the point of the map [3] that stays where it is under any scale of the stream.
    """
    if odom_from_camera is None:
        return MAP_FROM_OPTICAL, np.zeros(3)
    return odom_from_camera @ np.linalg.inv(world_from_camera), odom_from_camera[:3, 3]


def _with_cure(error: Exception) -> str:
    text = f"{type(error).__name__}: {error}"
    if "out of memory" in text.lower():
        text += "; lower image.size, cache.window_size or cache.chunk_size"
    return text
