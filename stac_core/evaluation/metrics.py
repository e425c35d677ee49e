"""Every measure of the evaluation by its one name; pure functions of arrays."""

from stac_core.evaluation.alignment import Similarity, align_points
from stac_core.evaluation.cloud_metrics import CloudErrors, cloud_errors, estimate_normals, voxel_downsample
from stac_core.evaluation.depth_metrics import depth_errors
from stac_core.evaluation.registration import register
from stac_core.evaluation.trajectory_metrics import absolute_errors, pose_errors, relative_errors

__all__ = [
    "CloudErrors",
    "Similarity",
    "absolute_errors",
    "align_points",
    "cloud_errors",
    "depth_errors",
    "estimate_normals",
    "pose_errors",
    "register",
    "relative_errors",
    "voxel_downsample",
]
