"""The whole network, top to bottom: images → tokens → cameras, depth, points.

One class serves STream3R, StreamVGGT and the bundled model: they differ in numbers (NetworkConfig)
and in the past that their context lets them see.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from stac_core.config import NetworkConfig
from stac_core.geometry import decode_pose
from stac_core.network.aggregator import Aggregator, SceneTokens
from stac_core.network.camera_head import CameraHead
from stac_core.network.context import AttentionContext
from stac_core.network.dense_head import DenseHead, depth_activation, point_activation
from stac_core.prediction import Prediction

FINGERPRINTED = 16  # numbers of each tensor


class CausalVGGT(nn.Module):
    """Streaming visual geometry transformer (VGGT, arXiv 2503.11651; STream3R, 2508.10893; StreamVGGT,
    2507.11539). Parameter names are those of the published checkpoints."""

    def __init__(self, config: NetworkConfig) -> None:
        super().__init__()
        self.config = config
        self.aggregator = Aggregator(config)
        self.camera_head = CameraHead(config)
        self.depth_head = DenseHead(config, 1, depth_activation)
        self.point_head = DenseHead(config, 3, point_activation)

    def forward(self, images: Tensor, context: AttentionContext, points: bool = False) -> Prediction:
        """One pass over S frames; everything in the result leads with [B, S].

        images [B, S, 3, H, W] in [0, 1], H and W multiples of the patch size (else ValueError).
        points: also run the point head, 8 % of the work, for points that do not go through the depth.
        Heads run in float32 also under a caller's autocast, which then reaches the aggregator only.
        """
        size = images.shape[-2:]
        tokens = self.aggregator(images, context)
        return Prediction(**self.cameras(tokens, size, context), **self.surfaces(tokens, size, points))

    def cameras(self, tokens: SceneTokens, size: Sequence[int], context: AttentionContext) -> dict[str, Any]:
        """Of images of this height and width: fields of the prediction."""
        with torch.autocast(tokens.camera.device.type, enabled=False):
            pose_encoding = self.camera_head(tokens.camera, context)[-1]
            world_from_camera, intrinsics = decode_pose(pose_encoding, *size)
        return {
            "pose_encoding": pose_encoding,
            "world_from_camera": world_from_camera,
            "intrinsics": intrinsics,
            "camera_tokens": tokens.camera,
        }

    def surfaces(self, tokens: SceneTokens, size: Sequence[int], points: bool) -> dict[str, Any]:
        """The others, which no context takes part in."""
        with torch.autocast(tokens.camera.device.type, enabled=False):
            depth, depth_confidence = self.depth_head(tokens.layers, *size)
            seen = {"depth": depth[..., 0], "depth_confidence": depth_confidence}
            if points:
                seen["points"], seen["point_confidence"] = self.point_head(tokens.layers, *size)
        return seen

    def foresee(self, images: Callable[[], Tensor | None]) -> None:
        """Say what comes after the next pass, which may then begin with it where no context takes part.

        images: makes them, as soon as that delays nothing, or None; nobody asks unless passes are recorded.
        """

    def set_precision(self, dtype: torch.dtype) -> CausalVGGT:
        """Keep the aggregator's matrices in `dtype`: its linear layers, patch projection and attention
        run in it. Norms, rotation, layer scales, residual stream and heads stay in float32."""
        for module in self._lowered():
            module.to(dtype)
        return self

    def fingerprint(self) -> str:
        """Twelve digits that tell these weights from others, in whatever precision they run.

        Of the first numbers of each tensor that stays in float32: training changes all of them.
        """
        lowered = {parameter for module in self._lowered() for parameter in module.parameters()}
        kept = [p.detach().flatten()[:FINGERPRINTED] for p in self.parameters() if p not in lowered]
        return hashlib.sha256(torch.cat(kept).cpu().numpy().tobytes()).hexdigest()[:12]

    def _lowered(self) -> list[nn.Module]:
        return [module for module in self.aggregator.modules() if isinstance(module, nn.Linear | nn.Conv2d)]
