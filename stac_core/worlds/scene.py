"""All that a camera may see of a world: its shapes, its light and its sky."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from stac_core.worlds.building import Building
from stac_core.worlds.config import WorldConfig
from stac_core.worlds.draws import Draws
from stac_core.worlds.furniture import Placement
from stac_core.worlds.route import Route
from stac_core.worlds.shapes import BOX, CYLINDER, SPHERE, Shapes, join, turn
from stac_core.worlds.structure import draw_structure
from stac_core.worlds.surface import draw_surfaces, with_columns


@dataclass(frozen=True)
class Bounds:
    """Boxes around all N shapes of a scene, in the order of its sets, in world axes."""

    centre: Tensor  # [B, 3, N]
    axes: Tensor  # [B, 3, 3, N] half axes: component, axis, shape
    exists: Tensor  # [B, N] bool


@dataclass(frozen=True)
class Scene:
    """B worlds of the same make; every tensor has the batch in front."""

    shapes: tuple[Shapes, ...]
    bounds: Bounds
    outdoor: Tensor  # [B] bool
    room: Tensor  # [B, 3] size of a room; lamps hang in the middle of each
    lamp: Tensor  # [B, 3] offset of the lamp from the middle of the floor
    sun: Tensor  # [B, 3] unit vector towards the sun
    ambient: Tensor  # [B] light that comes from everywhere
    power: Tensor  # [B] light of lamp or sun
    tint: Tensor  # [B, 3] colour of the light
    sky: Tensor  # [B, 1, K] surface of the sky


def build_scene(draws: Draws, building: Building, route: Route, config: WorldConfig) -> Scene:
    """Furnish B buildings; nothing stands in the way of the route."""
    objects = config.objects_per_room * building.grid[0] * building.grid[1]
    scale = torch.where(building.outdoor, building.size[:, :2].mean(1) / 6.0, 1.0)
    place = Placement(draws, building, route, scale)
    upright = [
        draw_structure(draws, building, scale),
        place.tables(max(1, objects // 14)),
        place.pictures(max(1, objects // 6)),
        place.objects(BOX, objects * 4 // 10, turned=False),
    ]
    sets = (
        join(upright),
        place.objects(BOX, objects * 3 // 10, turned=True),
        place.objects(CYLINDER, objects * 2 // 10, turned=False),
        place.objects(SPHERE, objects // 10, turned=False),
    )
    shapes = tuple(s for s in sets if s.count)
    elevation = draws.uniform(low=0.35, high=1.2)
    azimuth = draws.uniform(high=2 * math.pi)
    flat = elevation.cos()
    return Scene(
        shapes=shapes,
        bounds=_bounds(shapes),
        outdoor=building.outdoor,
        room=building.size,
        lamp=torch.stack(
            [
                *(draws.uniform(2, low=-0.3, high=0.3) * building.size[:, :2]).unbind(1),
                building.size[:, 2] - draws.uniform(low=0.05, high=0.6),
            ],
            1,
        ),
        sun=torch.stack([flat * azimuth.cos(), flat * azimuth.sin(), elevation.sin()], 1),
        ambient=draws.uniform(low=0.35, high=0.6),
        power=draws.uniform(low=0.4, high=0.9),
        tint=1 + draws.uniform(3, low=-0.1, high=0.1),
        sky=_sky(draws),
    )


def _bounds(shapes: tuple[Shapes, ...]) -> Bounds:
    centre = [turn(s.rotation, s.centre.transpose(1, 2)) for s in shapes]
    axes = [s.rotation[..., None] * s.half.transpose(1, 2)[:, None] for s in shapes]
    exists = [s.half[..., 0] > 0 for s in shapes]
    return Bounds(torch.cat(centre, 2), torch.cat(axes, 3), torch.cat(exists, 1))


def _sky(draws: Draws) -> Tensor:
    """Cloudy: noise only, between a blue or grey and near white."""
    grey = draws.uniform(1, 1, low=0.45, high=0.8)
    blue = draws.uniform(1, 1, high=0.25) * torch.tensor([-1.0, 0.0, 1.0], device=grey.device)
    clouds = draw_surfaces(draws, 1, torch.ones_like(grey[:, 0, 0]))
    clear = torch.zeros_like(grey)
    return with_columns(
        clouds,
        first=grey + blue,
        second=draws.uniform(1, 1, low=0.7, high=1.0),
        noise=draws.uniform(1, 1, low=0.4, high=1.0),
        frequency=draws.log_uniform(1, 1, low=0.5, high=2.0),
        stretch=torch.ones_like(grey),
        **dict.fromkeys(("seam_width", "contrast", "printed"), clear),
    )
