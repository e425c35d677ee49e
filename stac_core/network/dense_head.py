"""Tokens of four layers → a value and a confidence per pixel: DPT (arXiv 2103.13413) as VGGT uses it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import cache

import torch
from torch import Tensor, nn

from stac_core.config import NetworkConfig
from stac_core.network.blocks import LayerNorm
from stac_core.network.maps import Maps, TorchMaps, Uv

PIXELS_AT_ONCE = 1 << 20  # without gradients, frames go through in slices of about so many pixels
Activation = Callable[[Tensor], Tensor]


class ResidualUnit(nn.Module):
    """Two convolutions around a skip. The skip adds relu(x), not x: the weights were trained that way."""

    def __init__(self, features: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(features, features, 3, padding=1)
        self.conv2 = nn.Conv2d(features, features, 3, padding=1)

    def forward(self, maps: Maps, rectified: Tensor, *added: Tensor, rectify: bool = False) -> Tensor:
        """relu(x) → the unit's result + added, rectified for a unit that follows."""
        inside = maps.convolve(self.conv1, rectified, rectify=True)
        return maps.convolve(self.conv2, inside, rectified, *added, rectify=rectify)


class Fusion(nn.Module):
    """Add a finer level to the coarser result and enlarge; the coarsest level comes alone."""

    def __init__(self, features: int, coarsest: bool) -> None:
        super().__init__()
        self.resConfUnit1 = None if coarsest else ResidualUnit(features)
        self.resConfUnit2 = ResidualUnit(features)
        self.out_conv = nn.Conv2d(features, features, 1)

    def forward(self, maps: Maps, size: tuple[int, int], level: Tensor, *coarser: Tensor) -> Tensor:
        """The level comes rectified."""
        if self.resConfUnit1 is not None:
            level = self.resConfUnit1(maps, level, *coarser, rectify=True)
        # A 1×1 convolution and a resize can change places; before the resize it costs a quarter.
        small = maps.begin(self.out_conv, self.resConfUnit2(maps, level))
        return maps.enlarge(self.out_conv, small, size)


