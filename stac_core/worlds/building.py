"""Rooms on a grid, the doors between them and the round that visits them.

World frame: z up, metres, origin on the floor in the middle of room (0, 0). Rooms of one world
share one size, so a room's middle is its grid index times that size.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from stac_core.worlds.config import WorldConfig
from stac_core.worlds.draws import Draws


@dataclass(frozen=True)
class Building:
    """Sizes of B buildings; outdoor worlds are one wide room without walls or ceiling."""

    grid: tuple[int, int]  # rooms along x and y that the tensors have places for
    rooms: Tensor  # [B, 2] rooms in use along x and y
    outdoor: Tensor  # [B] bool
    size: Tensor  # [B, 3] of one room
    wall: Tensor  # [B] thickness
    door: Tensor  # [B, 2] width, height
    door_x: Tensor  # [B, nx, ny] offset along y of the door towards (i + 1, j)
    door_y: Tensor  # [B, nx, ny] offset along x of the door towards (i, j + 1)

    @property
    def typical_depth(self) -> Tensor:
        """Depth [B] that a camera inside usually sees, in metres."""
        return self.size[:, :2].mean(1) * torch.where(self.outdoor, 0.35, 0.5)


def draw_building(draws: Draws, config: WorldConfig) -> Building:
    """Draw the floor plans of B worlds."""
    nx, ny = config.rooms_x, config.rooms_y
    outdoor = _draw_outdoor(draws, config)
    rooms = _draw_rooms(draws, config, outdoor)
    height = draws.uniform(low=2.3, high=3.4)
    inside = torch.stack([draws.log_uniform(low=3.0, high=8.0), draws.log_uniform(low=3.0, high=8.0)], 1)
    outside = draws.log_uniform(low=12.0, high=50.0)[:, None] * draws.uniform(2, low=0.8, high=1.2)
    size = torch.where(outdoor[:, None], outside, inside)
    door = torch.stack([draws.uniform(low=0.9, high=1.6), draws.uniform(low=2.0, high=2.25)], 1)
    free = 0.5 * size[:, :2] - 0.5 * door[:, :1] - 0.6  # a door keeps this far from the corners
    return Building(
        grid=(nx, ny),
        rooms=rooms,
        outdoor=outdoor,
        size=torch.cat([size, height[:, None]], 1),
        wall=draws.uniform(low=0.08, high=0.25),
        door=door,
        door_x=draws.uniform(nx, ny, low=-1, high=1) * free[:, 1, None, None],
        door_y=draws.uniform(nx, ny, low=-1, high=1) * free[:, 0, None, None],
    )


def _draw_outdoor(draws: Draws, config: WorldConfig) -> Tensor:
    share = {"mixed": 0.2, "outdoor": 1.0}.get(config.kind, 0.0)
    return draws.chance(share)


def _draw_rooms(draws: Draws, config: WorldConfig, outdoor: Tensor) -> Tensor:
    """Rooms in use [B, 2]: one, the whole grid, or (mixed) anything between, often one."""
    most = torch.tensor([config.rooms_x, config.rooms_y], device=outdoor.device)
    some = 1 + (draws.uniform(2) * most).long()
    some = torch.where(draws.chance(0.4)[:, None], torch.ones_like(some), some)
    every = most.expand_as(some)
    rooms = {"rooms": every, "room": torch.ones_like(some)}.get(config.kind, some)
    return torch.where(outdoor[:, None], torch.ones_like(rooms), rooms)


def visit_order(nx: int, ny: int, path: str) -> list[tuple[int, int]]:
    """Rooms in the order of the round; neighbours in the list are neighbours in the building.

    A loop follows the rim of the grid and closes; an exploring path meanders through every room
    once.
    """
    if path == "explore":
        return [(i, j if i % 2 == 0 else ny - 1 - j) for i in range(nx) for j in range(ny)]
    if nx == 1 or ny == 1:
        out = [(i, 0) for i in range(nx)] if ny == 1 else [(0, j) for j in range(ny)]
        return out + out[-2:0:-1]
    south = [(i, 0) for i in range(nx)]
    east = [(nx - 1, j) for j in range(1, ny)]
    north = [(i, ny - 1) for i in range(nx - 2, -1, -1)]
    west = [(0, j) for j in range(ny - 2, 0, -1)]
    return south + east + north + west


def draw_visits(building: Building, path: str) -> Tensor:
    """Room indices [B, K, 2] of the round; shorter rounds stay in a room for several places."""
    nx, ny = building.grid
    places = max(4, len(visit_order(nx, ny, path)))
    table = torch.zeros(nx, ny, places, 2, dtype=torch.int64)
    for used_x, used_y in {(int(x), int(y)) for x, y in building.rooms.tolist()}:
        order = visit_order(used_x, used_y, path)
        spread = [order[k * len(order) // places] for k in range(places)]
        table[used_x - 1, used_y - 1] = torch.tensor(spread)
    table = table.to(building.rooms.device)
    return table[building.rooms[:, 0] - 1, building.rooms[:, 1] - 1]
