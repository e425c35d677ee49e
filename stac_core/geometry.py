"""Poses, cameras and points; pure functions on tensors with any leading axes.

Cameras are OpenCV optical frames: x right, y down, z forward. Integer pixel coordinates, no half-pixel
shift. Source: pose encoding "absT_quaR_FoV" of VGGT (arXiv 2503.11651).
"""

from __future__ import annotations

import functools
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from stac_core.intrinsics import NARROWEST_VIEW, WIDEST_VIEW

VALID_DEPTH = 1e-8  # depth counts above this


def decode_pose(pose_encoding: Tensor, height: int, width: int) -> tuple[Tensor, Tensor]:
    """Pose encoding [..., 9] of H×W pixels → world_from_camera [..., 4, 4], intrinsics [..., 3, 3].

    The encoding holds camera_from_world: translation, quaternion xyzw of any length, then the vertical and
    the horizontal field of view in radians, kept within limits that give a finite, positive focal length.
    """
    rotation = rotation_from_quaternion(pose_encoding[..., 3:7])
    world_from_camera = invert_pose(pose_matrix(rotation, pose_encoding[..., :3]))
    half = pose_encoding[..., 7:9].clamp(NARROWEST_VIEW, WIDEST_VIEW) / 2
    half_size = _half_size(half, height, width)
    return world_from_camera, intrinsic_matrix((half_size / half.tan()).flip(-1), half_size.flip(-1))


def encode_pose(world_from_camera: Tensor, intrinsics: Tensor, height: int, width: int) -> Tensor:
    """The inverse of `decode_pose`: [..., 4, 4] and [..., 3, 3] → [..., 9], unit quaternion, scalar ≥ 0."""
    camera_from_world = invert_pose(world_from_camera)
    quaternion = quaternion_from_rotation(camera_from_world[..., :3, :3])
    focal = torch.stack([intrinsics[..., 1, 1], intrinsics[..., 0, 0]], dim=-1)
    fields_of_view = 2 * torch.atan(_half_size(focal, height, width) / focal)
    return torch.cat([camera_from_world[..., :3, 3], quaternion, fields_of_view], dim=-1)


def _half_size(like: Tensor, height: int, width: int) -> Tensor:
    """[..., 2]; made on the device of `like` [..., 2]: a copy from the host would hold up the stream."""
    return torch.stack([torch.full_like(like[..., 0], side / 2) for side in (height, width)], dim=-1)


def pose_matrix(rotation: Tensor, translation: Tensor) -> Tensor:
    """Rotation [..., 3, 3] and translation [..., 3] → [..., 4, 4]."""
    top = torch.cat([rotation, translation[..., None]], dim=-1)
    bottom = F.pad(torch.ones_like(top[..., :1, :1]), (3, 0))  # 0 0 0 1
    return torch.cat([top, bottom], dim=-2)


def invert_pose(pose: Tensor) -> Tensor:
    """Rigid transform [..., 4, 4] (or [..., 3, 4]) → its inverse [..., 4, 4]."""
    rotation = pose[..., :3, :3].transpose(-1, -2)
    return pose_matrix(rotation, -(rotation @ pose[..., :3, 3:])[..., 0])


def intrinsic_matrix(focal: Tensor, centre: Tensor) -> Tensor:
    """Focal lengths (fx, fy) [..., 2] and principal point (cx, cy) [..., 2] → [..., 3, 3], no skew."""
    matrix = torch.diag_embed(torch.cat([focal, torch.ones_like(focal[..., :1])], dim=-1))
    matrix[..., :2, 2] = centre
    return matrix


def rotation_from_quaternion(quaternion: Tensor) -> Tensor:
    """Quaternion xyzw [..., 4] of any length → rotation [..., 3, 3]; the zero quaternion gives identity."""
    x, y, z, w = quaternion.unbind(-1)
    s = 2 / (quaternion * quaternion).sum(-1).clamp_min(torch.finfo(quaternion.dtype).tiny)
    rows = [
        [1 - s * (y * y + z * z), s * (x * y - z * w), s * (x * z + y * w)],
        [s * (x * y + z * w), 1 - s * (x * x + z * z), s * (y * z - x * w)],
        [s * (x * z - y * w), s * (y * z + x * w), 1 - s * (x * x + y * y)],
    ]
    return torch.stack([torch.stack(row, dim=-1) for row in rows], dim=-2)


