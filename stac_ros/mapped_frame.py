"""One image and what the network saw in it, in the units and frames of ROS; computed only where asked for."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from std_msgs.msg import Header
from torch import Tensor

from stac_core import ImageGeometry, most_confident, unproject_pixels
from stac_ros.covariances import Variance
from stac_ros.settings import PointSettings

NEAREST_DEPTH = 1e-8  # the network's own limit of a valid depth


@dataclass(frozen=True)
class Points:
    """Coloured points in the map."""

    positions: NDArray[np.float32]  # [N, 3]
    colours: NDArray[np.uint8]  # [N, 3] RGB
    confidences: NDArray[np.float32]  # [N]


@dataclass(frozen=True)
class MappedFrame:
    """One frame of a chunk; H×W are network pixels, height×width those of the camera image."""

    header: Header  # of the image, in the camera's optical frame
    image: NDArray[np.uint8]  # RGB [height, width, 3]
    map_from_camera: NDArray[np.float64]  # [4, 4]
    odom_from_camera: NDArray[np.float64] | None  # [4, 4]; None without an odometry frame
    depth: Tensor  # [H, W]
    confidence: Tensor  # [H, W]
    intrinsics: Tensor  # [3, 3] of the network pixels
    geometry: ImageGeometry
    submap: int  # of the stream, in which it was seen
    map_from_before: NDArray[np.float64] | None = None  # [4, 4] camera of the frame before, as it lies now
    pose_variance: Variance | None = None  # of `map_from_camera`; None = unknown
    step_variance: Variance | None = None  # of the motion from the frame before

    @property
    def last_from_camera(self) -> NDArray[np.float64] | None:
        """[4, 4] the motion from the frame before to this one; None = unknown."""
        if self.map_from_before is None:
            return None
        return np.linalg.inv(self.map_from_before) @ self.map_from_camera

    def camera_intrinsics(self) -> NDArray[np.float64]:
        """Intrinsics [3, 3] of the camera image that depth and pose belong to."""
        return self.geometry.camera_intrinsics(self.intrinsics.double()).numpy()

    def depth_image(self) -> NDArray[np.float32]:
        """Depth [height, width] pixel by pixel of the camera image; NaN = invalid (REP-118)."""
        depth = self.geometry.to_camera(self.depth).numpy()
        depth[~(np.isfinite(depth) & (depth > NEAREST_DEPTH))] = np.nan
        return depth

    def confidence_image(self) -> NDArray[np.float32]:
        """Confidence [height, width] of that depth; NaN where the network did not look."""
        confidence = self.geometry.to_camera(self.confidence).numpy()
        confidence[~(confidence > 0)] = np.nan
        return confidence

    def points(self, settings: PointSettings) -> Points:
        """The pixels that the settings let through, as points in the map."""
        chosen = self._chosen_pixels(settings)
        depth, intrinsics = self.depth.numpy(), self.intrinsics.numpy()
        in_map = unproject_pixels(depth, chosen, intrinsics, self.map_from_camera)
        rows, columns = np.divmod(chosen, depth.shape[1])
        image_rows, image_columns = self.geometry.camera_pixels
        seen_at = image_rows.take(rows) * self.image.shape[1] + image_columns.take(columns)
        colours = self.image.reshape(-1, 3).take(seen_at, axis=0)
        return Points(in_map, colours, self.confidence.numpy().ravel().take(chosen))

    def _chosen_pixels(self, settings: PointSettings) -> NDArray[np.int64]:
        """The network pixels [N] that become points, numbered row by row."""
        depth, confidence = self.depth.numpy(), self.confidence.numpy()
        valid = np.isfinite(depth) & (depth > NEAREST_DEPTH) & self.geometry.shown.numpy()
        valid &= confidence >= max(settings.confidence_minimum, NEAREST_DEPTH)  # false for NaN too
        if settings.depth_limit:
            valid &= depth <= settings.depth_limit
        chosen = np.flatnonzero(most_confident(valid, confidence, settings.confidence_percentile))
        if len(chosen) > settings.max_points:
            chosen = chosen[np.linspace(0, len(chosen) - 1, settings.max_points).astype(int)]
        return chosen
