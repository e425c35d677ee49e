"""The camera as the robot's odometry sees it, and the correction map → odom that follows (REP-105)."""

from __future__ import annotations

import logging
import time

import numpy as np
from builtin_interfaces.msg import Time
from numpy.typing import NDArray
from rclpy.clock import Clock

from stac_ros.settings import FrameSettings
from stac_ros.stamps import stamp_nanoseconds
from stac_ros.transforms import (
    StampError,
    TransformBroadcaster,
    TransformBuffer,
    TransformError,
    stamped_transform,
)

OTHER_CLOCK_S = 10.0  # an image this far from the node's clock was stamped by another one
_POLL_S = 0.005

logger = logging.getLogger(__name__)


class NoOdometry(LookupError):
    """Where the camera was is not known; `cause` is for statistics."""

    def __init__(self, error: TransformError) -> None:
        super().__init__(f"{error}. {_cure(error)}")
        self.cause = "no odometry (stamp)" if isinstance(error, StampError) else "no odometry"


class OdometryLink:
    """Looks up odom → camera. Lookups wait, so they belong on the inference thread, never on a callback's."""

    def __init__(self, buffer: TransformBuffer, settings: FrameSettings) -> None:
        self._buffer, self._settings = buffer, settings
        self._last_stamp_ns = 0

    def odom_from_camera(self, camera: str, stamp_ns: int) -> NDArray[np.float64]:
        """[4, 4] at the stamp of an image. NoOdometry if it is not known within the time limit.

        Where stamps go back, as in a recording that begins again, tf2's buffer would go on to refuse what
        is older than its memory of ten seconds: it has to forget first, and may then miss this one image.
        """
        deadline = time.monotonic() + self._settings.transform_timeout
        went_back, self._last_stamp_ns = stamp_ns < self._last_stamp_ns, stamp_ns
        while True:
            try:
                return self._buffer.lookup(self._settings.odom, camera, stamp_ns)
            except TransformError as error:
                if went_back:
                    self._buffer.clear()
                    went_back = False
                if time.monotonic() >= deadline:
                    raise NoOdometry(error) from error
            time.sleep(_POLL_S)


class MapToOdom:
    """map → odom, published with the stamp of every image and, in between, again for the present.

    The present is told by the node's clock. Where images are stamped by another one, as in a recording
    played without /clock, a transform of "now" would mix two times: there it is published with images only.
    """

    def __init__(self, broadcaster: TransformBroadcaster, clock: Clock, settings: FrameSettings) -> None:
        self._broadcaster, self._clock, self._settings = broadcaster, clock, settings
        self._latest: tuple[NDArray[np.float64], int] | None = None  # map_from_odom, stamp of its image
        self._republished_ns = 0
        self._warned = False

    def publish(self, map_from_odom: NDArray[np.float64], stamp: Time) -> None:
        """Of an image; belongs to the mapping thread, as `forget` does."""
        self._send(map_from_odom, stamp)
        self._latest = (map_from_odom, stamp_nanoseconds(stamp)) if self._on_clock(stamp) else None

    def forget(self) -> None:
        """A new stream begins, whose map lies elsewhere."""
        self._latest = None

    def republish(self) -> None:
        """For the present, which odometry has reached but no image yet; any thread may call it."""
        latest, now = self._latest, self._clock.now()
        if latest is None:
            return
        map_from_odom, stamp_ns = latest
        if now.nanoseconds <= stamp_ns or now.nanoseconds == self._republished_ns:
            return  # simulated time stands still
        self._republished_ns = now.nanoseconds
        self._send(map_from_odom, now.to_msg())

    def _send(self, map_from_odom: NDArray[np.float64], stamp: Time) -> None:
        message = stamped_transform(map_from_odom, self._settings.map, self._settings.odom, stamp)
        self._broadcaster.send(message)

    def _on_clock(self, stamp: Time) -> bool:
        """Whether the image was stamped by the clock of this node; says so once where it was not."""
        stamp_s, now_s = stamp_nanoseconds(stamp) / 1e9, self._clock.now().nanoseconds / 1e9
        if abs(now_s - stamp_s) <= OTHER_CLOCK_S:
            return True
        if not self._warned and self._settings.republish_period:
            self._warned = True
            logger.warning(
                "images are stamped %.3f s where this node's clock says %.3f s: %s → %s is sent with each "
                "image only; play recordings with /clock and set use_sim_time to true",
                stamp_s,
                now_s,
                self._settings.map,
                self._settings.odom,
            )
        return False


def _cure(error: TransformError) -> str:
    if not isinstance(error, StampError):
        return "Publish odometry, or leave frames.odom empty"
    if error.ahead_s >= 0:
        return (
            f"The image is ahead of odometry by {error.ahead_s:.3f} s: synchronise their clocks if they "
            "differ, raise frames.transform_timeout if odometry comes late, start it again if it has stopped"
        )
    return (
        f"The image is behind all known odometry by {-error.ahead_s:.3f} s: synchronise their clocks if they "
        "differ; what was taken before odometry began cannot be mapped"
    )
