"""Where the tokens of a chunk lie in space: one point per patch, none for camera and register tokens.

Source: STAC (arXiv 2603.20284), from tokens to voxels.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import torch
import torch.nn.functional as F
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
    depth: float | Callable[[], float]  # median of confident pixels, NaN without any; asked for but once
    view: View | None = None  # of the newest camera, where known
    lost: bool = False  # the poses are not to be trusted, hence no token is valid
    coarseness: float = 1.0  # how much wider a patch is than in the published image size

    def median_depth(self) -> float:
        """Of confident pixels; NaN where there are none. Waits for the device."""
        return self.depth if isinstance(self.depth, float) else self.depth()

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
    centre = patch_centres(torch.cat([points, confidence[..., None]], -1), patch_size).flatten(1, 2)
    centre = F.pad(centre, (0, 0, special_tokens, 0), value=math.nan)
    place, certainty = centre[..., :3], centre[..., 3]
    valid = (certainty > least_confidence) & (torch.linalg.vector_norm(place, math.inf, -1) < math.inf)
    if edge_test > 0:
        valid[:, special_tokens:].logical_and_(~on_edge(depth, patch_size, edge_test * coarseness).flatten(1))
    lost = lost_confidence > 0 and not float(confidence.mean()) >= lost_confidence
    return TokenPositions(
        place,
        torch.zeros_like(valid) if lost else valid,
        camera,
        partial(_median_depth, depth, confidence, least_confidence),
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


def _median_depth(depth: Tensor, confidence: Tensor, least_confidence: float) -> float:
    return float(depth[confidence > least_confidence].nanmedian())
