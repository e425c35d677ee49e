"""The network under training: one forward gives the loss and the figures worth watching."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from stac_core.cache.one_pass import OnePass
from stac_core.geometry import encode_pose, unproject_depth
from stac_core.network.causal_vggt import CausalVGGT
from stac_core.training.config import TrainingConfig
from stac_core.training.losses import camera_loss, depth_loss, point_loss
from stac_core.training.matching import Look, MatchingHeads, match_patches
from stac_core.training.sequences import Sequences

WATCHED_BLOCKS = (1, 3)  # global blocks whose first head learns to match


class WatchedPass(OnePass):
    """One pass that lets the matching loss see the queries and keys of some global blocks."""

    def __init__(self, visible: Tensor) -> None:
        super().__init__(visible=visible)
        self.looks: list[Look] = []
        self.visible = visible

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """As `OnePass`."""
        if layer in WATCHED_BLOCKS:
            self.looks.append(Look(q, k, self.visible))
        return super().attend(layer, q, k, v)


class Supervised(nn.Module):
    """A `CausalVGGT` with the heads of the matching loss, which end with the training."""

    def __init__(self, network: CausalVGGT, config: TrainingConfig) -> None:
        super().__init__()
        self.network, self.config = network, config
        width = network.config.width
        self.matching = MatchingHeads(width, 2 * width, len(network.config.dense_layers))

    def forward(
        self, sequences: Sequences, visible: Tensor, dense_frames: Tensor
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Loss of normalised sequences, to be called under the autocast of the training loop.

        visible: bool [S, S], which frame (row) sees which. dense_frames: numbers [D] of the frames whose
        depth and points are predicted and judged; the dense heads treat frames alone, and would be most
        of the work of a step on all of them.
        """
        network, weights = self.network, self.config
        height, width = sequences.depth.shape[-2:]
        context = WatchedPass(visible)
        tokens = network.aggregator(sequences.images, context)
        matches = match_patches(sequences, network.config.patch_size)
        patches = [layer[:, :, network.config.special_tokens :] for layer in tokens.layers]
        matching, figures = self.matching(tokens.encoded, patches, context.looks, matches)
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
