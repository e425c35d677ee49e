"""From image messages to predictions: one stream through the network."""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np
from numpy.typing import NDArray
from sensor_msgs.msg import CompressedImage, Image
from std_msgs.msg import Header

from stac_core import ImageGeometry, Prediction, SessionStats, StreamSession
from stac_ros.camera_info import CameraCalibration
from stac_ros.continuity import Change, Continuity, StrayImage
from stac_ros.images import ImageError, decode_colour, wastes_bits
from stac_ros.map_directory import explained, whole_or_gone
from stac_ros.odometry import NoOdometry, OdometryLink
from stac_ros.parameters import Parameters
from stac_ros.run_statistics import Statistics
from stac_ros.saved_map import STREAM
from stac_ros.settings import NAMELESS_CAMERA
from stac_ros.stamps import stamp_nanoseconds
from stac_ros.unscaled import UnscaledOdometry

_WASTED_BITS = (
    "images of 16 bits use their lowest 12 at most and come out nearly black: unless the scene is as dark, "
    "have the driver scale them to 16 bits, or send mono8"
)

_NOT_FOUND = (
    "the camera sees no place of the map that the network recognises: move it to where it has been, or call "
    "~/reset to begin a new map"
)

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class View:
    """A decoded image."""

    header: Header  # in the camera's optical frame
    image: NDArray[np.uint8]  # RGB [height, width, 3], rectified
    odom_from_camera: NDArray[np.float64] | None  # [4, 4]; None without an odometry frame


@dataclass(frozen=True)
class Predicted:
    """Images of one stream in a row, and what the network saw in them."""

    views: list[View]
    prediction: Prediction  # on the host, a frame for each view
    geometry: ImageGeometry


class Receiver(Protocol):
    """Who is told what the network saw, in order."""

    def add(self, predicted: Predicted) -> None:
        """The next images of the stream."""

    def begin_stream(self, keep: bool) -> None:
        """What follows is a new stream; keep = what was told so far remains valid."""

    def done_with(self, newest: Header) -> None:
        """Nothing more comes of this image and all before it; the next chunk begins when this returns."""


