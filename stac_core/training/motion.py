"""Auxiliary motion losses: how every patch, and the camera, moved since frame 0.

Asked of every layer that the dense heads read. The camera head alone learns to turn long before it learns
to move: a step shifts patches by little, each by another amount, and only a place that knows the motion
of many patches can tell it from the turn. The heads live here because only training uses them.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from stac_core.geometry import unproject_depth
from stac_core.training.losses import camera_errors
from stac_core.training.sequences import Sequences

STANDING = (0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 1.0, 1.0, 1.0)  # pose encoding of a camera that did not move
PATCH_WEIGHT = 10.0  # their errors are small numbers beside those of the camera
FARTHEST = 1.0  # depths; what moved farther, by a near miss or a wide turn, would outweigh all else


def patch_motions(sequences: Sequences, patch: int) -> tuple[Tensor, Tensor]:
    """How the surface in the centre of each patch moved, in shares of its depth; from frame 1 on.

    Returns the displacement [B, S-1, N, 3] from the own camera's coordinates to frame 0's, and where it is
    known and no longer than FARTHEST, bool [B, S-1, N]. Sequences must be normalised.
    """
    later = sequences.frames(torch.arange(1, sequences.depth.shape[1], device=sequences.depth.device))
    still = torch.eye(4, device=later.depth.device).expand_as(later.world_from_camera)
    own = unproject_depth(later.depth, later.intrinsics, still)
    there = unproject_depth(later.depth, later.intrinsics, later.world_from_camera)
    centres = (..., slice(patch // 2, None, patch), slice(patch // 2, None, patch))
    depth = later.depth[centres].flatten(2)
    motion = (there - own).movedim(-1, 2)[centres].flatten(3).movedim(2, -1)
    motion = motion / depth.clamp(min=1e-6)[..., None]
    known = (depth > 0) & (motion.norm(dim=-1) < FARTHEST)
    return motion.where(known[..., None], 0.0), known


class MotionHeads(nn.Module):
    """One linear read-out per layer for patches (3 numbers) and for the camera (a pose encoding)."""

    standing: Tensor

    def __init__(self, width: int, layers: int) -> None:
        super().__init__()
        self.patches = nn.ModuleList(_silent_head(width, 3) for _ in range(layers))
        self.cameras = nn.ModuleList(_silent_head(width, len(STANDING)) for _ in range(layers))
        self.register_buffer("standing", torch.tensor(STANDING), persistent=False)

    def forward(
        self, layers: Sequence[Tensor], specials: int, motions: tuple[Tensor, Tensor], poses: Tensor
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Mean loss over the layers, and the last layer's error beside that of standing still.

        layers: tokens [B, S, P, 2C], the first of each frame the camera's, the first `specials` no patches;
        motions: of `patch_motions`; poses: true encodings [B, S, 9].
        """
        target, known = motions
        count = known.sum().clamp(min=1)
        heads = list(zip(layers, self.patches, self.cameras, strict=True))
        moved = torch.stack([head(tokens[:, 1:, specials:].float()).float() for tokens, head, _ in heads])
        cameras = torch.stack([head(tokens[:, :, 0].float()).float() for tokens, _, head in heads])
        errors = ((moved - target).abs().sum(-1) * known).sum((1, 2, 3)) / count
        still = (target.abs().sum(-1) * known).sum() / count
        figures = {"motion": errors[-1].detach() / still.clamp(min=1e-6)}
        loss = PATCH_WEIGHT * errors.mean() + camera_errors(cameras + self.standing, poses).mean()
        return loss, figures


def _silent_head(width: int, out: int) -> nn.Sequential:
    """Says 0 at first: what does not move yet needs no random answer."""
    linear = nn.Linear(width, out)
    nn.init.zeros_(linear.weight)
    nn.init.zeros_(linear.bias)
    return nn.Sequential(nn.LayerNorm(width), linear)
