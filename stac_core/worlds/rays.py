"""Rays of several cameras, one per pixel."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from stac_core.worlds.shapes import length, turn


@dataclass(frozen=True)
class Rays:
    """P rays of each of F cameras, with what is the same for all rays of a camera.

    Rays are not normalised: they are one unit long along the optical axis, so that the distance
    along a ray in units of its direction is z-depth.
    """

    worlds: Tensor  # [F] index of the world each camera is in
    origin: Tensor  # [F, 3] in world axes
    direction: Tensor  # [F, 3, P]
    length: Tensor  # [F, P] of the directions
    pixel: Tensor  # [F, 1] width of a pixel one metre away
    sides: Tensor  # [F, 5, 3] inward normals of the view's four sides and its front


def camera_rays(worlds: Tensor, poses: Tensor, lenses: Tensor, height: int, width: int) -> Rays:
    """Rays through all pixels of cameras at poses [F, 4, 4] with intrinsics [F, 3, 3].

    Pixel column u is the ray through x = (u − cx)/fx: integer coordinates, no half-pixel shift.
    """
    rotation = poses[:, :3, :3]
    u = torch.arange(width, device=poses.device, dtype=poses.dtype)
    v = torch.arange(height, device=poses.device, dtype=poses.dtype)
    x = (u - lenses[:, 0, 2, None]) / lenses[:, 0, 0, None]
    y = (v - lenses[:, 1, 2, None]) / lenses[:, 1, 1, None]
    grid_x = x[:, None, :].expand(-1, height, -1)
    grid_y = y[:, :, None].expand(-1, -1, width)
    direction = turn(rotation, torch.stack([grid_x, grid_y, torch.ones_like(grid_x)], 1).flatten(2))
    sides = turn(rotation, _frustum(x, y).transpose(1, 2)).transpose(1, 2)
    return Rays(worlds, poses[:, :3, 3], direction, length(direction), 1 / lenses[:, 0, 0, None], sides)


def _frustum(x: Tensor, y: Tensor) -> Tensor:
    """Normals [F, 5, 3] in camera axes of a view that spans x [F, W] and y [F, H] at depth one."""
    zero, one = torch.zeros_like(x[:, 0]), torch.ones_like(x[:, 0])
    normals = [
        (one, zero, -x[:, 0]),
        (-one, zero, x[:, -1]),
        (zero, one, -y[:, 0]),
        (zero, -one, y[:, -1]),
        (zero, zero, one),
    ]
    return torch.stack([torch.stack(normal, -1) for normal in normals], 1)