class Output(nn.Sequential):
    """Features per pixel → raw channels."""

    def __init__(self, features: int, hidden: int, channels: int) -> None:
        super().__init__(nn.Conv2d(features, hidden, 3, padding=1), nn.ReLU(), nn.Conv2d(hidden, channels, 1))

    def forward(self, maps: Maps, x: Tensor) -> Tensor:  # type: ignore[override]
        first, _, last = self
        return maps.convolve(last, maps.convolve(first, x, rectify=True))


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
        self.output_conv2 = Output(features // 2, 32, channels)

    def forward(self, maps: Maps, levels: Iterable[Tensor], pixels: Uv) -> Tensor:
        """Levels of 4×, 2×, 1× and ½× the patch grid → raw channels per pixel."""
        narrow = (self.layer1_rn, self.layer2_rn, self.layer3_rn, self.layer4_rn)
        narrowed = (maps.convolve(*pair, rectify=True) for pair in zip(narrow, levels, strict=True))
        x = maps.begin(self.output_conv1, self._fuse(maps, *narrowed))
        x = maps.enlarge(self.output_conv1, x, pixels.cells, pixels)
        return self.output_conv2(maps, x)

    def _fuse(self, maps: Maps, first: Tensor, second: Tensor, third: Tensor, fourth: Tensor) -> Tensor:
        """From coarse to fine → 8× the patch grid."""
        x = self.refinenet4(maps, _size(third), fourth)
        x = self.refinenet3(maps, _size(second), third, x)
        x = self.refinenet2(maps, _size(first), second, x)
        return self.refinenet1(maps, (2 * first.shape[2], 2 * first.shape[3]), first, x)


class DenseHead(nn.Module):
    """One head; `activation` makes values of the raw channels, the last channel is the confidence."""

    def __init__(self, config: NetworkConfig, channels: int, activation: Activation) -> None:
        super().__init__()
        width, levels, features = 2 * config.width, config.dense_channels, config.dense_features
        self.patch_size, self.specials = config.patch_size, config.special_tokens
        self.activation = activation
        self.maps: Maps = TorchMaps()  # without gradients
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
        tables = self._tables(height, width, layers[0].device)
        at_once = batch * frames if torch.is_grad_enabled() else max(1, PIXELS_AT_ONCE // (height * width))
        slices = zip(*(tokens.split(at_once) for tokens in flat), strict=True)
        raw = torch.cat([self._raw(part, tables) for part in slices]).permute(0, 2, 3, 1)
        raw = raw.unflatten(0, (batch, frames))
        return self.activation(raw[..., :-1]), confidence_activation(raw[..., -1])

    def use(self, maps: Maps, order: torch.memory_format) -> None:
        """Without gradients, run on these maps, with weights in the order of memory that suits them."""
        self.maps = maps
        for parameter in self.parameters():
            if parameter.ndim == 4:
                parameter.data = parameter.data.contiguous(memory_format=order)

    def _raw(self, layers: Sequence[Tensor], tables: Sequence[Uv]) -> Tensor:
        """Layers [F, P, 2C] of F frames → raw channels [F, channels + 1, H, W]."""
        maps = TorchMaps() if torch.is_grad_enabled() else self.maps
        *of_levels, of_pixels = tables
        return self.scratch(maps, self._levels(maps, layers, of_levels), of_pixels)

    def _levels(self, maps: Maps, layers: Sequence[Tensor], tables: Sequence[Uv]) -> Iterator[Tensor]:
        """The patch tokens of each layer as a map of its own size, from fine to coarse, one at a time."""
        for tokens, uv, project, resize in zip(
            layers, tables, self.projects, self.resize_layers, strict=True
        ):
            x = maps.normalise(self.norm, tokens[:, self.specials :])
            x = maps.convolve(project, x.transpose(1, 2).unflatten(2, uv.cells), uv=uv)
            yield resize(x) if isinstance(resize, nn.Identity) else maps.convolve(resize, x)

    def _tables(self, height: int, width: int, device: torch.device) -> list[Uv]:
        """Of the patches in each of the four layers, and of the pixels."""
        rows, columns, aspect = height // self.patch_size, width // self.patch_size, width / height
        of_levels = [
            uv_embedding(rows, columns, project.out_channels, aspect, device) for project in self.projects
        ]
        channels = self.scratch.output_conv1.out_channels
        return [*of_levels, uv_embedding(height, width, channels, aspect, device)]


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


@cache  # for ever: recorded passes read these tables, which are small because x and y stay apart
@torch.inference_mode(False)  # built once, used by inference and training alike
def uv_embedding(rows: int, columns: int, channels: int, aspect: float, device: torch.device) -> Uv:
    """Where a cell lies in the image: sines and cosines of x and y, float32, channels-last in memory.

    aspect = image width / height; the image's half diagonal has length 1. Computed in float64.
    """
    diagonal = (aspect**2 + 1) ** 0.5
    x = _equal_spacing(columns, aspect / diagonal)
    y = _equal_spacing(rows, 1 / diagonal)
    of_x, of_y = (_sines(at, channels // 2).to(device, torch.float32).T for at in (x, y))
    return Uv(of_x[:, None, :], of_y[:, :, None])


def _equal_spacing(cells: int, half_extent: float) -> Tensor:
    """Centres of equal cells between −half_extent and half_extent."""
    end = half_extent * (cells - 1) / cells
    return torch.linspace(-end, end, cells, dtype=torch.float64)


def _sines(x: Tensor, channels: int) -> Tensor:
    """[len(x), channels]: first half sines, second half cosines."""
    count = channels // 2
    frequencies = 100.0 ** (-torch.arange(count, dtype=torch.float64) / count)
    angles = x[:, None] * frequencies
    return torch.cat([angles.sin(), angles.cos()], 1)