class Predictor:
    """One stream. Not safe to share: only the inference thread calls it.

    odometry: None where the robot has no odometry frame.
    calibration: of the camera; None where nothing is known of it.
    """

    def __init__(
        self,
        session: StreamSession,
        parameters: Parameters,
        statistics: Statistics,
        receiver: Receiver,
        odometry: OdometryLink | None = None,
        calibration: CameraCalibration | None = None,
    ) -> None:
        self._session, self._parameters, self._statistics = session, parameters, statistics
        self._receiver, self._odometry, self._calibration = receiver, odometry, calibration
        self.searching = False  # for the camera, among what the stream has seen
        self._unscaled = UnscaledOdometry()
        self._continuity = Continuity(parameters.ros.input)
        self._spoilt = False  # perhaps: the latest poses were no numbers
        self.paused = False
        self.session_stats: SessionStats = session.stats()

    def process(self, messages: Sequence[Image | CompressedImage]) -> None:
        """Predict up to a chunk of images in order of arrival; bad ones are counted and left out."""
        try:
            if self.paused:
                self._statistics.drop("paused", len(messages))
            else:
                self._predict(messages)
        finally:
            self._receiver.done_with(messages[-1].header)

    def save(self, folder: Path) -> None:
        """Write the stream, if it has begun. OSError where the folder cannot be written."""
        if self._session.stats().cache.frames_seen:
            with whole_or_gone(folder), explained(folder.parent):
                self._session.save(folder / STREAM)

    def load(self, folder: Path) -> None:
        """Go on with a saved stream once an image shows a place of it. ValueError where it cannot be read."""
        self._session.load(folder / STREAM)
        self.session_stats = self._session.stats()
        self.searching = True

    def relocalize(self) -> None:
        """Look for the camera from the next image on, anywhere. ValueError where nothing has been seen."""
        if not self._session.stats().cache.frames_seen:
            raise ValueError("there is no map yet to look for the camera in: no image has been mapped")
        logger.info("relocalize on request: the camera is looked for in the map")
        self.searching = True
        self._continuity.forget()

    def pause(self, paused: bool) -> None:
        """Whether images are to be ignored from now on."""
        logger.info("paused on request: images are ignored" if paused else "running on request")
        self.paused = paused

    def reset(self) -> None:
        """Forget stream, map and trajectory."""
        logger.info("reset on request: the next image begins a new stream and a new map")
        self._begin_stream(keep=False)

    def _predict(self, messages: Sequence[Image | CompressedImage]) -> None:
        run: list[View] = []  # what belongs to one stream goes through the network together
        for message in messages:
            seen = self._view(message)
            if seen is None:
                continue
            view, change = seen
            if change is not None and change.ends_stream:
                self._statistics.event(change.event)
                self._predict_run(run)
                self._restart(change.text)
                run = []
            elif change is not None:
                self._statistics.event(change.event, change.text)
            self._continuity.accept(*_traits(view.image, view.header))
            run.append(view)
        self._predict_run(run)

    def _predict_run(self, views: list[View]) -> None:
        if not views or (self.searching and not self._found(views)):
            return
        if not self._parameters.ros.map.grow:
            self._session.hold()  # the map stays as it is, and with it what the stream has seen
        started = time.monotonic()
        try:
            images = [view.image for view in views]
            prediction = self._session.step(images, self._intrinsics(images[0]), to_host=True)
        except Exception as error:  # of any kind; the session is as it was before
            self._statistics.error("inference", _with_cure(error), len(views), lost_by="network")
            return
        if not bool(prediction.world_from_camera.isfinite().all()):
            text = "the predicted pose is not finite: check the images, or use model.dtype float32"
            self._statistics.error("not finite", text, len(views), lost_by="network")
            if self._spoilt:  # a stream in submaps would have gone on in the next one
                self._restart("the stream's memory is spoilt")
            else:
                self._spoilt = True
            return
        self._spoilt = False
        self._statistics.predicted(time.monotonic() - started)
        self._note_memory()
        geometry = self._session.geometry
        assert geometry is not None  # a step has just succeeded
        self._receiver.add(Predicted(views, prediction, geometry))

    def _note_memory(self) -> None:
        """Diagnostics tell it on and on, the log once for each stream."""
        before, self.session_stats = self.session_stats, self._session.stats()
        if self.session_stats.cache.full and not before.cache.full:
            logger.warning(
                "what the stream remembers has come to its limit of %d bytes: from here on voxels become "
                "wider, or are forgotten; raise cache.memory_budget or cache.host_budget",
                self.session_stats.cache.byte_limit,
            )

    def _found(self, views: list[View]) -> bool:
        """Whether the images show where the camera is in what the stream has seen; it goes on there then."""
        images = [view.image for view in views]
        try:
            self.searching = not self._session.relocalize(images, self._intrinsics(images[0]))
        except Exception as error:  # of any kind; the session is as it was before
            self._statistics.error("inference", _with_cure(error), len(views), lost_by="network")
        else:
            self._statistics.works("network")
            if self.searching:
                self._statistics.drop("not found in the map", len(views), _NOT_FOUND)
            else:
                logger.info("the camera was found in the map, which goes on from here")
        if self.searching:
            self._continuity.forget()  # an image that was left out is no predecessor
        return not self.searching

    def _restart(self, reason: str) -> None:
        """Begin a new stream by oneself; its map does not align with the old one."""
        if self.searching:
            return  # the camera is looked for in this one, whatever the stamps say
        keep = self._parameters.ros.map.keep_on_new_stream
        logger.warning("%s: a new stream begins, the map is %s", reason, "kept" if keep else "cleared")
        self._statistics.event("new streams")
        self._begin_stream(keep)

    def _begin_stream(self, keep: bool) -> None:
        self.searching = self._spoilt = False
        self._session.reset()
        self.session_stats = self._session.stats()
        self._continuity.forget()
        self._statistics.log_again()
        self._receiver.begin_stream(keep)

    def _view(self, message: Image | CompressedImage) -> tuple[View, Change | None] | None:
        """The image decoded, rectified, placed, and what it changes; None, and counted, if it is left out."""
        try:
            header = self._header(message.header)
            image = decode_colour(message)
            self._check_size(image)
            if wastes_bits(message, image):
                self._statistics.event("wasted bits", _WASTED_BITS)
            if self._calibration is not None:
                image = self._calibration.rectified(image)
            change = self._continuity.judge(*_traits(image, header))
            odom = None
            if self._odometry is not None:
                odom = self._odometry.odom_from_camera(header.frame_id, stamp_nanoseconds(header.stamp))
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
        return View(header, image, odom), change

    def _intrinsics(self, image: NDArray[np.uint8]) -> NDArray[np.float64] | None:
        """[3, 3] as far as they are known and of use."""
        if self._calibration is None or not self._session.uses_intrinsics:
            return None
        return self._calibration.intrinsics(*image.shape[:2])

    def _check_size(self, image: NDArray[np.uint8]) -> None:
        """ImageError if the network could see nothing of it; better now than after it has ended a stream.

        StrayImage if the camera cannot be found by it, as a map is of images of one size.
        """
        height, width = image.shape[:2]
        try:
            self._session.check_image_size(height, width)
        except ValueError as error:
            raise ImageError("size", str(error)) from error
        geometry = self._session.geometry
        if self.searching and geometry is not None and geometry.camera_size != (height, width):
            own_height, own_width = geometry.camera_size
            raise StrayImage(
                "size",
                f"an image of {width}×{height} cannot be found in a map made of {own_width}×{own_height}: "
                "set the camera to that size, or call ~/reset to begin a new map",
            )

    def _header(self, header: Header) -> Header:
        """The image's own, but in the frame that the settings name. ImageError if it cannot be placed."""
        if stamp_nanoseconds(header.stamp) <= 0:  # nothing in ROS knows a time before
            raise ImageError(
                "stamp",
                "the image carries no stamp: have its driver set header.stamp; recordings without stamps "
                "play with stac-replay --use-wall-stamps",
            )
        frames = self._parameters.ros.frames
        frame = frames.camera or header.frame_id.lstrip("/") or NAMELESS_CAMERA  # tf2 refuses the slash
        if frame in (frames.map, frames.odom, frames.visual_odom):
            own = next(f"frames.{name}" for name, taken in vars(frames).items() if taken == frame)
            raise ImageError(
                "frame",
                f"frame_id {header.frame_id!r} of the image is the {own} of this node: name the camera's "
                "optical frame in frames.camera",
            )
        return header if frame == header.frame_id else Header(stamp=header.stamp, frame_id=frame)


def _traits(image: NDArray[np.uint8], header: Header) -> tuple[tuple[int, int], int, str]:
    """What continuity looks at: size, stamp and frame."""
    return (image.shape[0], image.shape[1]), stamp_nanoseconds(header.stamp), header.frame_id


def _with_cure(error: Exception) -> str:
    text = f"{type(error).__name__}: {error}"
    if "out of memory" in text.lower():
        text += "; lower image.size, cache.chunk_size or cache.memory_budget"
    return text
