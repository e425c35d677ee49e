"""What stands about in a building: tables, pictures, clutter on floors and tables."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from stac_core.worlds.building import Building
from stac_core.worlds.draws import Draws
from stac_core.worlds.path import world_from_camera_rotation
from stac_core.worlds.route import Route
from stac_core.worlds.shapes import BOX, CYLINDER, GONE, SPHERE, Shapes, turn
from stac_core.worlds.surface import draw_surfaces

CLEARANCE = 0.3  # metres between the camera's route and any object
_TRIES = 3  # places tried for an object before it is left out


class Placement:
    """Puts things where the route leaves room for them."""

    def __init__(self, draws: Draws, building: Building, route: Route, scale: Tensor) -> None:
        self.draws, self.building, self.route, self.scale = draws, building, route, scale
        self._identity = torch.eye(3, device=scale.device).expand(draws.batch, 3, 3)
        self._tables: tuple[Tensor, Tensor] | None = None

    def tables(self, count: int) -> Shapes:
        """A top and two side panels each, outdoors as well as in rooms."""
        draws, scale = self.draws, self.scale[:, None]
        half = torch.stack(
            [
                draws.uniform(count, low=0.35, high=0.9) * scale,
                draws.uniform(count, low=0.25, high=0.5) * scale,
                draws.uniform(count, low=0.015, high=0.04) * scale,
            ],
            -1,
        )
        spot, fits = self._spots(half[..., :2].norm(dim=-1))
        top = draws.uniform(count, low=0.4, high=0.95) * scale
        centre = torch.cat([spot, (top - half[..., 2])[..., None]], -1)
        panel_half = torch.stack([0.6 * half[..., 2], 0.9 * half[..., 1], 0.5 * top - half[..., 2]], -1)
        shift = torch.zeros_like(spot)
        shift[..., 0] = 0.85 * half[..., 0]
        panels = [torch.cat([spot + side * shift, panel_half[..., 2:]], -1) for side in (-1, 1)]
        self._tables = torch.cat([spot, top[..., None]], -1), torch.where(fits[..., None], half, GONE)
        halves = torch.where(fits.repeat(1, 3)[..., None], torch.cat([half, panel_half, panel_half], 1), GONE)
        return self._shapes(BOX, self._identity, torch.cat([centre, *panels], 1), halves)

    def pictures(self, count: int) -> Shapes:
        """Thin boxes on the walls; outdoors there are none."""
        draws, building = self.draws, self.building
        room = self._rooms(count)
        side = torch.where(draws.chance(0.5, count), 1.0, -1.0)
        on_x = draws.chance(0.5, count)  # hangs on a wall across the x axis
        wide, high = draws.log_uniform(count, low=0.12, high=0.9), draws.log_uniform(count, low=0.1, high=0.6)
        thin = draws.uniform(count, low=0.004, high=0.02)
        inset = 0.5 * building.size[:, None, :2] - 0.5 * building.wall[:, None, None]
        along = draws.uniform(count, 2, low=-1, high=1) * (inset - wide[..., None]).clamp(min=0)
        x = torch.where(on_x, side * inset[..., 0], along[..., 0])
        y = torch.where(on_x, along[..., 1], side * inset[..., 1])
        z = draws.uniform(count, low=0.9, high=2.0)
        centre = torch.cat([room + torch.stack([x, y], -1), z[..., None]], -1)
        half = torch.stack([torch.where(on_x, thin, wide), torch.where(on_x, wide, thin), high], -1)
        fits = self._is_clear(centre[..., :2], wide) & ~building.outdoor[:, None]
        return self._shapes(BOX, self._identity, centre, torch.where(fits[..., None], half, GONE))

    def objects(self, kind: int, count: int, turned: bool) -> Shapes:
        """Things on the floor, small ones often on a table."""
        draws = self.draws
        size = draws.log_uniform(count, 1, low=0.06, high=0.5)
        half = size * draws.log_uniform(count, 3, low=0.5, high=2.0)
        if kind == CYLINDER:
            half = torch.stack([half[..., 0], half[..., 0], 1.5 * half[..., 2]], -1)
        if kind == SPHERE:
            half = half[..., :1].expand_as(half)
        half = half * self.scale[:, None, None]
        tall = self.building.size[:, 2, None, None]
        half = torch.minimum(half, torch.where(self.building.outdoor[:, None, None], math.inf, 0.45 * tall))
        spot, fits = self._spots(half[..., :2].norm(dim=-1))
        centre = torch.cat([spot, half[..., 2:]], -1)
        centre, half = self._lift(centre, torch.where(fits[..., None], half, GONE))
        rotation = self._yaw() if turned else self._identity
        local = turn(rotation.transpose(1, 2), centre.transpose(1, 2)).transpose(1, 2)
        return self._shapes(kind, rotation, local, half)

    def _lift(self, centre: Tensor, half: Tensor) -> tuple[Tensor, Tensor]:
        """Move about half of the small things onto tables."""
        assert self._tables is not None
        spot, table = self._tables
        count = centre.shape[1]
        which = (self.draws.uniform(count) * spot.shape[1]).long()[..., None].expand(-1, -1, 3)
        spot, table = spot.gather(1, which), table.gather(1, which)
        offset = self.draws.uniform(count, 2, low=-0.8, high=0.8) * table[..., :2]
        raised = torch.cat([spot[..., :2] + offset, spot[..., 2:] + half[..., 2:]], -1)
        small = half.amax(-1) < 0.22 * self.scale[:, None]
        move = small & (table[..., 0] > 0) & self.draws.chance(0.6, count)
        return torch.where(move[..., None], raised, centre), half

    def _shapes(self, kind: int, rotation: Tensor, centre: Tensor, half: Tensor) -> Shapes:
        return Shapes(kind, rotation, centre, half, draw_surfaces(self.draws, centre.shape[1], self.scale))

    def _yaw(self) -> Tensor:
        """Rotation [B, 3, 3] about the vertical."""
        angle = self.draws.uniform(low=0.15, high=1.4)
        zero = torch.zeros_like(angle)
        frame = world_from_camera_rotation(angle, zero, zero)  # columns: right, down, forward
        return torch.stack([frame[..., 2], -frame[..., 0], -frame[..., 1]], -1)

    def _rooms(self, count: int) -> Tensor:
        """Middles [B, count, 2] of rooms in use, drawn at random."""
        index = (self.draws.uniform(count, 2) * self.building.rooms[:, None]).long()
        return index * self.building.size[:, None, :2]

    def _spots(self, radius: Tensor) -> tuple[Tensor, Tensor]:
        """Places [B, count, 2] on the floors for things of a radius [B, count], and whether one was found."""
        count = radius.shape[1]
        room = self._rooms(count)
        free = (0.5 * self.building.size[:, None, :2] - self.building.wall[:, None, None]).expand_as(room)
        free = (free - 0.7 * radius[..., None]).clamp(min=0)
        spot = torch.zeros_like(room)
        found = torch.zeros_like(radius, dtype=torch.bool)
        for _ in range(_TRIES):
            trial = room + self.draws.uniform(count, 2, low=-1, high=1) * free
            clear = self._is_clear(trial, radius)
            spot = torch.where((clear & ~found)[..., None], trial, spot)
            found |= clear
        return spot, found

    def _is_clear(self, spot: Tensor, radius: Tensor) -> Tensor:
        nearest = torch.cdist(spot.double(), self.route.line).amin(-1)
        return nearest > radius + CLEARANCE
