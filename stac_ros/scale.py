"""Metres per unit of a stream: its own unit of length depends on what its first image saw."""

from __future__ import annotations

import logging

import numpy as np
from numpy.typing import NDArray

from stac_core import Moves
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
        self,
        world_from_camera: NDArray[np.float64],
        odom_from_camera: NDArray[np.float64] | None,
        submap: int,
    ) -> float:
        """The factor from the next image on; its camera [4, 4] in the stream's unit and in metres."""
        mode = self._parameters.ros.scale.mode
        if mode == "odometry" and odom_from_camera is not None:
            return self._measured(world_from_camera, odom_from_camera, submap)
        return self._fixed if mode == "fixed" else 1.0

    @property
    def measured(self) -> bool:
        """Whether lengths are metres as measured along odometry."""
        return self._parameters.ros.scale.mode == "odometry" and self._odometry.factor is not None

    @property
    def metric(self) -> bool:
        """Whether lengths are metres by now."""
        return self.measured or self._parameters.ros.scale.mode == "fixed"

    @property
    def stretches(self) -> NDArray[np.float64]:
        """What odometry has told so far, for `resume`: factors and submaps [n, 2]."""
        return self._odometry.stretches

    def resume(self, stretches: NDArray[np.float64], factor: float) -> None:
        """Go on, in mode odometry, with what was measured of this stream; and the factor of its map."""
        if len(stretches):
            self._odometry.resume(stretches, factor)

    def jump(self) -> None:
        """The next camera is where it turned out to be: no motion leads there from the last one."""
        self._odometry.jump()

    def move(self, moves: Moves) -> None:
        """A loop is closed: parts of the stream have other lengths, in its own unit."""
        self._odometry.move(moves)

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
        self,
        world_from_camera: NDArray[np.float64],
        odom_from_camera: NDArray[np.float64],
        submap: int,
    ) -> float:
        before = self._odometry.factor
        if before is None or self._parameters.ros.map.grow:  # a map that stays as it is keeps its lengths
            self._odometry.add(odom_from_camera, world_from_camera, submap)
        if before is None:
            self._tell_of_patience()
        if self._odometry.factor != before:
            logger.info("scale: %s; what is mapped of this stream follows", self._odometry)
        return self._odometry.factor or 1.0

    def _tell_of_patience(self) -> None:
        """Once, where nothing has been found for long."""
        self._images += 1
        if self._images == PATIENCE and self._odometry.factor is None:
            logger.warning(
                "no scale after %d images (%s): lengths are in the stream's own unit until the camera "
                "travels; does %s lead to it by a transform that moves?",
                *(PATIENCE, self._odometry, self._parameters.ros.frames.odom),
            )
