"""Tokens of four layers → a value and a confidence per pixel: DPT (arXiv 2103.13413) as VGGT uses it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from stac_core.config import NetworkConfig
from stac_core.network.blocks import LayerNorm

PIXELS_AT_ONCE = 1 << 20  # without gradients, frames go through in slices of about so many pixels
UV_WEIGHT = 0.1
Activation = Callable[[Tensor], Tensor]


class ResidualUnit(nn.Module):
    """Two convolutions around a skip. The skip adds relu(x), not x: the weights were trained that way."""

    def __init__(self, features: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(features, features, 3, padding=1)
        self.conv2 = nn.Conv2d(features, features, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        rectified = F.relu(x)
        return self.conv2(F.relu(self.conv1(rectified))) + rectified


class Fusion(nn.Module):
    """Add a finer level to the coarser result and enlarge; the coarsest level comes alone."""

    def __init__(self, features: int, coarsest: bool) -> None:
        super().__init__()
        self.resConfUnit1 = None if coarsest else ResidualUnit(features)
        self.resConfUnit2 = ResidualUnit(features)
        self.out_conv = nn.Conv2d(features, features, 1)

    def forward(self, x: Tensor, finer: Tensor | None, size: tuple[int, int]) -> Tensor:
        if self.resConfUnit1 is not None and finer is not None:
            x = x + self.resConfUnit1(finer)
        # A 1×1 convolution and a resize can change places; before the resize it costs a quarter.
        return _resize(self.out_conv(self.resConfUnit2(x)), size)


class Scratch(nn.Module):
    """Everything after the four levels have their sizes; named as the checkpoints name it."""

    def __init__(self, levels: Sequence[int], features: int, channels: int) -> None:
        super().__init__()
        self.layer1_rn, self.layer2_rn, self.layer3_rn, self.layer4_rn = (
            nn.Conv2d(level, features, 3, padding=1, bias=False) for level in levels
        )
        self.refinenet1 = Fusion(features, coarsest=False)
        self.refinenet2 = Fusion(features, coarsest=False)
        self.refinenet3 = Fusion(features, coarsest=False)
        self.refinenet4 = Fusion(features, coarsest=True)
        self.output_conv1 = nn.Conv2d(features, features // 2, 3, padding=1)
        self.output_conv2 = nn.Sequential(
            nn.Conv2d(features // 2, 32, 3, padding=1), nn.ReLU(), nn.Conv2d(32, channels, 1)
        )

    def forward(self, levels: Sequence[Tensor]) -> Tensor:
        """Levels of 4×, 2×, 1× and ½× the patch grid, fused from coarse to fine → 8× the grid."""
        first, second = self.layer1_rn(levels[0]), self.layer2_rn(levels[1])
        third, fourth = self.layer3_rn(levels[2]), self.layer4_rn(levels[3])
        x = self.refinenet4(fourth, None, _size(third))
        x = self.refinenet3(x, third, _size(second))
        x = self.refinenet2(x, second, _size(first))
        x = self.refinenet1(x, first, (2 * first.shape[2], 2 * first.shape[3]))
        return self.output_conv1(x)


class DenseHead(nn.Module):
    """One head; `activation` makes values of the raw channels, the last channel is the confidence."""

    def __init__(self, config: NetworkConfig, channels: int, activation: Activation) -> None:
        super().__init__()
        width, levels, features = 2 * config.width, config.dense_channels, config.dense_features
        self.patch_size, self.specials = config.patch_size, config.special_tokens
        self.activation = activation
        self.norm = LayerNorm(width)
        self.projects = nn.ModuleList(nn.Conv2d(width, level, 1) for level in levels)
        self.resize_layers = nn.ModuleList(
            [
                nn.ConvTranspose2d(levels[0], levels[0], 4, stride=4),
                nn.ConvTranspose2d(levels[1], levels[1], 2, stride=2),
                nn.Identity(),
                nn.Conv2d(levels[3], levels[3], 3, stride=2, padding=1),
            ]
        )
        self.scratch = Scratch(levels, features, channels + 1)

    def forward(self, layers: Sequence[Tensor], height: int, width: int) -> tuple[Tensor, Tensor]:
        """Four layers [B, S, P, 2C] → values [B, S, H, W, channels] and confidence [B, S, H, W], ≥ 1.

        Frames do not meet here. Without gradients they pass in slices, which bounds the memory.
        """
        batch, frames = layers[0].shape[:2]
        flat = [tokens.flatten(0, 1) for tokens in layers]
        at_once = batch * frames if torch.is_grad_enabled() else max(1, PIXELS_AT_ONCE // (height * width))
        slices = zip(*(tokens.split(at_once) for tokens in flat), strict=True)
        raw = torch.cat([self._raw(part, height, width) for part in slices]).permute(0, 2, 3, 1)
        raw = raw.unflatten(0, (batch, frames))
        return self.activation(raw[..., :-1]), confidence_activation(raw[..., -1])

    def _raw(self, layers: Sequence[Tensor], height: int, width: int) -> Tensor:
        """Layers [F, P, 2C] of F frames → raw channels [F, channels + 1, H, W]."""
        fused = _resize(self.scratch(self._levels(layers, height, width)), (height, width))
        return self.scratch.output_conv2(_add_uv(fused, height, width))

    def _levels(self, layers: Sequence[Tensor], height: int, width: int) -> list[Tensor]:
        """The patch tokens of each layer as a map of its own size, from fine to coarse."""
        rows = height // self.patch_size
        levels = []
        for tokens, project, resize in zip(layers, self.projects, self.resize_layers, strict=True):
            x = self.norm(tokens[:, self.specials :]).transpose(1, 2).unflatten(2, (rows, -1))
            levels.append(resize(_add_uv(project(x), height, width)))
        return levels


def depth_activation(raw: Tensor) -> Tensor:
    """Positive depth."""
    return raw.exp()


def point_activation(raw: Tensor) -> Tensor:
    """The inverse of a logarithm that keeps the sign."""
    return raw.sign() * raw.abs().expm1()


def confidence_activation(raw: Tensor) -> Tensor:
    """At least 1, without an upper bound."""
    return 1 + raw.exp()


def _size(x: Tensor) -> tuple[int, int]:
    return x.shape[2], x.shape[3]


def _resize(x: Tensor, size: tuple[int, int]) -> Tensor:
    return F.interpolate(x, size=size, mode="bilinear", align_corners=True)


def _add_uv(x: Tensor, height: int, width: int) -> Tensor:
    """Tell every cell where it lies in the image; x [F, C, rows, columns] is overwritten and returned."""
    rows, columns = _size(x)
    half = x.shape[1] // 2
    of_x, of_y = uv_embedding(rows, columns, x.shape[1], width / height, x.device)
    x[:, :half].add_(of_x, alpha=UV_WEIGHT)
    x[:, half:].add_(of_y, alpha=UV_WEIGHT)
    return x


@cache  # for ever: recorded passes read these tables, which are small because x and y stay apart
@torch.inference_mode(False)  # built once, used by inference and training alike
def uv_embedding(
    rows: int, columns: int, channels: int, aspect: float, device: torch.device
) -> tuple[Tensor, Tensor]:
    """Where a cell lies in the image: sines and cosines of x [channels / 2, 1, columns], for the first half
    of the channels, and of y [channels / 2, rows, 1], for the second; float32.

    aspect = image width / height; the image's half diagonal has length 1. Computed in float64.
    """
    diagonal = (aspect**2 + 1) ** 0.5
    x = _equal_spacing(columns, aspect / diagonal)
    y = _equal_spacing(rows, 1 / diagonal)
    of_x, of_y = _sines(x, channels // 2)[:, None, :], _sines(y, channels // 2)[:, :, None]
    return of_x.to(device, torch.float32), of_y.to(device, torch.float32)


def _equal_spacing(cells: int, half_extent: float) -> Tensor:
    """Centres of equal cells between −half_extent and half_extent."""
    end = half_extent * (cells - 1) / cells
    return torch.linspace(-end, end, cells, dtype=torch.float64)


def _sines(x: Tensor, channels: int) -> Tensor:
    """[channels, len(x)]: first half sines, second half cosines."""
    count = channels // 2
    frequencies = 100.0 ** (-torch.arange(count, dtype=torch.float64) / count)
    angles = frequencies[:, None] * x
    return torch.cat([angles.sin(), angles.cos()])
