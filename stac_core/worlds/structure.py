"""What a building is made of: floors, ceiling, walls with doors; outdoors ground and far houses."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from stac_core.worlds.building import Building
from stac_core.worlds.draws import Draws
from stac_core.worlds.shapes import BOX, GONE, Shapes
from stac_core.worlds.surface import draw_surfaces

_GROUND = 400.0  # half side of the ground outdoors, m
_HOUSES = 6  # far away, around an outdoor world


def draw_structure(draws: Draws, building: Building, scale: Tensor) -> Shapes:
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
    half = torch.where(used[..., None], torch.cat([wide, thick[..., None]], -1), GONE)
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
    solid = torch.where(building.outdoor[:, None, None], GONE, torch.stack(half, 1))
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
        solid = torch.where(neighbour[..., None], torch.stack([half[k] for k in order], -1), GONE)
        parts.append((torch.stack([centre[k] for k in order], -1), solid))
    return parts


def _far_houses(draws: Draws, building: Building) -> tuple[Tensor, Tensor]:
    reach = building.size[:, :2].amax(1, keepdim=True)
    angle = (torch.arange(_HOUSES, device=reach.device) + draws.uniform(_HOUSES)) * (2 * math.pi / _HOUSES)
    distance = reach * draws.log_uniform(_HOUSES, low=1.1, high=3.0)
    half = reach[..., None] * draws.uniform(_HOUSES, 3, low=0.08, high=0.3)
    centre = torch.stack([distance * angle.cos(), distance * angle.sin(), half[..., 2]], -1)
    return centre, torch.where(building.outdoor[:, None, None], half, GONE)
