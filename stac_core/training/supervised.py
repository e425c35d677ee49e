"""The network under training: one forward gives the loss and the figures worth watching."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from stac_core.cache.one_pass import OnePass
from stac_core.device import send
from stac_core.geometry import encode_pose, unproject_depth
from stac_core.network.aggregator import SceneTokens
from stac_core.network.causal_vggt import CausalVGGT
from stac_core.training.config import TrainingConfig
from stac_core.training.losses import camera_loss, depth_loss, point_loss
from stac_core.training.matching import Look, MatchingHeads, match_patches
from stac_core.training.motion import MotionHeads, patch_motions
from stac_core.training.sequences import Sequences

WATCHED_BLOCKS = (1, 3)  # global blocks whose first head learns to match
Dense = tuple[Tensor, Tensor]  # value and confidence


class WatchedPass(OnePass):
    """One pass that lets the matching loss see the queries and keys of some global blocks."""

    def __init__(self, visible: Tensor) -> None:
        super().__init__(visible=visible)
        self.looks: list[Look] = []
        self.visible = visible
        self._mask: Tensor | None = None  # of tokens

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """As `OnePass`; on a GPU as one masked attention, since a call per frame would leave it idle."""
        if layer in WATCHED_BLOCKS:
            self.looks.append(Look(q, k, self.visible))
        if not q.is_cuda or bool(self.visible.all()):
            return super().attend(layer, q, k, v)
        if self._mask is None:
            tokens = q.shape[2] // len(self.visible)
            seen = send(self.visible, q.device)
            self._mask = seen.repeat_interleave(tokens, 0).repeat_interleave(tokens, 1)
        return F.scaled_dot_product_attention(q, k, v, attn_mask=self._mask)


class Supervised(nn.Module):
    """A `CausalVGGT` with the heads of the auxiliary losses, which end with the training."""

    def __init__(self, network: CausalVGGT, config: TrainingConfig) -> None:
        super().__init__()
        self.network, self.config = network, config
        width = network.config.width
        self.matching = MatchingHeads(width, 2 * width, len(network.config.dense_layers))
        self.motion = MotionHeads(2 * width, len(network.config.dense_layers))
        for heads, weight in ((self.matching, config.matching_weight), (self.motion, config.motion_weight)):
            heads.requires_grad_(weight > 0)  # several processes wait for every gradient that is due

    def forward(
        self, sequences: Sequences, visible: Tensor, dense_frames: Tensor
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Loss of normalised sequences, to be called under the autocast of the training loop.

        visible: bool [S, S], which frame (row) sees which. dense_frames: numbers [D] of the frames,
        counted through the batch, whose depth and points are predicted and judged; the dense heads treat
        frames alone, and would be most of the work of a step on all of them.
        """
        network = self.network
        height, width = sequences.depth.shape[-2:]
        context = WatchedPass(visible)
        tokens = network.aggregator(sequences.images, context)
        layers = [layer.flatten(0, 1).index_select(0, dense_frames)[None] for layer in tokens.layers]
        depth = network.depth_head(layers, height, width)
        points = network.point_head(layers, height, width)
        with torch.autocast(sequences.depth.device.type, enabled=False):  # bfloat16 would blunt the truth
            poses = encode_pose(sequences.world_from_camera, sequences.intrinsics, height, width)
            encodings = network.camera_head(tokens.camera.float(), context)
            losses = {
                **self._dense_losses(depth, points, sequences.single(dense_frames)),
                "camera": camera_loss(torch.stack(tuple(encodings)), poses),
            }
            figures = {"move": translation_error(encodings[-1], poses)}
            figures |= {name: loss.detach() for name, loss in losses.items()}
            if self.config.matching_weight:
                losses["matching"], matched = self._matching_loss(tokens, context.looks, sequences)
                figures |= matched
            if self.config.motion_weight:
                losses["motion"], moved = self._motion_loss(tokens, sequences, poses)
                figures |= moved
        loss = torch.stack([getattr(self.config, f"{name}_weight") * losses[name] for name in losses]).sum()
        return loss, figures

    def _dense_losses(self, depth: Dense, points: Dense, judged: Sequences) -> dict[str, Tensor]:
        truth, valid = judged.depth, judged.valid
        target = unproject_depth(truth, judged.intrinsics, judged.world_from_camera)
        return {
            "depth": depth_loss(depth[0][..., 0].float(), depth[1].float(), truth, valid),
            "point": point_loss(points[0].float(), points[1].float(), target, truth, valid),
        }

    def _motion_loss(
        self, tokens: SceneTokens, sequences: Sequences, poses: Tensor
    ) -> tuple[Tensor, dict[str, Tensor]]:
        config = self.network.config
        motions = patch_motions(sequences, config.patch_size)
        return self.motion(tokens.layers, config.special_tokens, motions, poses)

    def _matching_loss(
        self, tokens: SceneTokens, looks: list[Look], sequences: Sequences
    ) -> tuple[Tensor, dict[str, Tensor]]:
        config = self.network.config
        matches = match_patches(sequences, config.patch_size)
        patches = [layer[:, :, config.special_tokens :].float() for layer in tokens.layers]
        return self.matching(tokens.encoded.float(), patches, looks, matches)


def translation_error(encoding: Tensor, truth: Tensor) -> Tensor:
    """Error of the translations beside that of standing still: 1 = nothing learned. [B, S, 9] both."""
    wrong, still = (encoding - truth)[..., :3].detach(), truth[..., :3]
    return wrong.abs().sum() / still.abs().sum().clamp(min=1e-6)
