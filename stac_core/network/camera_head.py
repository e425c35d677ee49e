"""Camera tokens → pose and field of view, refined step by step (VGGT, arXiv 2503.11651, section 3.3)."""

from __future__ import annotations

from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from stac_core.config import NetworkConfig
from stac_core.network.blocks import Block, LayerNorm, Mlp
from stac_core.network.context import AttentionContext

POSE_WIDTH = 9  # translation 3, quaternion xyzw 4, vertical and horizontal field of view


class CameraHead(nn.Module):
    """Starts from no pose; each iteration sees the pose so far and adds a correction."""

    def __init__(self, config: NetworkConfig) -> None:
        super().__init__()
        width = 2 * config.width
        self.iterations = config.camera_iterations
        self.token_norm = LayerNorm(width)
        self.empty_pose_tokens = nn.Parameter(torch.zeros(1, 1, POSE_WIDTH))
        self.embed_pose = nn.Linear(POSE_WIDTH, width)
        self.poseLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(width, 3 * width))
        self.adaln_norm = nn.LayerNorm(width, eps=1e-6, elementwise_affine=False)
        self.trunk = nn.ModuleList(
            Block(width, config.camera_heads, config.camera_mlp_ratio) for _ in range(config.camera_blocks)
        )
        self.trunk_norm = LayerNorm(width)
        self.pose_branch = Mlp(width, width // 2, POSE_WIDTH)

    def forward(self, camera_tokens: Tensor, context: AttentionContext) -> list[Tensor]:
        """camera_tokens [B, S, 2C] → pose encodings [B, S, 9] of every iteration; the last one counts."""
        x = self.token_norm(camera_tokens)
        pose = self.empty_pose_tokens.expand(*x.shape[:2], -1)
        encodings = []
        for iteration in range(self.iterations):
            y = self.modulate(x, pose)
            for layer, block in enumerate(self.trunk):
                y = block(y, partial(context.attend_camera, iteration, layer))
            correction = self.pose_branch(self.trunk_norm(y))
            # The next iteration reads the pose before the activation.
            pose = correction if iteration == 0 else pose + correction
            encodings.append(activate_pose(pose))
        return encodings

    def modulate(self, x: Tensor, pose: Tensor) -> Tensor:
        """Adaptive layer norm of the tokens, steered by the pose so far."""
        shift, scale, gate = self.poseLN_modulation(self.embed_pose(pose)).chunk(3, dim=-1)
        return x + gate * (self.adaln_norm(x) * (1 + scale) + shift)


def activate_pose(raw: Tensor) -> Tensor:
    """Fields of view are not negative; translation and quaternion stay as they are."""
    return torch.cat([raw[..., :7], F.relu(raw[..., 7:])], dim=-1)
