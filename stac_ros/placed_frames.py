"""The frames that this node places: the camera in the map, or above it odometry (REP-105)."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from builtin_interfaces.msg import Time
from numpy.typing import NDArray
from rclpy.clock import Clock, ROSClock

from stac_ros.settings import FrameSettings
from stac_ros.stamps import stamp_nanoseconds
from stac_ros.transforms import TransformBroadcaster, stamped_transform

OTHER_CLOCK_S = 10.0  # an image this far from the node's clock was stamped by another one

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Placed:
    """One frame in another."""

    parent: str
    child: str
    parent_from_child: NDArray[np.float64]  # [4, 4]


class PlacedFrames:
    """Published with the stamp of every image and, below `frames.odom`, in between again for the present.

    The present is told by the node's clock. Where images are stamped by another one, as in a recording
    played without /clock, a transform of "now" would mix two times: there they go with images only.
    """

    def __init__(self, broadcaster: TransformBroadcaster, clock: Clock, settings: FrameSettings) -> None:
        self._broadcaster, self._clock, self._settings = broadcaster, clock, settings
        self._latest: tuple[Sequence[Placed], int] | None = None  # and the stamp of their image
        self._republished_ns = 0
        self._warned = False

    def publish(self, placed: Sequence[Placed], stamp: Time) -> None:
        """Of an image; belongs to the mapping thread, as `forget` does."""
        self._send(placed, stamp)
        follows = bool(self._settings.odom) and self._on_clock(stamp)
        self._latest = (placed, stamp_nanoseconds(stamp)) if follows else None

    def forget(self) -> None:
        """A new stream begins, whose map lies elsewhere."""
        self._latest = None

    def republish(self) -> None:
        """For the present, which odometry has reached but no image yet; any thread may call it."""
        latest, now = self._latest, self._clock.now()
        if latest is None:
            return
        placed, stamp_ns = latest
        if now.nanoseconds <= stamp_ns or now.nanoseconds == self._republished_ns:
            return  # simulated time stands still
        self._republished_ns = now.nanoseconds
        self._send(placed, now.to_msg())

    def _send(self, placed: Sequence[Placed], stamp: Time) -> None:
        for one in placed:
            message = stamped_transform(one.parent_from_child, one.parent, one.child, stamp)
            self._broadcaster.send(message)

    def _on_clock(self, stamp: Time) -> bool:
        """Whether the image was stamped by the clock of this node; says so once where it was not."""
        stamp_s, now_s = stamp_nanoseconds(stamp) / 1e9, self._clock.now().nanoseconds / 1e9
        if abs(now_s - stamp_s) <= OTHER_CLOCK_S:
            return True
        if not self._warned and self._settings.republish_period:
            self._warned = True
            simulated = isinstance(self._clock, ROSClock) and self._clock.ros_time_is_active
            cure = (
                "this node follows /clock: have it tell the time of the images, or set use_sim_time to false"
                if simulated
                else "play recordings with /clock and set use_sim_time to true"
            )
            frames = self._settings.map, self._settings.visual_odom, self._settings.odom
            logger.warning(
                "images are stamped %.3f s where this node's clock says %.3f s: %s is sent with each image "
                "only; %s",
                *(stamp_s, now_s, " → ".join(filter(None, frames)), cure),
            )
        return False
