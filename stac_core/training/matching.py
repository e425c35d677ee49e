"""Auxiliary matching losses: which patch of frame 0 shows the same surface, and where exactly.

Asked of descriptors of the patch encoder and of the last layer, of the attention of some global
blocks, and, as a shift in patches, of every layer that the dense heads read.

Depth and camera losses alone teach a small network nothing for thousands of steps; correspondence
is what they need first. The heads live here because only training uses them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional

from stac_core.device import send
from stac_core.geometry import invert_pose
from stac_core.training.sequences import Sequences

DESCRIPTOR = 64
SAME_SURFACE = 0.05  # relative depth difference up to which two frames see one surface
SHIFT_WEIGHT = 4.0  # beside the cross-entropies: motion shows in parts of a patch, which choices cannot tell
NOWHERE = -1  # target of a patch hidden in frame 0 or outside of it


@dataclass(frozen=True)
class PatchMatches:
    """Where the centres of the patches of frames 1..S-1 lie in frame 0."""

    patch: Tensor  # [B, S-1, N] index of the patch of frame 0, or NOWHERE
    shift: Tensor  # [B, S-1, N, 2] towards x and y in patches, from the own position; 0 where NOWHERE


@dataclass(frozen=True)
class Look:
    """What one global block attends with."""

    q: Tensor  # [B, heads, S·P, D]
    k: Tensor  # [B, heads, S·P, D]
    visible: Tensor  # [S, S] bool, which frame (row) sees which


def match_patches(sequences: Sequences, patch: int) -> PatchMatches:
    """Project the centre of each patch into frame 0 with true depth and pose."""
    height, width = sequences.depth.shape[-2:]
    rows, columns = height // patch, width // patch
    device = sequences.depth.device
    v, u = torch.meshgrid(
        torch.arange(rows, device=device) * patch + patch // 2,
        torch.arange(columns, device=device) * patch + patch // 2,
        indexing="ij",
    )
    u, v = u.flatten(), v.flatten()
    depth = sequences.depth[:, 1:, v, u]  # [B, S-1, N]
    pixel0, depth0 = _project(sequences, u, v, depth)
    inside = (pixel0 >= 0).all(-1) & (pixel0[..., 0] < width) & (pixel0[..., 1] < height)
    known = (depth > 0) & (depth0 > 1e-6)
    seen0 = _look_up(sequences.depth[:, 0], pixel0, inside)
    visible = known & inside & ((seen0 - depth0).abs() < SAME_SURFACE * depth0)
    index = (pixel0[..., 1] // patch) * columns + pixel0[..., 0] // patch
    shift = (pixel0 - torch.stack([u, v], -1)) / patch
    return PatchMatches(torch.where(visible, index, NOWHERE).long(), shift.where(visible[..., None], 0.0))


class MatchingHeads(nn.Module):
    """Descriptors of patch tokens after the encoder and after the last global block; shifts after every
    layer that the dense heads read, so that early layers learn to look across frames too."""

    def __init__(self, encoder_width: int, global_width: int, layers: int) -> None:
        super().__init__()
        self.encoder = _head(encoder_width, DESCRIPTOR)
        self.deep = _head(global_width, DESCRIPTOR)
        self.shifts = nn.ModuleList(_head(global_width, 2) for _ in range(layers))
        self.log_temperature = nn.Parameter(torch.full((2,), 10.0).log())  # of the two descriptors

    def forward(
        self,
        encoder: Tensor,
        layers: Sequence[Tensor],
        looks: Sequence[Look],
        matches: PatchMatches,
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Sum of the losses and the figures worth watching.

        encoder: [B, S, N, C] patch tokens of the encoder; layers: [B, S, N, 2C] patch tokens, last layer
        last; looks: of the global blocks whose first head learns to match.
        """
        scale = self.log_temperature.clamp(max=4.6).exp()
        early, early_hits = _cross_entropy(self.encoder(encoder), scale[0], matches)
        late, late_hits = _cross_entropy(self.deep(layers[-1]), scale[1], matches)
        attention = [_attention(look, encoder.shape[2], matches) for look in looks]
        look, look_hits = (torch.stack(values).mean() for values in zip(*attention, strict=True))
        shifts = torch.stack([head(x[:, 1:]).float() for head, x in zip(self.shifts, layers, strict=True)])
        shift_errors = _shift_errors(shifts, matches)
        figures = {
            "match_encoder": early_hits,
            "match_attention": look_hits,
            "match": late_hits,
            "shift": shift_errors[-1].detach(),
        }
        return early + late + look + SHIFT_WEIGHT * shift_errors.mean(), figures


