"""Metres per unit of a stream: its own unit of length depends on what its first image saw."""

from __future__ import annotations

import logging

import numpy as np
from numpy.typing import NDArray

from stac_ros.odometry_scale import OdometryScale
from stac_ros.parameters import Parameters

PATIENCE = 100  # images without a result: time to say what is missing

logger = logging.getLogger(__name__)


class StreamScale:
    """The factor of the stream at hand, as `scale.mode` says; `str` tells it."""

    def __init__(self, parameters: Parameters) -> None:
        self._parameters = parameters
        self._begin()

    def begin_stream(self) -> None:
        """What comes next has another unit, of which nothing is known yet."""
        self._begin()
        if self._parameters.ros.scale.mode == "fixed":
            logger.warning(
                "scale.factor is still %g, but the unit of a new stream depends on its first image: set the "
                "factor anew, or use scale.mode odometry",
                self._fixed,
            )

    def next(
        self, world_from_camera: NDArray[np.float64], odom_from_camera: NDArray[np.float64] | None
    ) -> float:
        """The factor from the next image on; its camera [4, 4] in the stream's unit and in metres."""
        mode = self._parameters.ros.scale.mode
        if mode == "odometry" and odom_from_camera is not None:
            return self._measured(world_from_camera, odom_from_camera)
        return self._fixed if mode == "fixed" else 1.0

    @property
    def measured(self) -> bool:
        """Whether the factor has been, along odometry."""
        return self._odometry.factor is not None

    @property
    def metric(self) -> bool:
        """Whether lengths are metres by now."""
        return self.measured or self._parameters.ros.scale.mode == "fixed"

    def resume(self, factor: float) -> None:
        """What was measured of this stream before; in mode odometry it still holds."""
        self._odometry.factor = factor

    def jump(self) -> None:
        """The next camera is where it turned out to be: no motion leads there from the last one."""
        self._odometry.jump()

    def __str__(self) -> str:
        mode = self._parameters.ros.scale.mode
        if mode == "odometry":
            return str(self._odometry)
        if mode == "fixed":
            return f"fixed, {self._fixed:g} m per unit"
        return "none: lengths are in the stream's own unit"

    def _begin(self) -> None:
        settings = self._parameters.ros.scale
        self._odometry, self._images = OdometryScale(settings.baseline), 0
        self._factor_at_begin = settings.factor

    @property
    def _fixed(self) -> float:
        """`scale.factor`; a map of several streams cannot follow its changes, the next stream does."""
        ros = self._parameters.ros
        return self._factor_at_begin if ros.map.keep_on_new_stream else ros.scale.factor

    def _measured(
        self, world_from_camera: NDArray[np.float64], odom_from_camera: NDArray[np.float64]
    ) -> float:
        if self._odometry.factor is None:
            self._odometry.add(odom_from_camera, world_from_camera)
            self._images += 1
            if self._odometry.factor is not None:
                logger.info("scale: %s; what is mapped of this stream is in metres now", self._odometry)
            elif self._images == PATIENCE:
                logger.warning(
                    "no scale after %d images (%s): lengths are in the stream's own unit until the camera "
                    "travels; does %s lead to it by a transform that moves?",
                    *(PATIENCE, self._odometry, self._parameters.ros.frames.odom),
                )
        return self._odometry.factor or 1.0
