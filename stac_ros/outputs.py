"""What the node says: every mapped frame and the whole map as messages, each only if somebody listens."""

from __future__ import annotations

import logging
import time

import numpy as np
from builtin_interfaces.msg import Time
from geometry_msgs.msg import PoseStamped, PoseWithCovarianceStamped
from nav_msgs.msg import OccupancyGrid, Path
from numpy.typing import NDArray
from rclpy.duration import Duration
from rclpy.node import Node
from sensor_msgs.msg import PointCloud2
from std_msgs.msg import Header

from stac_core import Moves
from stac_ros import topics
from stac_ros.camera_info import CameraCalibration
from stac_ros.clouds import cloud_message
from stac_ros.frame_parents import OtherParents
from stac_ros.grid import Grid
from stac_ros.grid_messages import grid_message
from stac_ros.images import encode_image
from stac_ros.map import VoxelMap
from stac_ros.mapped_frame import MappedFrame, Points
from stac_ros.parameters import Parameters
from stac_ros.path_messages import PathMessages
from stac_ros.placed_frames import Placed, PlacedFrames
from stac_ros.pose_messages import (
    OdometryMessages,
    pose_message,
    pose_with_covariance,
)
from stac_ros.topics import Topic
from stac_ros.transforms import TransformBroadcaster
from stac_ros.visual_odometry import VisualOdometry

FLUSH_S = 3.5  # at shutdown: Fast DDS asks listeners what they have every 3 s, and sends again what they lack
NO_POINTS = np.empty((0, 3), np.float32), np.empty((0, 3), np.uint8)  # positions and colours

logger = logging.getLogger(__name__)


