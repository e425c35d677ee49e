"""The curve a camera follows through a building: a smooth spline through rooms and doors.

A uniform quadratic B-spline stays in the hull of three neighbouring control points and touches
the middle of every leg. Two control points before and behind a door therefore carry it straight
through the opening, and points inside a convex room keep it inside.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from stac_core.worlds.building import Building, draw_visits
from stac_core.worlds.draws import Draws

_PER_VISIT = 4  # control points: behind the door, two inside, before the next door
_SAMPLES = 12  # per spline segment, for lengths and clearances


@dataclass(frozen=True)
class Route:
    """B splines on the ground plane, measured by their length."""

    control: Tensor  # [B, K, 2]
    closed: bool
    distance: Tensor  # [B, Q] metres from the start at the samples of `line`
    line: Tensor  # [B, Q, 2] dense samples; a closed route repeats its first one at the end

    @property
    def length(self) -> Tensor:
        """Metres [B]; of one lap where the route is closed."""
        return self.distance[:, -1]

    def at(self, distance: Tensor) -> Tensor:
        """Positions [B, S, 2] after `distance` [B, S] metres.

        A closed route goes round for ever; an open one ends where it ends.
        """
        length = self.length[:, None]
        along = distance.remainder(length) if self.closed else distance.clamp(min=0).minimum(length)
        index = torch.searchsorted(self.distance, along.contiguous(), right=True)
        index = index.clamp(1, self.distance.shape[1] - 1)
        before, after = self.distance.gather(1, index - 1), self.distance.gather(1, index)
        part = (along - before) / (after - before).clamp(min=1e-9)
        return _evaluate(self.control, self.closed, (index - 1 + part) / _SAMPLES)

    def heading(self, distance: Tensor, ahead: Tensor) -> Tensor:
        """Yaw [B, S] towards the point `ahead` [B] metres further along; it turns softly at corners."""
        ahead = ahead[:, None]
        if not self.closed:
            distance = distance.minimum(self.length[:, None] - ahead)
        way = self.at(distance + ahead) - self.at(distance)
        return torch.atan2(way[..., 1], way[..., 0])


def draw_route(draws: Draws, building: Building, path: str) -> Route:
    """Lay a route through B buildings."""
    closed = path == "loop"
    control = _draw_control(draws, building, draw_visits(building, path), closed).double()
    segments = control.shape[1] if closed else control.shape[1] - 2
    parameter = torch.arange(segments * _SAMPLES + 1, device=control.device, dtype=torch.float64) / _SAMPLES
    line = _evaluate(control, closed, parameter.expand(control.shape[0], -1))
    legs = (line[:, 1:] - line[:, :-1]).norm(dim=-1)
    distance = torch.nn.functional.pad(legs.cumsum(1), (1, 0))
    return Route(control, closed, distance, line)


def _evaluate(control: Tensor, closed: bool, parameter: Tensor) -> Tensor:
    """Positions [B, S, 2] at spline parameters [B, S]."""
    count = control.shape[1]
    segment = parameter.floor().long().clamp(max=(count if closed else count - 2) - 1)
    u = (parameter - segment)[..., None]

    def point(offset: int) -> Tensor:
        index = (segment + offset).remainder(count)
        return control.gather(1, index[..., None].expand(-1, -1, 2))

    a, b, c = point(0), point(1), point(2)
    return 0.5 * ((1 - u) ** 2 * a + (1 + 2 * u - 2 * u**2) * b + u**2 * c)


def _draw_control(draws: Draws, building: Building, visits: Tensor, closed: bool) -> Tensor:
    """Control points [B, 4K, 2]: a round inside each room, a straight line through each door."""
    size = building.size[:, None, None, :2]
    inside = visits[:, :, None] * size + _round_inside(draws, visits.shape[1], size)
    there, door = _doors(building, visits)  # towards the next visit
    toward = (visits.roll(-1, 1) - visits).float()[:, :, None]
    leave = torch.where(there[:, :, None, None], door[:, :, None] - 0.5 * toward, inside[:, :, 3:])
    enter = torch.where(
        there[:, :, None, None], door[:, :, None] + 0.5 * toward, inside[:, :, :1].roll(-1, 1)
    )
    control = torch.cat([enter.roll(1, 1), inside[:, :, 1:3], leave], 2)
    if not closed:  # the wrap-around leg does not exist: start and end inside
        control[:, 0, 0], control[:, -1, -1] = inside[:, 0, 0], inside[:, -1, 3]
    return control.flatten(1, 2)


def _round_inside(draws: Draws, visits: int, size: Tensor) -> Tensor:
    """Offsets from the middle of the room [B, K, 4, 2] that go round an uneven ellipse."""
    steps = visits * _PER_VISIT
    turn = torch.where(draws.chance(0.5, 1), 1.0, -1.0) * torch.arange(steps, device=size.device) / steps
    angle = 2 * math.pi * (turn + draws.uniform(1))
    radius = draws.uniform(1, low=0.14, high=0.34) * draws.uniform(steps, low=0.8, high=1.15)
    offset = radius[..., None] * torch.stack([angle.cos(), angle.sin()], -1)
    return offset.view(-1, visits, _PER_VISIT, 2) * size


def _doors(building: Building, visits: Tensor) -> tuple[Tensor, Tensor]:
    """Whether a door leads to the next visit [B, K], and its middle [B, K, 2]."""
    following = visits.roll(-1, 1)
    step = following - visits
    low = torch.minimum(visits, following)  # the door belongs to the lower room
    batch = torch.arange(visits.shape[0], device=visits.device)[:, None]
    offset_y = building.door_x[batch, low[..., 0], low[..., 1]]
    offset_x = building.door_y[batch, low[..., 0], low[..., 1]]
    along_x = step[..., 0].abs() == 1
    offset = torch.stack([torch.where(along_x, 0.0, offset_x), torch.where(along_x, offset_y, 0.0)], -1)
    middle = 0.5 * (visits + following) * building.size[:, None, :2] + offset
    return step.abs().sum(-1) == 1, middle