def quaternion_from_rotation(rotation: Tensor) -> Tensor:
    """Rotation [..., 3, 3] → unit quaternion xyzw [..., 4], scalar ≥ 0.

    Every component can serve as the divisor; the largest one is chosen, which is stable everywhere.
    """
    m = rotation
    xx, yy, zz = m[..., 0, 0], m[..., 1, 1], m[..., 2, 2]
    yz, zx, xy = m[..., 2, 1] - m[..., 1, 2], m[..., 0, 2] - m[..., 2, 0], m[..., 1, 0] - m[..., 0, 1]
    sum_xy, sum_zx, sum_yz = (
        m[..., 1, 0] + m[..., 0, 1], m[..., 0, 2] + m[..., 2, 0], m[..., 2, 1] + m[..., 1, 2]
    )  # fmt: skip
    candidates = [  # each row is the quaternion times four times one of its components
        [1 + xx - yy - zz, sum_xy, sum_zx, yz],
        [sum_xy, 1 - xx + yy - zz, sum_yz, zx],
        [sum_zx, sum_yz, 1 - xx - yy + zz, xy],
        [yz, zx, xy, 1 + xx + yy + zz],
    ]
    table = torch.stack([torch.stack(row, dim=-1) for row in candidates], dim=-2)
    best = table.diagonal(dim1=-2, dim2=-1).argmax(-1)[..., None, None].expand(*m.shape[:-2], 1, 4)
    quaternion = table.gather(-2, best)[..., 0, :]
    quaternion = quaternion / quaternion.norm(dim=-1, keepdim=True)
    return torch.where(quaternion[..., 3:] < 0, -quaternion, quaternion)


def unproject_depth(depth: Tensor, intrinsics: Tensor, world_from_camera: Tensor) -> Tensor:
    """Depth [..., H, W] along the optical axis → points [..., H, W, 3] in world."""
    height, width = depth.shape[-2:]
    pixels, depth = _pixel_grid(height, width, depth.dtype, depth.device), depth[..., None]
    focal, centre = intrinsics.diagonal(dim1=-2, dim2=-1)[..., :2], intrinsics[..., :2, 2]
    across = (pixels - centre[..., None, None, :]) * depth / focal[..., None, None, :]
    in_camera = torch.cat([across, depth], dim=-1)
    rotation, translation = world_from_camera[..., :3, :3], world_from_camera[..., :3, 3]
    in_world = in_camera.flatten(-3, -2) @ rotation.transpose(-1, -2) + translation[..., None, :]
    return in_world.unflatten(-2, (height, width))


@functools.lru_cache(maxsize=8)  # image sizes
@torch.inference_mode(False)  # used by inference and training alike
def _pixel_grid(height: int, width: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Column and row of every pixel [H, W, 2]."""
    v, u = (torch.arange(side, device=device, dtype=dtype) for side in (height, width))
    return torch.stack(torch.meshgrid(u, v, indexing="xy"), dim=-1)


def unproject_pixels(
    depth: NDArray[np.float32],
    chosen: NDArray[np.int64],
    intrinsics: NDArray[np.floating[Any]],
    world_from_camera: NDArray[np.floating[Any]],
) -> NDArray[np.float32]:
    """The same of one image [H, W] for some pixels [N], numbered row by row → points [N, 3] in world.

    What depends on row or column alone is computed once for each.
    """
    rows, columns = np.divmod(chosen, depth.shape[1])
    (fx, _, cx), (_, fy, cy), _ = intrinsics.astype(np.float32)
    rotation, translation = np.hsplit(world_from_camera[:3].astype(np.float32), [3])
    z = depth.ravel().take(chosen)
    x = (np.arange(depth.shape[1], dtype=np.float32) - cx).take(columns) * z / fx
    y = (np.arange(depth.shape[0], dtype=np.float32) - cy).take(rows) * z / fy
    turned = np.einsum("ij,jn->in", rotation, np.stack([x, y, z]))  # by one thread, unlike a product
    points: NDArray[np.float32] = (turned + translation).T
    return points
