"""Ground truth of a batch of sequences, in the coordinates that the network learns."""

from __future__ import annotations

from dataclasses import dataclass, fields, replace

import torch
from torch import Tensor

from stac_core.geometry import invert_pose

FARTHEST = 100.0  # times the mean distance; what lies beyond counts as sky


@dataclass(frozen=True)
class Sequences:
    """B sequences of S frames. Cameras are OpenCV optical frames, depth runs along the optical axis."""

    images: Tensor  # [B, S, 3, H, W] in [0, 1]
    depth: Tensor  # [B, S, H, W]; 0 = unknown or sky
    world_from_camera: Tensor  # [B, S, 4, 4]
    intrinsics: Tensor  # [B, S, 3, 3] of these pixels

    @property
    def valid(self) -> Tensor:
        """Pixels of known depth, [B, S, H, W]."""
        return self.depth > 0

    def to(self, device: torch.device) -> Sequences:
        """The same on another device."""
        return replace(self, **{f.name: getattr(self, f.name).to(device) for f in fields(self)})

    def frames(self, chosen: Tensor) -> Sequences:
        """The frames with the given numbers of every sequence."""
        return replace(self, **{f.name: getattr(self, f.name)[:, chosen] for f in fields(self)})

    def single(self, numbers: Tensor) -> Sequences:
        """Single frames, counted through the batch, as one sequence [1, D]; not of one scene any more."""
        flat = {f.name: getattr(self, f.name).flatten(0, 1) for f in fields(self)}
        return Sequences(**{name: value.index_select(0, numbers)[None] for name, value in flat.items()})


def normalise(sequences: Sequences) -> Sequences:
    """World = camera 0, unit = mean distance of what frame 0 sees.

    The unit comes from frame 0 alone, since a stream must settle its scale before it has seen more;
    a first frame that sees (nearly) nothing takes the mean over all frames instead.
    """
    poses = sequences.world_from_camera.double()
    world_from_camera = (invert_pose(poses[:, :1]) @ poses).float()
    unit = _mean_distance(sequences)
    world_from_camera[..., :3, 3] /= unit[:, None, None]
    depth = sequences.depth / unit[:, None, None, None]
    depth = depth.where(depth < FARTHEST, 0.0)
    return replace(sequences, depth=depth, world_from_camera=world_from_camera)


def _mean_distance(sequences: Sequences) -> Tensor:  # -> [B]
    distance = sequences.depth * _ray_length(sequences)
    known = sequences.valid.flatten(2).sum(-1)  # [B, S]
    per_frame = distance.flatten(2).sum(-1)
    enough = known[:, 0] > 0.05 * sequences.depth[0, 0].numel()
    first = per_frame[:, 0] / known[:, 0].clamp(min=1)
    everywhere = per_frame.sum(1) / known.sum(1).clamp(min=1)
    unit = torch.where(enough, first, everywhere)
    return torch.where(unit > 0, unit, torch.ones_like(unit))


def _ray_length(sequences: Sequences) -> Tensor:
    """Distance per unit of depth of every pixel, [B, S, H, W]."""
    height, width = sequences.depth.shape[-2:]
    device = sequences.depth.device
    k = sequences.intrinsics[..., None, None]
    x = (torch.arange(width, device=device) - k[..., 0, 2, :, :]) / k[..., 0, 0, :, :]
    y = (torch.arange(height, device=device)[:, None] - k[..., 1, 2, :, :]) / k[..., 1, 1, :, :]
    return (1 + x**2 + y**2).sqrt()


def join(parts: list[Sequences]) -> Sequences:
    """Stack sequences of one shape along the batch axis."""
    return Sequences(**{f.name: torch.cat([getattr(p, f.name) for p in parts]) for f in fields(Sequences)})


def choose(first: Tensor, one: Sequences, other: Sequences) -> Sequences:
    """Sequences of `one` where `first` [B] is true, of `other` elsewhere."""
    chosen = {}
    for field in fields(Sequences):
        a, b = getattr(one, field.name), getattr(other, field.name)
        chosen[field.name] = torch.where(first.view(-1, *[1] * (a.ndim - 1)), a, b)
    return Sequences(**chosen)