def _head(width: int, out: int) -> nn.Sequential:
    return nn.Sequential(nn.LayerNorm(width), nn.Linear(width, out))


def _shift_errors(shifts: Tensor, matches: PatchMatches) -> Tensor:
    """Mean distance |x| + |y| in patches of shifts [layers, B, S-1, N, 2], over patches that have a match."""
    known = matches.patch != NOWHERE
    errors = (shifts - matches.shift).abs().sum(-1)
    return (errors * known).sum((1, 2, 3)) / known.sum().clamp(min=1)


def _cross_entropy(descriptors: Tensor, scale: Tensor, matches: PatchMatches) -> tuple[Tensor, Tensor]:
    unit = functional.normalize(descriptors.float(), dim=-1)
    return _choose(scale * torch.einsum("bsnd,bmd->bsnm", unit[:, 1:], unit[:, 0]), matches)


def _attention(look: Look, patches: int, matches: PatchMatches) -> tuple[Tensor, Tensor]:
    """The first head of a global block: of all patches that a frame sees, its own included, the queries of
    frames 1.. should choose their match in frame 0. The last `patches` of P tokens are patches."""
    frames = len(look.visible)
    q, k = (x[:, 0].float().unflatten(1, (frames, -1))[:, :, -patches:] for x in (look.q, look.k))
    logits = torch.einsum("bsnd,btmd->bsntm", q[:, 1:], k) * q.shape[-1] ** -0.5
    unseen = send(~look.visible[1:, None, :, None], logits.device)
    return _choose(logits.masked_fill(unseen, -torch.inf).flatten(3), matches)


def _choose(logits: Tensor, matches: PatchMatches) -> tuple[Tensor, Tensor]:
    """Cross-entropy and share of hits; logits [B, S-1, N, choices], first those of frame 0."""
    known = matches.patch != NOWHERE
    count = known.sum().clamp(min=1)
    loss = functional.cross_entropy(
        logits.flatten(0, 2), matches.patch.flatten(), ignore_index=NOWHERE, reduction="sum"
    )
    hits = ((logits.argmax(-1) == matches.patch) & known).sum() / count
    return loss / count, hits.detach()


def _project(sequences: Sequences, u: Tensor, v: Tensor, depth: Tensor) -> tuple[Tensor, Tensor]:
    """Pixels [B, S-1, N, 2] and depths [B, S-1, N] in frame 0 of pixels (u, v) of the later frames."""
    k = sequences.intrinsics[:, 1:, None]  # [B, S-1, 1, 3, 3]
    x = (u - k[..., 0, 2]) / k[..., 0, 0] * depth
    y = (v - k[..., 1, 2]) / k[..., 1, 1] * depth
    points = torch.stack([x, y, depth, torch.ones_like(depth)], -1)
    first_from_camera = invert_pose(sequences.world_from_camera[:, :1]) @ sequences.world_from_camera[:, 1:]
    points0 = (points @ first_from_camera.mT)[..., :3]
    k0 = sequences.intrinsics[:, 0, None, None]
    z = points0[..., 2].clamp(min=1e-6)
    pixel0 = torch.stack(
        [
            points0[..., 0] / z * k0[..., 0, 0] + k0[..., 0, 2],
            points0[..., 1] / z * k0[..., 1, 1] + k0[..., 1, 2],
        ],
        -1,
    )
    return pixel0, points0[..., 2]


def _look_up(depth: Tensor, pixel: Tensor, inside: Tensor) -> Tensor:
    """Nearest depth [B, S-1, N] of frame 0 at pixels that lie inside it."""
    height, width = depth.shape[-2:]
    nearest = pixel.where(inside[..., None], 0.0).round().long()
    index = nearest[..., 1].clamp(max=height - 1) * width + nearest[..., 0].clamp(max=width - 1)
    return depth.flatten(1).gather(1, index.flatten(1)).view_as(index)
