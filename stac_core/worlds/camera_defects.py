"""What a real camera adds: drifting exposure and white balance, blur, noise, JPEG blocks.

All of it is drawn once per world and is a formula of the frame number, so any frame can be made
alone. The pixel noise comes from a fixed table read at a hashed offset: as random as needed, cheap,
and the same on every device.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor

from stac_core.worlds.draws import Draws, mix

_NOISE_TABLE = 1 << 20  # numbers, at least
_MASK = (1 << 62) - 1
_KERNEL = 5  # pixels


@dataclass(frozen=True)
class Defects:
    """Defects of B cameras; every strength is 0 for a perfect one."""

    seeds: Tensor  # [B]
    exposure: Tensor  # [B, 3] log gain, drift amplitude, frames per drift
    balance: Tensor  # [B, 3] amplitude of each colour's drift
    phase: Tensor  # [B, 4] of exposure and of the three colours
    vignette: Tensor  # [B] darkening at the corners
    banding: Tensor  # [B, 3] amplitude, bands per image, bands moved per frame
    noise: Tensor  # [B] standard deviation
    defocus: Tensor  # [B] standard deviation, pixels
    shake: Tensor  # [B, 2] motion blur: standard deviation (pixels), direction (rad)
    jpeg: Tensor  # [B] quantisation step of the lowest frequencies, 0 = none


def draw_defects(draws: Draws, strength: float) -> Defects:
    """Draw the cameras of B worlds; about a third of the values of each defect are zero."""

    def some(low: float, high: float) -> Tensor:
        return strength * draws.uniform(low=low, high=high) * draws.chance(0.65)

    return Defects(
        seeds=draws.seeds,
        exposure=torch.stack([some(-0.35, 0.35), some(0.0, 0.25), draws.uniform(low=15.0, high=120.0)], 1),
        balance=strength * draws.uniform(3, high=0.06) * draws.chance(0.65, 1),
        phase=draws.uniform(4, high=2 * math.pi),
        vignette=some(0.0, 0.5),
        banding=torch.stack([some(0.0, 0.04), draws.uniform(low=0.5, high=4.0), draws.uniform()], 1),
        noise=some(0.0, 0.035),
        defocus=some(0.0, 0.8),
        shake=torch.stack([some(0.0, 1.2), draws.uniform(high=math.pi)], 1),
        jpeg=some(0.0, 0.09),
    )


def apply_defects(defects: Defects, images: Tensor, frames: Tensor) -> Tensor:
    """What the cameras deliver: images [B, S, 3, H, W] in [0, 1] with frame numbers [S] -> the same shape."""
    seen = _blur(defects, images, frames)
    seen = seen * _gain(defects, images, frames)
    seen = seen + defects.noise.view(-1, 1, 1, 1, 1) * _noise(defects, images, frames)
    return _jpeg(defects, seen.clamp_(0, 1)).clamp_(0, 1)


def _blur(defects: Defects, images: Tensor, frames: Tensor) -> Tensor:
    """Gaussian out-of-focus blur stretched along the shake, whose strength comes and goes."""
    height, width = images.shape[-2:]
    sway = 0.5 + 0.5 * torch.sin(0.9 * frames.float()[None] + defects.phase[:, :1])
    along = defects.shake[:, :1] * sway  # [B, S]
    cos, sin = defects.shake[:, 1:].cos(), defects.shake[:, 1:].sin()
    spread = defects.defocus[:, None].square() + 0.02  # a perfect pixel: weight of neighbours ~ e^-25
    xx, yy, xy = spread + along**2 * cos**2, spread + along**2 * sin**2, along**2 * cos * sin
    det = xx * yy - xy**2
    offset = torch.arange(_KERNEL, device=images.device) - _KERNEL // 2
    x, y = offset[None, :].float(), offset[:, None].float()

    def grid(value: Tensor) -> Tensor:
        return value[..., None, None]

    exponent = grid(yy / det) * x**2 - 2 * grid(xy / det) * x * y + grid(xx / det) * y**2
    kernel = torch.exp(-0.5 * exponent)
    kernel = kernel / kernel.sum((-2, -1), keepdim=True)
    weights = kernel.view(-1, 1, 1, _KERNEL, _KERNEL).expand(-1, 3, -1, -1, -1).flatten(0, 1)
    border = [_KERNEL // 2] * 4
    flat = F.pad(images.reshape(1, -1, height, width), border, mode="replicate")
    return F.conv2d(flat, weights, groups=weights.shape[0]).view(images.shape)


def _gain(defects: Defects, images: Tensor, frames: Tensor) -> Tensor:
    """Product of exposure, white balance, vignetting and row banding [B, S, 3, H, W]."""
    height, width = images.shape[-2:]
    level, swing, period = defects.exposure.T[..., None]
    turn = 2 * math.pi * frames.float() / period  # [B, S]
    exposure = torch.exp(level + swing * torch.sin(turn + defects.phase[:, :1]))
    drift = torch.sin(0.7 * turn[..., None] + defects.phase[:, None, 1:])
    colour = exposure[..., None] * (1 + defects.balance[:, None] * drift)  # [B, S, 3]
    y = torch.linspace(-1, 1, height, device=images.device)
    x = torch.linspace(-1, 1, width, device=images.device)
    radius = 0.5 * (x.square() + y.square()[:, None])
    vignette = 1 - defects.vignette[:, None, None] * radius.square()  # [B, H, W]
    amplitude, bands, speed = defects.banding.T[..., None, None]
    wave = 0.5 * bands * y + speed * frames[:, None]  # [B, S, H]
    band = 1 + amplitude * torch.sin(2 * math.pi * wave)
    return colour[..., None, None] * (vignette[:, None] * band[..., None])[:, :, None]


def _noise(defects: Defects, images: Tensor, frames: Tensor) -> Tensor:
    """Standard normal noise in the shape of the images: a stretch of a table, its start hashed."""
    count = images[0, 0].numel()
    table = _noise_table(images.device, max(_NOISE_TABLE, 4 * count))
    start = (mix(defects.seeds[:, None] + frames) & _MASK) % (len(table) - count)  # [B, S]
    index = start[..., None] + torch.arange(count, device=images.device)
    return table.index_select(0, index.flatten()).view(images.shape)


@lru_cache(maxsize=8)
def _noise_table(device: torch.device, size: int) -> Tensor:
    uniform = Draws(mix(torch.full((1,), 2, dtype=torch.int64))).uniform(2, size)[0]
    radius = (-2 * torch.log(uniform[0].clamp(min=1e-7))).sqrt()
    return (radius * torch.cos(2 * math.pi * uniform[1])).to(device)


def _jpeg(defects: Defects, images: Tensor) -> Tensor:
    """Quantise the cosine transform of 8×8 blocks, colour coarser than brightness."""
    count, _, height, width = images.shape[1:]
    to_ycc = _luma_chroma(images.device)
    ycc = torch.einsum("ij,bsjhw->bsihw", to_ycc, images)
    padded = F.pad(ycc.flatten(0, 1), [0, -width % 8, 0, -height % 8], mode="replicate")
    rows, columns = padded.shape[-2] // 8, padded.shape[-1] // 8
    blocks = padded.view(-1, 3, rows, 8, columns, 8).transpose(3, 4)  # [F, 3, rows, columns, 8, 8]
    basis = _cosines(images.device)
    spectrum = basis @ blocks @ basis.T
    step = _steps(images.device) * defects.jpeg.repeat_interleave(count).view(-1, 1, 1, 1, 1, 1)
    step = step.clamp(min=1e-6)
    spectrum = (spectrum / step).round_() * step
    blocks = basis.T @ spectrum @ basis
    padded = blocks.transpose(3, 4).reshape(padded.shape)
    restored = padded[..., :height, :width].view(images.shape)
    return torch.einsum("ij,bsjhw->bsihw", torch.linalg.inv(to_ycc), restored)


@lru_cache(maxsize=8)
def _luma_chroma(device: torch.device) -> Tensor:
    """BT.601 full-range brightness and colour differences."""
    rows = [[0.299, 0.587, 0.114], [-0.168736, -0.331264, 0.5], [0.5, -0.418688, -0.081312]]
    return torch.tensor(rows, device=device)


@lru_cache(maxsize=8)
def _cosines(device: torch.device) -> Tensor:
    """Orthonormal DCT-II matrix [8, 8]."""
    k = torch.arange(8, device=device)[:, None].float()
    basis = torch.cos(math.pi / 8 * (k.T + 0.5) * k) * 0.5
    basis[0] *= 0.5**0.5
    return basis


@lru_cache(maxsize=8)
def _steps(device: torch.device) -> Tensor:
    """Relative quantisation steps [3, 1, 1, 8, 8]: coarser with frequency, and for colour."""
    k = torch.arange(8, device=device)
    luma = 1 + 0.8 * (k[:, None] + k)
    return torch.stack([luma, 2 * luma, 2 * luma])[:, None, None].float()
