"""The camera as the robot's odometry sees it."""

from __future__ import annotations

import logging
import time

import numpy as np
from numpy.typing import NDArray

from stac_ros.settings import FrameSettings
from stac_ros.transforms import StampError, TransformBuffer, TransformError

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


def _cure(error: TransformError) -> str:
    if not isinstance(error, StampError):
        return "Publish what leads there (odometry, the camera's mount), or leave frames.odom empty"
    if error.ahead_s >= 0:
        return (
            f"The image is ahead of odometry by {error.ahead_s:.3f} s: synchronise their clocks if they "
            "differ, raise frames.transform_timeout if odometry comes late, start it again if it has stopped"
        )
    return (
        f"The image is behind all known odometry by {-error.ahead_s:.3f} s: synchronise their clocks if they "
        "differ; what was taken before odometry began cannot be mapped"
    )
