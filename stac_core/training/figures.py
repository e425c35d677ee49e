"""How good a reconstruction is, beside the answer "stand still, constant depth". Pure functions."""

from __future__ import annotations

import torch
from torch import Tensor


def depth_error(depth: Tensor, truth: Tensor, valid: Tensor) -> float:
    """Mean |s·depth − truth| / truth, s = one scale for the whole sequence: the median ratio.

    depth, truth, valid: [S, H, W]. NaN where nothing is valid.
    """
    depth, truth = depth[valid].double(), truth[valid].double()
    if not depth.numel():
        return float("nan")
    scale = (truth / depth.clamp(min=1e-9)).median()
    return ((scale * depth - truth).abs() / truth).mean().item()


def rotation_errors(world_from_camera: Tensor, truth: Tensor) -> Tensor:
    """Degrees by which each frame 1..S-1 is turned wrongly against frame 0, [S-1]. Poses [S, 4, 4]."""
    return _angles(_relative(world_from_camera).mT @ _relative(truth))


def turns(truth: Tensor) -> Tensor:
    """Degrees between each frame 1..S-1 and frame 0: the error of standing still, [S-1]."""
    return _angles(_relative(truth))


def trajectory_error(world_from_camera: Tensor, truth: Tensor) -> float:
    """ATE: root mean square distance of camera centres after a Sim(3) fit, over the true path length.

    Source: Umeyama 1991 for the fit. NaN for a camera that does not move. Poses [S, 4, 4].
    """
    estimate, target = world_from_camera[:, :3, 3].double(), truth[:, :3, 3].double()
    path = (target[1:] - target[:-1]).norm(dim=-1).sum()
    if path < 1e-9:
        return float("nan")
    a, b = estimate - estimate.mean(0), target - target.mean(0)
    u, singular, vt = torch.linalg.svd(b.T @ a)
    sign = torch.ones(3, dtype=torch.float64)
    sign[2] = torch.sign(torch.linalg.det(u @ vt))
    scale = (singular * sign).sum() / a.square().sum().clamp(min=1e-18)
    fitted = scale * a @ (u @ torch.diag(sign) @ vt).T
    return ((fitted - b).square().sum(-1).mean().sqrt() / path).item()


def _relative(world_from_camera: Tensor) -> Tensor:
    rotation = world_from_camera[:, :3, :3].double()
    return rotation[0].mT @ rotation[1:]


def _angles(rotation: Tensor) -> Tensor:
    """Rotation angle in degrees, exact near 0 as well."""
    skew = torch.stack(
        [
            rotation[:, 2, 1] - rotation[:, 1, 2],
            rotation[:, 0, 2] - rotation[:, 2, 0],
            rotation[:, 1, 0] - rotation[:, 0, 1],
        ],
        -1,
    )
    trace = rotation.diagonal(dim1=-2, dim2=-1).sum(-1)
    return torch.rad2deg(torch.atan2(skew.norm(dim=-1), trace - 1))
