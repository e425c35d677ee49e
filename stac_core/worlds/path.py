"""Where the camera is and looks in every frame: a route, a way of walking and a way of looking.

Every signal is a closed formula of the frame number, so any stretch of a path can be had without
the frames before it. On a closed route all slow signals repeat with the lap: the camera returns to
the same view, up to the tremble of the hand.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from stac_core.worlds.building import Building
from stac_core.worlds.config import WorldConfig
from stac_core.worlds.draws import Draws
from stac_core.worlds.route import Route

MOTIONS = ("forward", "sideways", "orbit", "drift", "spin")  # from drift on, heading ignores the route
_SHARES = [0.4, 0.2, 0.15, 0.15, 0.1]  # of the motions in a mixed world
_WAVES = 2  # sinusoids per slow signal
_MOST_TURN = math.radians(15)  # between two frames, where the heading follows the route


@dataclass(frozen=True)
class Path:
    """Camera motion of B worlds."""

    route: Route
    motion: Tensor  # [B] index into MOTIONS
    start: Tensor  # [B] frame of the lap at which frame 0 begins
    lap: Tensor  # [B] frames of one lap, or of the whole open route
    stop_period: Tensor  # [B] frames between stops
    moving: Tensor  # [B] share of a stop period spent moving; 1 = never stops
    heading: Tensor  # [B] yaw added to the motion's own, rad
    turns: Tensor  # [B] full turns per lap while spinning
    look_ahead: Tensor  # [B] metres along the route
    target: Tensor  # [B, 2] point an orbit looks at
    base: Tensor  # [B, 3] height (m), pitch (down is positive) and roll (rad)
    sway: Tensor  # [B, 4, waves, 3] amplitude, cycles per lap, phase of yaw, height, pitch, roll
    tremble: Tensor  # [B, 4, 3] amplitude, frames per cycle, phase of x, y, yaw, pitch

    def poses(self, frames: Tensor) -> Tensor:
        """world_from_camera [B, S, 4, 4] float32 at frame numbers [S]; OpenCV camera axes."""
        time = frames.to(self.lap.device).double()[None] + self.start[:, None]
        distance = self._distance(time)
        position = self.route.at(distance)
        yaw, height, pitch, roll = self._sway(time)
        shake_x, shake_y, shake_yaw, shake_pitch = self._tremble(frames.to(self.lap.device).double())
        yaw = self._look(distance, position, time) + yaw + shake_yaw
        x, y = position[..., 0] + shake_x, position[..., 1] + shake_y
        centre = torch.stack([x, y, self.base[:, :1] + height], -1)
        rotation = world_from_camera_rotation(
            yaw, self.base[:, 1:2] + pitch + shake_pitch, self.base[:, 2:] + roll
        )
        pose = torch.zeros(*yaw.shape, 4, 4, dtype=torch.float64, device=yaw.device)
        pose[..., :3, :3], pose[..., :3, 3], pose[..., 3, 3] = rotation, centre, 1
        return pose.float()

    def _distance(self, time: Tensor) -> Tensor:
        """Metres walked [B, S]: even, or eased in and out of stops."""
        period, moving = self.stop_period[:, None], self.moving[:, None]
        phase = time / period
        part = (phase.frac() / moving).clamp(max=1)
        eased = part - torch.sin(2 * math.pi * part) / (2 * math.pi)
        walked = phase.floor() + torch.where(moving < 1, eased, part)
        spinning = (self.motion == MOTIONS.index("spin"))[:, None]
        walked = torch.where(spinning, self.start[:, None] / period, walked)
        return walked * (self.route.length / self.lap)[:, None] * period

    def _look(self, distance: Tensor, position: Tensor, time: Tensor) -> Tensor:
        """Yaw [B, S] of the motion itself."""
        ahead = self.route.heading(distance, self.look_ahead)
        inward = _yaw_towards(self.target, position)
        spin = 2 * math.pi * self.turns[:, None] * time / self.lap[:, None]
        choices = torch.stack([ahead, ahead, inward, torch.zeros_like(ahead), spin])
        yaw = choices.gather(0, self.motion.view(1, -1, 1).expand(1, *ahead.shape))[0]
        return yaw + self.heading[:, None]

    def _sway(self, time: Tensor) -> tuple[Tensor, ...]:
        amplitude, cycles, phase = self.sway.unbind(-1)
        turn = cycles[..., None] * (time / self.lap[:, None])[:, None, None] + phase[..., None]
        return (amplitude[..., None] * torch.sin(2 * math.pi * turn)).sum(2).unbind(1)

    def _tremble(self, frames: Tensor) -> tuple[Tensor, ...]:
        amplitude, period, phase = self.tremble.unbind(-1)
        turn = frames / period[..., None] + phase[..., None]
        return (amplitude[..., None] * torch.sin(2 * math.pi * turn)).unbind(1)


def world_from_camera_rotation(yaw: Tensor, pitch: Tensor, roll: Tensor) -> Tensor:
    """Rotations [..., 3, 3] of OpenCV cameras: yaw about z up, pitch down, roll about the axis."""
    cos_yaw, sin_yaw, cos_pitch, sin_pitch = yaw.cos(), yaw.sin(), pitch.cos(), pitch.sin()
    forward = torch.stack([cos_yaw * cos_pitch, sin_yaw * cos_pitch, -sin_pitch], -1)
    right = torch.stack([sin_yaw, -cos_yaw, torch.zeros_like(yaw)], -1)
    down = torch.cross(forward, right, dim=-1)
    cos_roll, sin_roll = roll.cos()[..., None], roll.sin()[..., None]
    return torch.stack([cos_roll * right + sin_roll * down, cos_roll * down - sin_roll * right, forward], -1)


def _yaw_towards(target: Tensor, position: Tensor) -> Tensor:
    """Yaw [B, S] from positions [B, S, 2] to one point [B, 2]."""
    way = target[:, None] - position
    return torch.atan2(way[..., 1], way[..., 0])


def draw_path(draws: Draws, building: Building, route: Route, config: WorldConfig) -> Path:
    """Draw how the cameras of B worlds move along their routes."""
    motion = _draw_motion(draws, building, config)
    look_ahead = 0.15 * building.size[:, :2].mean(1).double()
    target = (draws.uniform(2, low=-0.08, high=0.08) * building.size[:, :2]).double()
    step = draws.log_uniform(low=config.step_min, high=config.step_max) * building.typical_depth
    slowest = _sharpest_turn(route, look_ahead, target, motion) / _MOST_TURN
    lap = torch.maximum((route.length / step).round(), slowest.ceil().clamp(min=16))
    stops = (lap / draws.uniform(low=15, high=60)).round().clamp(min=1)
    moving = torch.where(draws.chance(config.stops), draws.uniform(low=0.5, high=0.85), 1.0)
    turns = (lap / draws.log_uniform(low=30, high=240)).round().clamp(min=1)
    start = (draws.uniform() * lap).floor() if route.closed else torch.zeros_like(lap)
    return Path(
        route=route,
        motion=motion,
        start=start,
        lap=lap,
        stop_period=lap / stops,
        moving=moving.double(),
        heading=_draw_heading(draws, building, route, motion, start / lap * route.length).double(),
        turns=turns.double() * torch.where(draws.chance(0.5), 1, -1),
        look_ahead=look_ahead,
        target=target,
        base=_draw_base(draws, building).double(),
        sway=_draw_sway(draws, lap),
        tremble=_draw_tremble(draws),
    )


def _draw_motion(draws: Draws, building: Building, config: WorldConfig) -> Tensor:
    if config.motion != "mixed":
        motion = torch.full((draws.batch,), MOTIONS.index(config.motion), device=draws.seeds.device)
    else:
        motion = draws.choice(_SHARES)
    several = (building.rooms > 1).any(1)  # the middle of the first room is out of sight from the others
    orbit = motion == MOTIONS.index("orbit")
    return torch.where(orbit & several, MOTIONS.index("sideways"), motion)


def _sharpest_turn(route: Route, look_ahead: Tensor, target: Tensor, motion: Tensor) -> Tensor:
    """Radians per lap [B] at the sharpest corner, hairpins aside; 0 for motions of their own heading."""
    parts = 16 * route.control.shape[1]
    share = torch.linspace(0, 1, parts + 1, device=motion.device, dtype=torch.float64)
    distance = share * route.length[:, None]
    along = route.heading(distance, look_ahead)
    yaw = torch.where(
        (motion == MOTIONS.index("orbit"))[:, None], _yaw_towards(target, route.at(distance)), along
    )
    turn = (yaw[:, 1:] - yaw[:, :-1] + math.pi).remainder(2 * math.pi) - math.pi
    sharpest = turn.abs().quantile(0.98, dim=1) * parts
    return torch.where(motion >= MOTIONS.index("drift"), 0.0, sharpest)


def _draw_heading(draws: Draws, building: Building, route: Route, motion: Tensor, start: Tensor) -> Tensor:
    """Yaw against the motion's own [B]; sideways mostly towards the room, for walls are dull."""
    position = route.at(start[:, None])
    size = building.size[:, :2]
    middle = (position[:, 0] / size).round() * size
    turn = _yaw_towards(middle, position)[:, 0] - route.heading(start[:, None], 0.1 * size.amin(1))[:, 0]
    left = turn.sin().sign()
    side = torch.where(draws.chance(0.85), left, -left) * draws.uniform(low=1.0, high=2.2)
    slight = draws.uniform(low=-0.4, high=0.4)
    any_way = draws.uniform(low=-math.pi, high=math.pi)
    heading = torch.where(motion == MOTIONS.index("sideways"), side, slight)
    return torch.where(motion >= MOTIONS.index("drift"), any_way, heading)


