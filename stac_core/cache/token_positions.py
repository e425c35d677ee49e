"""Where the tokens of a chunk lie in space: one point per patch, none for camera and register tokens.

Source: STAC (arXiv 2603.20284), from tokens to voxels.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

PUBLISHED_COLUMNS = 37  # patches across the images that published lengths are meant for


class View(NamedTuple):
    """What a camera sees: its pose, and how wide."""

    world_from_camera: Tensor  # [4, 4]
    reach: Tensor  # [2] half width and half height of the image at depth 1


@dataclass(frozen=True)
class TokenPositions:
    """Positions of S frames of P tokens, in world."""

    points: Tensor  # [S, P, 3]; anything where not valid
    valid: Tensor  # [S, P] bool
    camera: Tensor  # [3] the newest camera centre
    depth: float | Tensor  # of any number of pixels, whose median counts; NaN where not confident
    view: View | None = None  # of the newest camera, where known
    lost: bool = False  # the poses are not to be trusted, hence no token is valid
    coarseness: float = 1.0  # how much wider a patch is than in the published image size

    def median_depth(self) -> float:
        """Of confident pixels; NaN where there are none."""
        return self.depth if isinstance(self.depth, float) else float(self.depth.nanmedian())

    @classmethod
    def nowhere(cls, frames: int, tokens: int, device: torch.device) -> TokenPositions:
        """Tokens without a place."""
        points = torch.zeros(frames, tokens, 3, device=device)
        return cls(points, points[..., 0].bool(), points.new_full((3,), math.nan), math.nan)


def token_positions(
    points: Tensor,
    confidence: Tensor,
    depth: Tensor,
    camera: Tensor,
    *,
    patch_size: int,
    special_tokens: int,
    least_confidence: float,
    edge_test: float,
    lost_confidence: float,
    view: View | None,
) -> TokenPositions:
    """points [S, H, W, 3] in world, confidence and depth [S, H, W], camera [3] → one position per token.

    A token is placed at the middle of its patch, where the confidence exceeds `least_confidence` and the
    depth varies by less than `edge_test` of its mean within a patch of the published size (0 = no such test),
    by so much more as a patch is wider; none is where the mean confidence of all frames is below
    `lost_confidence` (0 = no such test). view: of the newest camera.
    """
    coarseness = PUBLISHED_COLUMNS * patch_size / depth.shape[-1]
    centre, certainty = patch_centres(points, patch_size), patch_centres(confidence[..., None], patch_size)
    valid = (certainty[..., 0] > least_confidence) & centre.isfinite().all(-1)
    if edge_test > 0:
        valid &= ~on_edge(depth, patch_size, edge_test * coarseness)
    lost = lost_confidence > 0 and not float(confidence.mean()) >= lost_confidence
    if lost:
        valid = torch.zeros_like(valid)
    frames = len(points)
    nowhere = centre.new_zeros(frames, special_tokens, 3)
    return TokenPositions(
        torch.cat([nowhere, centre.flatten(1, 2)], 1),
        torch.cat([nowhere[..., 0].bool(), valid.flatten(1)], 1),
        camera,
        depth.masked_fill(~(confidence > least_confidence), math.nan),
        view,
        lost,
        coarseness,
    )


def patch_centres(values: Tensor, patch_size: int) -> Tensor:
    """[S, H, W, n] → [S, h, w, n]: the centre pixel of every patch, or the mean of the four around it."""
    low, high = (patch_size - 1) // 2, patch_size // 2
    corners = [values[:, i::patch_size, j::patch_size] for i in (low, high) for j in (low, high)]
    return (corners[0] + corners[1] + corners[2] + corners[3]) / 4


def on_edge(depth: Tensor, patch_size: int, edge_test: float) -> Tensor:
    """depth [S, H, W] → patches [S, h, w] whose depth range exceeds the given share of their mean."""
    patches = depth.unflatten(2, (-1, patch_size)).unflatten(1, (-1, patch_size))
    nearest, farthest = patches.amin((2, 4)), patches.amax((2, 4))
    return ~(farthest - nearest <= edge_test * patches.mean((2, 4)))
