"""Images → tokens that know the scene: alternating attention within frames and across frames.

Source: VGGT (arXiv 2503.11651), section 3; made causal by STream3R (arXiv 2508.10893).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn

from stac_core.config import NetworkConfig
from stac_core.network.blocks import Block
from stac_core.network.context import AttentionContext
from stac_core.network.image_encoder import ImageEncoder
from stac_core.network.rope import rotary_table

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_DEVIATION = (0.229, 0.224, 0.225)


@dataclass(frozen=True)
class SceneTokens:
    """What the aggregator hands to the heads. P tokens per frame: camera, registers, N patches."""

    encoded: Tensor  # [B, S, N, C] patch tokens of the image encoder, before any frame met another
    layers: list[Tensor]  # [B, S, P, 2C] (frame ‖ global) of each layer that the dense heads read

    @property
    def camera(self) -> Tensor:
        """Camera tokens of the last layer [B, S, 2C]."""
        return self.layers[-1][:, :, 0]


class Aggregator(nn.Module):
    """The image encoder, then `layers` pairs of one frame block and one global block."""

    _mean: Tensor
    _deviation: Tensor

    def __init__(self, config: NetworkConfig) -> None:
        super().__init__()
        self.config = config
        self.patch_embed = ImageEncoder(config)
        # On the CPU even when the weights are built on the meta device: no file brings these values.
        for name, values in (("_mean", IMAGENET_MEAN), ("_deviation", IMAGENET_DEVIATION)):
            self.register_buffer(name, torch.tensor(values, device="cpu")[:, None, None], persistent=False)
        # Index 0 belongs to the first frame of a stream, index 1 to every other frame.
        self.camera_token = nn.Parameter(torch.zeros(1, 2, 1, config.width))
        self.register_token = nn.Parameter(torch.zeros(1, 2, config.registers, config.width))
        self.frame_blocks, self.global_blocks = (
            nn.ModuleList(
                Block(config.width, config.heads, config.mlp_ratio, qk_norm=True)
                for _ in range(config.layers)
            )
            for _ in range(2)
        )

    def forward(self, images: Tensor, context: AttentionContext) -> SceneTokens:
        """images [B, S, 3, H, W] in [0, 1]; begins one pass of `context`."""
        return self.relate(self.encode(images), images.shape[-2:], context)

    def encode(self, images: Tensor) -> Tensor:
        """images [B, S, 3, H, W] in [0, 1] → `SceneTokens.encoded`; asks no context."""
        _check_images(images, self.config.patch_size)
        encoded = self.patch_embed(((images - self._mean) / self._deviation).flatten(0, 1))
        return encoded.unflatten(0, images.shape[:2])

    def relate(self, encoded: Tensor, size: Sequence[int], context: AttentionContext) -> SceneTokens:
        """encoded: of images of this height and width; begins one pass of `context`."""
        batch, frames = encoded.shape[:2]
        tokens = torch.cat([self._special_tokens(batch, frames, context.frames_seen == 0), encoded], dim=2)
        tokens_per_frame = tokens.shape[2]
        height, width = size
        rotary = self._rotary(height, width, tokens.device)
        context.begin(frames, tokens_per_frame)
        layers = self._alternate(tokens, rotary, context)
        return SceneTokens(encoded, layers)

    def _alternate(self, tokens: Tensor, rotary: Tensor, context: AttentionContext) -> list[Tensor]:
        batch, frames = tokens.shape[:2]
        rotary_of_all = rotary.repeat(1, frames, 1)
        kept = []
        for layer, (frame_block, global_block) in enumerate(
            zip(self.frame_blocks, self.global_blocks, strict=True)
        ):
            within = frame_block(tokens.flatten(0, 1), rotary=rotary).unflatten(0, (batch, frames))
            across = global_block(within.flatten(1, 2), partial(context.attend, layer), rotary_of_all)
            tokens = across.unflatten(1, (frames, -1))
            if layer in self.config.dense_layers:
                kept.append(torch.cat([within, tokens], dim=-1))
        return kept

    def _special_tokens(self, batch: int, frames: int, stream_begins: bool) -> Tensor:
        """Camera and register tokens [B, S, 1 + registers, C]."""
        stored = torch.cat([self.camera_token, self.register_token], dim=2)
        first, other = stored[:, :1], stored[:, 1:]
        if stream_begins:
            return torch.cat([first, other.expand(1, frames - 1, -1, -1)], dim=1).expand(batch, -1, -1, -1)
        return other.expand(batch, frames, -1, -1)

    def _rotary(self, height: int, width: int, device: torch.device) -> Tensor:
        config = self.config
        rows, columns = height // config.patch_size, width // config.patch_size
        return rotary_table(rows, columns, config.special_tokens, config.width // config.heads, device)


def _check_images(images: Tensor, patch_size: int) -> None:
    if images.ndim != 5 or images.shape[2] != 3 or 0 in images.shape:
        raise ValueError(
            f"images has shape {list(images.shape)}, expected [batch, frames, 3, height, width], none 0"
        )
    height, width = images.shape[-2:]
    if height % patch_size or width % patch_size:
        raise ValueError(
            f"images are {width}×{height} pixels; both sides must be multiples of the patch size "
            f"{patch_size}: resize with stac_core.images.prepare_images"
        )
