"""What stands in a world: walls, furniture, clutter, pictures, far buildings; and its light."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from stac_core.worlds.building import Building
from stac_core.worlds.config import WorldConfig
from stac_core.worlds.draws import Draws
from stac_core.worlds.path import world_from_camera_rotation
from stac_core.worlds.route import Route
from stac_core.worlds.shapes import BOX, CYLINDER, SPHERE, Shapes, join, turn
from stac_core.worlds.surface import draw_surfaces, with_columns

CLEARANCE = 0.3  # metres between the camera's route and any object
_GROUND = 400.0  # half side of the ground outdoors, m
_TRIES = 3  # places tried for an object before it is left out
_GONE = -1.0  # half size of a shape that does not exist


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
    """Furnish B buildings; nothing stands within `CLEARANCE` of the route."""
    objects = config.objects_per_room * building.grid[0] * building.grid[1]
    scale = torch.where(building.outdoor, building.size[:, :2].mean(1) / 6.0, 1.0)
    place = _Placement(draws, building, route, scale)
    upright = [
        _structure(draws, building, scale),
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


def _structure(draws: Draws, building: Building, scale: Tensor) -> Shapes:
    """Floors, ceiling, outer and inner walls, and the far houses of outdoor worlds."""
    parts = [_floors(building), _shell(building), _far_houses(draws, building)]
    surfaces = [draw_surfaces(draws, centre.shape[1], scale) for centre, _ in parts]
    for axis in (0, 1):
        pieces = _inner_walls(building, axis)
        paint = draw_surfaces(draws, pieces[0][0].shape[1], scale)
        parts += pieces
        surfaces += [paint] * len(pieces)  # the pieces of one wall look alike
    centre = torch.cat([centre for centre, _ in parts], 1)
    half = torch.cat([half for _, half in parts], 1)
    identity = torch.eye(3, device=centre.device).expand(draws.batch, 3, 3)
    return Shapes(BOX, identity, centre, half, torch.cat(surfaces, 1))


def _grid(building: Building) -> tuple[Tensor, Tensor, Tensor]:
    """Indices [R] of all places for rooms and which are in use [B, R]."""
    nx, ny = building.grid
    device = building.size.device
    i, j = torch.arange(nx, device=device), torch.arange(ny, device=device)
    i, j = i.repeat_interleave(ny), j.repeat(nx)
    used = (i < building.rooms[:, :1]) & (j < building.rooms[:, 1:])
    return i, j, used


def _floors(building: Building) -> tuple[Tensor, Tensor]:
    i, j, used = _grid(building)
    x, y = i * building.size[:, :1], j * building.size[:, 1:2]
    thick = torch.full_like(x, 0.1)
    wide = torch.where(building.outdoor[:, None, None], _GROUND, 0.5 * building.size[:, None, :2])
    wide = wide.expand(-1, x.shape[1], -1)
    half = torch.where(used[..., None], torch.cat([wide, thick[..., None]], -1), _GONE)
    return torch.stack([x, y, -thick], -1), half


def _shell(building: Building) -> tuple[Tensor, Tensor]:
    """Ceiling and four outer walls."""
    extent = 0.5 * building.rooms * building.size[:, :2]  # half
    middle = extent - 0.5 * building.size[:, :2]
    thick = 0.5 * building.wall
    height = 0.5 * building.size[:, 2]
    (ex, ey), (mx, my) = extent.unbind(1), middle.unbind(1)
    centre = [
        torch.stack([mx, my, 2 * height + 0.1], -1),
        *(torch.stack([mx + side * ex, my, height], -1) for side in (-1, 1)),
        *(torch.stack([mx, my + side * ey, height], -1) for side in (-1, 1)),
    ]
    half = [
        torch.stack([ex, ey, torch.full_like(ex, 0.1)], -1),
        *[torch.stack([thick, ey + thick, height], -1)] * 2,
        *[torch.stack([ex + thick, thick, height], -1)] * 2,
    ]
    solid = torch.where(building.outdoor[:, None, None], _GONE, torch.stack(half, 1))
    return torch.stack(centre, 1), solid


def _inner_walls(building: Building, axis: int) -> list[tuple[Tensor, Tensor]]:
    """Walls between neighbours along one axis: before the door, behind it, and above it."""
    i, j, used = _grid(building)
    index, other, offset = (i, j, building.door_x) if axis == 0 else (j, i, building.door_y)
    neighbour = used & (index + 1 < building.rooms[:, axis, None])
    across, along = building.size[:, axis, None], building.size[:, 1 - axis, None]
    middle = other * along
    door = middle + offset.flatten(1)
    width, top = 0.5 * building.door[:, :1], building.door[:, 1:]
    before = middle - 0.5 * along, door - width, torch.zeros_like(door)
    behind = door + width, middle + 0.5 * along, torch.zeros_like(door)
    above = door - width, door + width, top.expand_as(door)
    thick = (0.5 * building.wall[:, None]).expand_as(door)
    parts = []
    for start, end, bottom in (before, behind, above):
        rise = 0.5 * (building.size[:, 2:] - bottom)
        centre = [(index + 0.5) * across, 0.5 * (start + end), bottom + rise]
        half = [thick, 0.5 * (end - start), rise]
        order = (0, 1, 2) if axis == 0 else (1, 0, 2)
        solid = torch.where(neighbour[..., None], torch.stack([half[k] for k in order], -1), _GONE)
        parts.append((torch.stack([centre[k] for k in order], -1), solid))
    return parts


def _far_houses(draws: Draws, building: Building, count: int = 6) -> tuple[Tensor, Tensor]:
    reach = building.size[:, :2].amax(1, keepdim=True)
    angle = (torch.arange(count, device=reach.device) + draws.uniform(count)) * (2 * math.pi / count)
    distance = reach * draws.log_uniform(count, low=1.1, high=3.0)
    half = reach[..., None] * draws.uniform(count, 3, low=0.08, high=0.3)
    centre = torch.stack([distance * angle.cos(), distance * angle.sin(), half[..., 2]], -1)
    return centre, torch.where(building.outdoor[:, None, None], half, _GONE)


class _Placement:
    """Puts things where the route leaves room for them."""

    def __init__(self, draws: Draws, building: Building, route: Route, scale: Tensor) -> None:
        self.draws, self.building, self.route, self.scale = draws, building, route, scale
        self._identity = torch.eye(3, device=scale.device).expand(draws.batch, 3, 3)
        self._tables: tuple[Tensor, Tensor] | None = None

    def tables(self, count: int) -> Shapes:
        """A top and two side panels each; single rooms outdoors and in get them too."""
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
        self._tables = torch.cat([spot, top[..., None]], -1), torch.where(fits[..., None], half, _GONE)
        halves = torch.where(
            fits.repeat(1, 3)[..., None], torch.cat([half, panel_half, panel_half], 1), _GONE
        )
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
        return self._shapes(BOX, self._identity, centre, torch.where(fits[..., None], half, _GONE))

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
        centre, half = self._lift(centre, torch.where(fits[..., None], half, _GONE))
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
