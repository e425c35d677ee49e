"""The network under training: one forward gives the loss and the figures worth watching."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from stac_core.geometry import encode_pose, unproject_depth
from stac_core.network.causal_vggt import CausalVGGT
from stac_core.network.context import AttentionContext
from stac_core.training.config import TrainingConfig
from stac_core.training.losses import camera_loss, depth_loss, point_loss
from stac_core.training.matching import MatchingHeads, match_patches
from stac_core.training.sequences import Sequences


class Supervised(nn.Module):
    """A `CausalVGGT` with the heads of the matching loss, which end with the training."""

    def __init__(self, network: CausalVGGT, config: TrainingConfig) -> None:
        super().__init__()
        self.network, self.config = network, config
        width = network.config.width
        self.matching = MatchingHeads(width, 2 * width)

    def forward(
        self, sequences: Sequences, context: AttentionContext, dense_frames: Tensor
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Loss of normalised sequences, to be called under the autocast of the training loop.

        dense_frames: numbers [D] of the frames whose depth and points are predicted and judged; the
        dense heads treat frames alone, and would be most of the work of a step on all of them.
        """
        network, weights = self.network, self.config
        height, width = sequences.depth.shape[-2:]
        tokens = network.aggregator(sequences.images, context)
        matches = match_patches(sequences, network.config.patch_size)
        deep = tokens.layers[-1][:, :, network.config.special_tokens :]
        matching, figures = self.matching(tokens.encoded, deep, matches)
        poses = encode_pose(sequences.world_from_camera, sequences.intrinsics, height, width)
        with torch.autocast(poses.device.type, enabled=False):
            camera = camera_loss(network.camera_head(tokens.camera.float(), context), poses)
        layers = [layer[:, dense_frames] for layer in tokens.layers]
        judged = sequences.frames(dense_frames)
        truth, valid = judged.depth, judged.valid
        depth, depth_confidence = network.depth_head(layers, height, width)
        dense = depth_loss(depth[..., 0].float(), depth_confidence.float(), truth, valid)
        points, point_confidence = network.point_head(layers, height, width)
        target = unproject_depth(truth, judged.intrinsics, judged.world_from_camera)
        own = point_loss(points.float(), point_confidence.float(), target, truth, valid)
        loss = (
            weights.depth_weight * dense
            + weights.point_weight * own
            + weights.camera_weight * camera
            + weights.matching_weight * matching
        )
        figures |= {"depth": dense.detach(), "points": own.detach(), "camera": camera.detach()}
        return loss, figures
