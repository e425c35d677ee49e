"""The camera as the robot's odometry sees it, and the correction map → odom that follows (REP-105)."""

from __future__ import annotations

import time

import numpy as np
from numpy.typing import NDArray

from stac_ros.settings import FrameSettings
from stac_ros.transforms import TransformBuffer, TransformError

_POLL_S = 0.005


class OdometryLink:
    """Looks up odom → camera. Lookups wait, so they belong on the worker's thread, never on a callback's."""

    def __init__(self, buffer: TransformBuffer, settings: FrameSettings) -> None:
        self._buffer, self._settings = buffer, settings

    def odom_from_camera(self, camera: str, stamp_ns: int) -> NDArray[np.float64]:
        """[4, 4] at the stamp of an image. TransformError if it is not known within the time limit."""
        deadline = time.monotonic() + self._settings.transform_timeout
        while True:
            try:
                return self._buffer.lookup(self._settings.odom, camera, stamp_ns)
            except TransformError:
                if time.monotonic() >= deadline:
                    raise
            time.sleep(_POLL_S)
