"""From predictions to the map: what the network saw, placed in one frame and in one unit of length."""

from __future__ import annotations

import logging
import time
from pathlib import Path
from typing import Protocol

import numpy as np
from numpy.typing import NDArray
from std_msgs.msg import Header
from torch import Tensor

from stac_core import Moves
from stac_core.files import write_lines
from stac_core.ply import write_ply
from stac_ros import saved_map
from stac_ros.covariances import Variance
from stac_ros.grid import Grid
from stac_ros.grid_messages import write_grid
from stac_ros.map import VoxelMap
from stac_ros.map_directory import explained, whole_or_gone
from stac_ros.mapped_frame import MappedFrame, Points
from stac_ros.moving import rescaling
from stac_ros.parameters import Parameters
from stac_ros.predictor import Predicted
from stac_ros.run_statistics import Statistics
from stac_ros.saved_map import SavedMap
from stac_ros.scale import StreamScale
from stac_ros.stamps import stamp_nanoseconds
from stac_ros.trajectory import Trajectory

# REP-103: a map has x forward, y left and z up, where the first camera has z, −x and −y.
MAP_FROM_OPTICAL = np.array([[0.0, 0, 1, 0], [-1, 0, 0, 0], [0, -1, 0, 0], [0, 0, 0, 1]])

logger = logging.getLogger(__name__)


class Output(Protocol):
    """Who is told what has been mapped."""

    def publish(self, frame: MappedFrame, points: Points) -> None:
        """The next image in order, and the points it adds."""

    def begin_stream(self, keep: bool) -> None:
        """What follows is a new stream; keep = so far published poses and points remain valid."""

    def move(self, moves: Moves) -> None:
        """What has been published of this stream lies elsewhere in the map now, submap by submap."""

    def loaded(self) -> None:
        """The map holds points before the first image."""

    def done_with(self, newest: Header) -> None:
        """This image, and all before it, are mapped or left out."""


