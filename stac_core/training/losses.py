"""Losses of the VGGT family: depth and points with a confidence, camera over all refinements.

Source: VGGT (arXiv 2503.11651), section 3.4. Residuals of depth and points are relative to the
true depth, so that near and far surfaces of one normalised sequence weigh alike. Unlike there, the
confidence of depth learns from the error and does not weigh it: weighed, pixels that are easy already
would count ten times as much as those that are wrong, which make the mean error.
"""

from __future__ import annotations

import torch
from torch import Tensor

CONFIDENCE_ALPHA = 0.2  # reward of log confidence; a residual below it earns confidence above 1
REFINEMENT_DECAY = 0.6  # earlier camera iterations count less
# A turn of 10° is 0.09 in a quaternion.
TRANSLATION_WEIGHT, ROTATION_WEIGHT, FIELD_OF_VIEW_WEIGHT = 2.0, 10.0, 0.5


def depth_loss(depth: Tensor, confidence: Tensor, truth: Tensor, valid: Tensor) -> Tensor:
    """Error of log depth, the same with each frame at its best scale, and the slope of the error between
    neighbours; and of the confidence, which should tell error and slope.

    Where a scale is wrong, every pixel pulls one way and none says what is wrong with the shape, hence the
    second (like MiDaS, arXiv 1907.01341, section 5). All [B, S, H, W]; `valid` is boolean.
    """
    error = (depth.clamp(min=1e-6).log() - truth.clamp(min=1e-6).log()) * valid
    residual = error.abs() + _slope(error, valid)
    of_shape = (error - _scale_of(error.detach(), valid)).abs()
    return _mean_where(valid, residual + of_shape) + _weighted(residual.detach(), confidence, valid)


def point_loss(points: Tensor, confidence: Tensor, truth: Tensor, depth: Tensor, valid: Tensor) -> Tensor:
    """Distance to the true point, divided by its true depth. points, truth [B, S, H, W, 3]."""
    error = (points - truth).norm(dim=-1) / depth.clamp(min=1e-6)
    return _weighted(error.where(valid, 0.0), confidence, valid)


def camera_loss(refinements: Tensor, truth: Tensor) -> Tensor:
    """Errors of all refinements [R, B, S, 9], in their order, the earlier counting less; truth [B, S, 9]."""
    errors = camera_errors(refinements, truth)
    ages = torch.arange(len(errors) - 1, -1, -1, device=errors.device)
    return (REFINEMENT_DECAY**ages * errors).sum()


def camera_errors(encodings: Tensor, truth: Tensor) -> Tensor:
    """Absolute errors of translation, quaternion and field of view of pose encodings [K, B, S, 9] → [K].

    truth [B, S, 9]. A quaternion and its negative are the same rotation: the nearer of the two is the target.
    """
    quaternion, target = encodings[..., 3:7], truth[..., 3:7]
    opposite = (quaternion.detach() * target).sum(-1, keepdim=True) < 0
    target = torch.where(opposite, -target, target)
    translation = (encodings[..., :3] - truth[..., :3]).abs().mean((1, 2, 3))
    rotation = (quaternion - target).abs().mean((1, 2, 3))
    view = (encodings[..., 7:] - truth[..., 7:]).abs().mean((1, 2, 3))
    return TRANSLATION_WEIGHT * translation + ROTATION_WEIGHT * rotation + FIELD_OF_VIEW_WEIGHT * view


def _weighted(residual: Tensor, confidence: Tensor, valid: Tensor) -> Tensor:
    return _mean_where(valid, confidence * residual - CONFIDENCE_ALPHA * confidence.log())


def _mean_where(valid: Tensor, loss: Tensor) -> Tensor:
    return (loss * valid).sum() / valid.sum().clamp(min=1)


def _scale_of(error: Tensor, valid: Tensor) -> Tensor:
    """Median error of every frame [B, S, 1, 1], over a sixteenth of its pixels; 0 where none is known."""
    known = error.where(valid, torch.nan)[..., ::4, ::4].flatten(2)
    return known.nanmedian(-1).values.nan_to_num()[..., None, None]


def _slope(error: Tensor, valid: Tensor) -> Tensor:
    """Change of the error towards the right and the lower neighbour, 0 where either is unknown."""
    slope = torch.zeros_like(error)
    right, down = valid[..., 1:] & valid[..., :-1], valid[..., 1:, :] & valid[..., :-1, :]
    slope[..., :-1] += (error[..., 1:] - error[..., :-1]).abs() * right
    slope[..., :-1, :] += (error[..., 1:, :] - error[..., :-1, :]).abs() * down
    return slope