def _draw_base(draws: Draws, building: Building) -> Tensor:
    inside, outside = draws.uniform(low=0.45, high=1.6), draws.log_uniform(low=0.5, high=4.0)
    height = torch.where(building.outdoor, outside, inside)
    pitch = draws.uniform(low=-0.15, high=0.35)
    roll = draws.uniform(low=-0.05, high=0.05)
    return torch.stack([height, pitch, roll], -1)


def _draw_sway(draws: Draws, lap: Tensor) -> Tensor:
    """Slow looking about, by a strength of each world, which is 0 in some."""
    most = torch.tensor([0.5, 0.12, 0.15, 0.06], device=lap.device)[:, None] / _WAVES
    strength = draws.uniform(1, 1) * draws.chance(0.8, 1, 1)
    amplitude = most * strength * draws.uniform(4, _WAVES, low=0.3)
    cycles = (lap[:, None, None] / draws.log_uniform(4, _WAVES, low=25.0, high=200.0)).round().clamp(min=1)
    phase = draws.uniform(4, _WAVES)
    return torch.stack([amplitude.double(), cycles, phase.double()], -1)


def _draw_tremble(draws: Draws) -> Tensor:
    amplitude = 0.012 * draws.uniform(1) * draws.chance(0.6, 1)  # metres as well as radians
    period, phase = draws.uniform(4, low=4.3, high=23.0), draws.uniform(4)
    return torch.stack([amplitude.expand(-1, 4), period, phase], -1).double()