class Mapper:
    """The map and the trajectory, of one stream after the other. Not safe to share: see `MappingWorker`."""

    def __init__(self, parameters: Parameters, statistics: Statistics, output: Output) -> None:
        self._parameters, self._statistics, self._output = parameters, statistics, output
        settings = parameters.ros.map
        self.map = VoxelMap(settings.voxel_size, settings.max_points)
        self.grid = Grid(parameters.ros.grid)
        self.trajectory = Trajectory(settings.max_poses)
        self.scale = StreamScale(parameters)
        self._map_from_world: NDArray[np.float64] | None = None  # known from the first image on
        self._before: NDArray[np.float64] | None = None  # world_from_camera of the last frame, as it lies now
        self._factor = 1.0  # lengths of the map per length of the network
        self._level = False  # the map, as odometry is
        self.streams_ended = 0

    def add(self, predicted: Predicted) -> None:
        """Map and publish the next images of the stream."""
        started = time.monotonic()
        if predicted.prediction.moved is not None:
            self._close_loop(predicted.prediction.moved)
        if not predicted.prediction.continues:
            self.scale.jump()
            self._before = predicted.prediction.before
        for index in range(len(predicted.views)):
            self._add_frame(self._frame(predicted, index))
        self._statistics.mapped(len(predicted.views), time.monotonic() - started)

    def begin_stream(self, keep: bool) -> None:
        """What follows is a new stream; keep = map and trajectory stay."""
        self.streams_ended += 1
        self.scale.begin_stream()
        self._map_from_world = self._before = None
        self._factor = 1.0
        if keep:
            self.map.end_stream()
            self.grid.end_stream()
            self.trajectory.end_stream()
        else:
            self.map.clear()
            self.grid.clear()
            self.trajectory.clear()
        self._output.begin_stream(keep)

    def done_with(self, newest: Header) -> None:
        """This image, and all before it, are mapped or left out."""
        self._output.done_with(newest)

    def save(self, folder: Path) -> str:
        """Write points and trajectory, and what else the map needs to be gone on with; the first two paths.

        ValueError while there is nothing to save; OSError where the folder cannot be written.
        """
        with whole_or_gone(folder):
            if self.empty:
                raise ValueError("nothing to save yet: no image has been mapped")
            self.write(folder)
        logger.info("saved %d points and %d poses to %s", len(self.map), len(self.trajectory), folder)
        return f"{folder / saved_map.POINTS}\n{folder / saved_map.POSES}"

    @property
    def empty(self) -> bool:
        """Whether there is nothing to save."""
        return not len(self.trajectory) and not len(self.map)

    def write(self, folder: Path) -> None:
        """What `save` does, without a word. OSError where the folder cannot be written."""
        with explained(folder.parent):
            write_ply(folder / saved_map.POINTS, *self.map.points())
            write_lines(folder / saved_map.POSES, self.trajectory.tum())
            if not self.grid.empty:
                write_grid(folder, self.grid)
            if self._map_from_world is not None:
                self._saved(self._map_from_world).write(folder / saved_map.MAP)

    def load(self, folder: Path) -> None:
        """Go on with a saved map, before the first image. ValueError where it cannot be read."""
        saved = SavedMap.read(folder / saved_map.MAP)
        self.map.add(saved.positions, saved.colours, saved.confidences, saved.submaps)
        self._map_from_world, self._fixed_point = saved.map_from_world, saved.fixed_point
        self._factor, self._level = float(saved.factor), bool(saved.level)
        self._load_grid(saved)
        self.scale.resume(saved.stretches, self._factor)
        self._output.loaded()
        logger.info("loaded %d points from %s", len(self.map), folder)

    def _saved(self, map_from_world: NDArray[np.float64]) -> SavedMap:
        return SavedMap(
            *self.map.voxels(),
            *(map_from_world, self._fixed_point, np.array(self._factor), self.scale.stretches),
            np.array(self._level),
            np.array(self.grid.cell_size),
            *self.grid.known(),
        )

    def _load_grid(self, saved: SavedMap) -> None:
        """Only into cells of the same size: others would be torn open, or fill what was between walls."""
        if self._parameters.ros.has_grid and not self._level:
            logger.warning("there will be no grid: the saved map began without frames.odom, and is not level")
        if saved.cell_size == self.grid.cell_size:
            self.grid.put(saved.cell_places, saved.cell_evidence, saved.cell_submaps)
        elif len(saved.cell_places):
            logger.warning(
                "the grid begins anew: grid.cell_size is %g, but %g in the saved map",
                *(self.grid.cell_size, saved.cell_size),
            )

    def _add_frame(self, frame: MappedFrame) -> None:
        settings = self._parameters.ros
        points = frame.points(settings.points)
        if settings.map.grow:
            self.map.add(points.positions, points.colours, points.confidences, frame.submap)
            if settings.has_grid and self._level and self.scale.metric:
                self.grid.add(points.positions, frame.map_from_camera[:3, 3], frame.submap)
        self.trajectory.add(stamp_nanoseconds(frame.header.stamp), frame.map_from_camera, frame.submap)
        self._output.publish(frame, points)

    def _frame(self, predicted: Predicted, index: int) -> MappedFrame:
        view, prediction = predicted.views[index], predicted.prediction
        world_from_camera = prediction.world_from_camera[index].double().numpy()
        refined = self.scale.measured
        factor = self.scale.next(world_from_camera, view.odom_from_camera, prediction.submap)
        self._set_factor(factor, prediction.submap + 1, refined)
        if self._map_from_world is None:
            scaled = _scaled(world_from_camera, self._factor)
            self._map_from_world, self._fixed_point = _place(scaled, view.odom_from_camera)
            self._level = view.odom_from_camera is not None
        before, self._before = self._before, world_from_camera
        return MappedFrame(
            header=view.header,
            image=view.image,
            map_from_camera=self._map_from_world @ _scaled(world_from_camera, self._factor),
            map_from_before=None if before is None else self._map_from_world @ _scaled(before, self._factor),
            odom_from_camera=view.odom_from_camera,
            depth=prediction.depth[index] * self._factor,
            confidence=prediction.depth_confidence[index],
            intrinsics=prediction.intrinsics[index],
            geometry=predicted.geometry,
            submap=prediction.submap,
            pose_variance=self._in_map(prediction.pose_variance, index),
            step_variance=self._in_map(prediction.step_variance, index),
        )

    def _in_map(self, variances: Tensor | None, index: int) -> Variance | None:
        """One of the variances [S, 2] of turns and places, in lengths of the map."""
        if variances is None:
            return None
        return variances[index].double().numpy() * [1.0, self._factor**2]

    def _set_factor(self, factor: float, submaps: int, refined: bool) -> None:
        """The lengths of this stream in the map; what its submaps hold is rescaled once they change.

        refined: they were metres before and still are, better ones.
        """
        if self._map_from_world is not None and factor != self._factor:
            change = factor / self._factor
            if not refined or self._moves_floor(change):
                self.grid.clear()
            moves = rescaling(change, self._fixed_point, submaps)
            self._move(moves, other_lengths=not refined)
            self._map_from_world = self._map_from_world.copy()
            self._map_from_world[:3, 3] = moves.points(0, self._map_from_world[:3, 3])
        self._factor = factor

    def _moves_floor(self, change: float) -> bool:
        """Whether the floor comes to lie where it would be an obstacle, or lay there."""
        height = abs(self._fixed_point[2] - self.grid.floor)
        return abs(change - 1) * height > self._parameters.ros.grid.step

    def _close_loop(self, moves: Moves) -> None:
        """What is mapped goes where it truly lies; moves are in world, and nothing else in it changes."""
        self.scale.move(moves)
        if self._map_from_world is not None:
            rotation, translation = self._map_from_world[:3, :3], self._map_from_world[:3, 3]
            self._move(moves.seen_from(rotation, translation, self._factor))
            logger.info("a loop is closed: map and path move to where it shows that they lie")

    def _move(self, moves: Moves, other_lengths: bool = False) -> None:
        """Moves are in the map."""
        self.map.move(moves, other_lengths)
        self.grid.move(moves)
        self.trajectory.move(moves)
        self._output.move(moves)


def _scaled(pose: NDArray[np.float64], factor: float) -> NDArray[np.float64]:
    """The same in other lengths."""
    pose = pose.copy()
    pose[:3, 3] *= factor
    return pose


def _place(
    world_from_camera: NDArray[np.float64], odom_from_camera: NDArray[np.float64] | None
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """map_from_world of a stream by its first image: level as odometry is, else as the camera looks.

    Also the point of the map [3] that stays where it is under any scale of the stream.
    """
    if odom_from_camera is None:
        return MAP_FROM_OPTICAL, np.zeros(3)
    return odom_from_camera @ np.linalg.inv(world_from_camera), odom_from_camera[:3, 3]
