"""Patch tokens of single images: DINOv2 ViT with register tokens (arXiv 2304.07193, 2309.16588)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from stac_core.config import NetworkConfig
from stac_core.network.blocks import Block, LayerNorm

EPS = 1e-6  # of every norm in the encoder; the rest of the network uses 1e-5


class PatchProjection(nn.Module):
    """Image → one token per patch, row by row."""

    def __init__(self, patch_size: int, width: int) -> None:
        super().__init__()
        self.proj = nn.Conv2d(3, width, patch_size, patch_size)

    def forward(self, images: Tensor) -> Tensor:
        """images [B, 3, H, W] → [B, N, width]."""
        return self.proj(images.to(self.proj.weight.dtype)).flatten(2).transpose(1, 2)


class ImageEncoder(nn.Module):
    """The images of all frames, each for itself."""

    def __init__(self, config: NetworkConfig) -> None:
        super().__init__()
        width, grid = config.width, config.position_grid
        self.patch_size, self.grid = config.patch_size, grid
        self.patch_embed = PatchProjection(config.patch_size, width)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, width))
        self.pos_embed = nn.Parameter(torch.zeros(1, 1 + grid * grid, width))
        self.register_tokens = nn.Parameter(torch.zeros(1, config.registers, width))
        # Stored in every checkpoint, used by the pretraining of the encoder only.
        self.mask_token = nn.Parameter(torch.zeros(1, width), requires_grad=False)
        self.blocks = nn.ModuleList(
            Block(width, config.encoder_heads, config.encoder_mlp_ratio, eps=EPS)
            for _ in range(config.encoder_blocks)
        )
        self.norm = LayerNorm(width, eps=EPS)

    def forward(self, images: Tensor) -> Tensor:
        """ImageNet-normalised images [B, 3, H, W] → normed patch tokens [B, N, width], float32."""
        x = self.embed(images)
        for block in self.blocks:
            x = block(x)
        return self.norm(x)[:, 1 + self.register_tokens.shape[1] :]

    def embed(self, images: Tensor) -> Tensor:
        """Class token, registers and positioned patches [B, 1 + registers + N, width]."""
        batch, _, height, width = images.shape
        positions = resize_positions(
            self.pos_embed, self.grid, height // self.patch_size, width // self.patch_size
        )
        x = torch.cat([self.cls_token.expand(batch, -1, -1), self.patch_embed(images)], dim=1) + positions
        return torch.cat([x[:, :1], self.register_tokens.expand(batch, -1, -1), x[:, 1:]], dim=1)


def resize_positions(positions: Tensor, grid: int, rows: int, columns: int) -> Tensor:
    """Fit the stored embedding [1, 1 + grid², C] (class first) to rows × columns patches.

    Antialiased on purpose: PyTorch's antialiased bicubic also uses another cubic kernel, which is the
    one the weights know.
    """
    if (rows, columns) == (grid, grid):
        return positions
    stored = positions[:, 1:].unflatten(1, (grid, grid)).permute(0, 3, 1, 2)
    fitted = F.interpolate(stored, size=(rows, columns), mode="bicubic", antialias=True, align_corners=False)
    return torch.cat([positions[:, :1], fitted.flatten(2).transpose(1, 2)], dim=1)