class Outputs:
    """Publishers of the node. All belong to the mapping thread, but what its timers call: `placed.republish`,
    `whole_is_due` and `warn_of_no_grid`.
    """

    def __init__(self, node: Node, parameters: Parameters, calibration: CameraCalibration) -> None:
        self._parameters, self._calibration = parameters, calibration
        self._frames = parameters.ros.frames
        self._publishers = {
            topic: node.create_publisher(topic.type, topic.name, topic.qos())
            for topic in topics.OUTPUTS
            if topic not in (topics.TF, topics.DIAGNOSTICS)
        }
        self._broadcaster = TransformBroadcaster(node)
        self._others = OtherParents(node, self._broadcaster, self._frames)
        self.placed = PlacedFrames(self._broadcaster, node.get_clock(), self._frames)
        self._odometry = OdometryMessages()
        self._visual_odometry = VisualOdometry()
        self._path = PathMessages(parameters.ros.publish.path_length)
        self._stamp = Time()  # of the latest image
        self._no_grid_told = self._grid_said = False
        self._unsent = {topics.MAP_POINTS: False, topics.PATH: False}
        if parameters.ros.has_grid:
            self._unsent[topics.GRID] = False

    def has_subscribers(self, topic: Topic) -> bool:
        """Whether somebody listens."""
        return self._publishers[topic].get_subscription_count() > 0

    def publish(self, frame: MappedFrame, points: Points) -> None:
        """One frame: transform, poses, points, depth and confidence, all with the image's own stamp."""
        self._stamp = frame.header.stamp
        changed = self._unsent if self._parameters.ros.map.grow else [topics.PATH]
        self._unsent |= dict.fromkeys(changed, True)
        odom_from_camera = self._visual_odometry.next(frame) if self._frames.visual_odom else None
        self._publish_transform(frame, odom_from_camera)
        self._publish_poses(frame, odom_from_camera)
        if self.has_subscribers(topics.POINTS):
            message = cloud_message(self._in_map(), points.positions, points.colours)
            self._publishers[topics.POINTS].publish(message)
        if self.has_subscribers(topics.DEPTH):
            message = encode_image(frame.depth_image(), "32FC1", frame.header)
            self._publishers[topics.DEPTH].publish(message)
        if self.has_subscribers(topics.DEPTH_INFO):
            height, width = frame.image.shape[:2]
            predicted = frame.camera_intrinsics()
            info = self._calibration.of_image(frame.header, height, width, predicted)
            self._publishers[topics.DEPTH_INFO].publish(info)
        if self.has_subscribers(topics.CONFIDENCE):
            message = encode_image(frame.confidence_image(), "32FC1", frame.header)
            self._publishers[topics.CONFIDENCE].publish(message)

    def done_with(self, newest: Header) -> None:
        """Say that this image, and all before it, are mapped or left out."""
        self._publishers[topics.PROGRESS].publish(newest)

    def begin_stream(self, keep: bool) -> None:
        """The next frame has no predecessor; without `keep` map and path are empty, and said so at once."""
        self._visual_odometry.forget()
        self.placed.forget()
        if keep:
            self._path.end_stream()
        else:
            self._path.clear()
            self._say(topics.MAP_POINTS, cloud_message(self._in_map(), *NO_POINTS))
            self._say(topics.PATH, Path(header=self._in_map()))
            if topics.GRID in self._unsent:
                self._say(topics.GRID, grid_message(self._in_map(), Grid(self._parameters.ros.grid)))
                self._grid_said = False

    def loaded(self) -> None:
        """The map holds points before the first frame, which are to be said."""
        self._unsent |= dict.fromkeys(self._unsent.keys() - {topics.PATH}, True)

    def move(self, moves: Moves) -> None:
        """Map and path lie elsewhere and are to be said anew."""
        self._path.move(moves)
        self._unsent = dict.fromkeys(self._unsent, True)

    def whole_is_due(self) -> bool:
        """Whether `publish_whole` would say anything."""
        return any(map(self._is_due, self._unsent))

    def publish_whole(self, voxel_map: VoxelMap, grid: Grid) -> None:
        """The whole map, grid and path, where they have changed and somebody listens.

        A map without a point is none, nor is a grid without a cell: an empty one tells that a stream has
        ended, see `begin_stream`, or that what was said of the grid holds no longer.
        """
        if len(voxel_map) and self._is_due(topics.MAP_POINTS):
            self._say(topics.MAP_POINTS, cloud_message(self._in_map(), *voxel_map.points()))
        if self._is_due(topics.PATH):
            self._say(topics.PATH, Path(header=self._in_map(), poses=self._path.messages()))
        if self._is_due(topics.GRID) and (self._grid_said or not grid.empty):
            self._say(topics.GRID, grid_message(self._in_map(), grid))
            self._grid_said = not grid.empty

    def warn_of_no_grid(self) -> None:
        """Once, where somebody waits for a grid that this node cannot have."""
        if self._parameters.ros.has_grid or self._no_grid_told or not self.has_subscribers(topics.GRID):
            return
        self._no_grid_told = True
        logger.info(
            "nothing is sent on %s, to which somebody listens: a grid needs a level map in metres; name the "
            "robot's odometry in frames.odom, and set scale.mode to odometry, or to fixed with scale.factor",
            self._publishers[topics.GRID].topic_name,
        )

    def flush(self) -> None:
        """Wait, not for long, until the listeners have all that was sent."""
        end = time.monotonic() + FLUSH_S
        for publisher in self._publishers.values():
            publisher.wait_for_all_acked(Duration(seconds=max(0.0, end - time.monotonic())))

    def _is_due(self, topic: Topic) -> bool:
        return self._unsent.get(topic, False) and self.has_subscribers(topic)

    def _say(self, topic: Topic, whole: PointCloud2 | Path | OccupancyGrid) -> None:
        self._publishers[topic].publish(whole)
        self._unsent[topic] = False

    def _publish_transform(self, frame: MappedFrame, odom_from_camera: NDArray[np.float64] | None) -> None:
        """odom_from_camera: in the frame of visual odometry, if there is one."""
        frames = self._frames
        if not frames.publish_tf:
            return
        child = frames.odom or frame.header.frame_id
        self._others.check(child)
        child_from_camera = np.eye(4) if frame.odom_from_camera is None else frame.odom_from_camera
        camera_from_child = np.linalg.inv(child_from_camera)
        placed = [Placed(frames.map, child, frame.map_from_camera @ camera_from_child)]
        if odom_from_camera is not None:
            map_from_odom = frame.map_from_camera @ np.linalg.inv(odom_from_camera)
            placed = [
                Placed(frames.map, frames.visual_odom, map_from_odom),
                Placed(frames.visual_odom, child, odom_from_camera @ camera_from_child),
            ]
        self.placed.publish(placed, self._stamp)

    def _publish_poses(self, frame: MappedFrame, odom_from_camera: NDArray[np.float64] | None) -> None:
        pose, header = pose_message(frame.map_from_camera), self._in_map()
        self._path.add(PoseStamped(header=header, pose=pose), frame.submap)
        covered = pose_with_covariance(pose, frame.pose_variance)
        if self.has_subscribers(topics.POSE):
            self._publishers[topics.POSE].publish(PoseWithCovarianceStamped(header=header, pose=covered))
        if odom_from_camera is not None:
            covered = pose_with_covariance(pose_message(odom_from_camera), self._visual_odometry.variance)
            header = Header(stamp=self._stamp, frame_id=self._frames.visual_odom)
        odometry = self._odometry.next(
            header, frame.header.frame_id, covered, frame.last_from_camera, frame.step_variance
        )
        if self.has_subscribers(topics.ODOMETRY):
            self._publishers[topics.ODOMETRY].publish(odometry)

    def _in_map(self) -> Header:
        """The header of everything placed in the map at the time of the latest image."""
        return Header(stamp=self._stamp, frame_id=self._frames.map)
