"""What is kept of single frames, and which of them a camera has come back to."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from stac_core.device import send
from stac_core.geometry import VALID_DEPTH, invert_pose, unproject_depth
from stac_core.moves import Moves
from stac_core.prediction import Prediction

IN_VIEW = 0.3  # least part of two frames that must lie in each other's view for them to be compared
DISAGREEMENT = 0.1  # most by which depths may differ, as the median |log| of their ratio; good ones: 0.05
DRIFT = 0.1  # most by which a departure may be wrong, for each keyframe that has served since
HIDDEN = 2  # keyframes that are looked at, at most, where drift may hide them


@dataclass(frozen=True, eq=False)
class Keyframe:
    """One frame as the network took it and where it lies."""

    pixels: Tensor  # [1, 3, H, W]
    pose: Tensor  # world_from_camera [4, 4]
    depth: Tensor  # [H, W] in lengths of world
    submap: int = 0  # that it was the first to begin
    drift: Tensor = field(default_factory=lambda: torch.zeros(2))  # see `drift_to`

    @classmethod
    def of(cls, pixels: Tensor, placed: Prediction, index: int) -> Keyframe:
        """Of a pass over [S, 3, H, W], in memory of its own: that of the pass is the caller's."""
        pose, depth = placed.world_from_camera[index], placed.depth[index]
        return cls(pixels[index][None].clone(), pose.clone(), depth.clone(), drift=pose.new_zeros(2))

    def moved(self, moves: Moves) -> Keyframe:
        """Where it lies once its submap has moved."""
        pose = torch.from_numpy(moves.poses(self.submap, self.pose.double().cpu().numpy()))
        scale = float(moves.scale[self.submap])
        return replace(
            self,
            pose=send(pose.to(self.pose.dtype), self.pose.device),
            depth=scale * self.depth,
            drift=torch.stack([self.drift[0], scale**2 * self.drift[1]]),
        )

    def state(self) -> dict[str, Tensor]:
        """As tensors."""
        return {**vars(self), "submap": torch.tensor(self.submap)}

    @classmethod
    def restored(cls, state: dict[str, Tensor]) -> Keyframe:
        """As it was when `state` was taken. KeyError where something is missing."""
        pixels, pose, depth, drift = (state[name].clone() for name in ("pixels", "pose", "depth", "drift"))
        return cls(pixels, pose, depth, int(state["submap"]), drift)

    def departure(self, other: Keyframe) -> Tensor:
        """How far another camera is from this one: its turn in radians plus its way in median depths, [].

        NaN where this one has no valid depth.
        """
        return departure(self.pose, other.pose, valid(self.depth).nanmedian())

    def drift_to(self, world_from_camera: Tensor) -> Tensor:
        """What has added up on the way to cameras [..., 4, 4] that are seen from here, [..., 2].

        Departures, and departures times squared depths: the variances of a random walk, but for a factor.
        """
        depth = valid(self.depth).nanmedian()
        departed = departure(self.pose, world_from_camera, depth)
        return self.drift + torch.stack([departed, departed * depth**2], dim=-1)


class Keyframes:
    """At most `most` of them, one of each submap; the one that served longest ago makes room."""

    def __init__(self, most: int) -> None:
        self._most = most
        self._kept: list[Keyframe] = []  # the latest one that served is last

    def __len__(self) -> int:
        return len(self._kept)

    @property
    def bytes(self) -> int:
        """Of memory."""
        return sum(kept.pixels.nbytes + kept.pose.nbytes + kept.depth.nbytes for kept in self._kept)

    def serve(self, keyframe: Keyframe) -> None:
        """Keep it, or keep it longer."""
        self._kept = [kept for kept in self._kept if kept.submap != keyframe.submap] + [keyframe]
        self._kept = self._kept[max(0, len(self._kept) - self._most) :]

    def move(self, moves: Moves) -> None:
        """Each with its submap."""
        self._kept = [kept.moved(moves) for kept in self._kept]

    def nearest(self, camera: Keyframe, reach: float) -> Keyframe | None:
        """The one from which a camera has departed least, by no more than `reach`. Waits for the device."""
        if not self._kept:
            return None
        departures = self._departures(camera)
        nearest = int(departures.argmin())
        return self._kept[nearest] if float(departures[nearest]) <= reach else None

    def hidden(self, camera: Keyframe, reach: float) -> list[Keyframe]:
        """The few nearest that may be within `reach`, as far as poses drift. Waits for the device.

        The more others have served since one did, the more its departure may be wrong.
        """
        if not self._kept:
            return []
        departures = self._departures(camera)
        since = torch.arange(len(self._kept), device=departures.device).flip(0)
        possible = (departures <= reach + DRIFT * since).tolist()
        return [self._kept[index] for index in departures.argsort().tolist() if possible[index]][:HIDDEN]

    def __iter__(self) -> Iterator[Keyframe]:
        """From the one that served longest ago."""
        return iter(self._kept)

    def _departures(self, camera: Keyframe) -> Tensor:
        """From each to a camera; ∞ where a keyframe has no valid depth."""
        return torch.stack([kept.departure(camera) for kept in self._kept]).nan_to_num(torch.inf)

    def state(self) -> dict[str, Tensor]:
        """All of them, one above the other; nothing where there are none."""
        states = [kept.state() for kept in self._kept]
        return {name: torch.stack([state[name] for state in states]) for name in states[0]} if states else {}

    def restore(self, state: dict[str, Tensor]) -> None:
        """As they were when `state` was taken. KeyError where something is missing."""
        rows = zip(*state.values(), strict=True)
        self._kept = [Keyframe.restored(dict(zip(state, row, strict=True))) for row in rows]


def departure(pose: Tensor, other: Tensor, depth: Tensor) -> Tensor:
    """How far cameras [..., 4, 4] are from another: a turn in radians plus a way in its depths, [...]."""
    moved = invert_pose(pose) @ other
    chord = (moved[..., :3, :3] - torch.eye(3, device=moved.device)).norm(dim=(-2, -1))
    turn = 2 * (chord / math.sqrt(8)).clamp_max(1).asin()  # the chord is √8 · sine of half the turn
    return turn + moved[..., :3, 3].norm(dim=-1) / depth


def disagreement(first: Prediction, second: Prediction) -> Tensor:
    """How depths of two single frames in one world differ where each sees the other's points, [].

    Median |log| of their ratio; infinite where too little is seen by both.
    """
    ratios = torch.cat([_depth_ratios(first, second), _depth_ratios(second, first)])
    seen = ratios.isfinite().float().mean()
    return ratios.log().abs().nanmedian().where(seen >= IN_VIEW, torch.inf)


def _depth_ratios(ours: Prediction, theirs: Prediction) -> Tensor:
    """Their depth over that of our points in their camera, [H·W]; NaN for points that they do not see."""
    height, width = theirs.depth.shape[-2:]
    points = unproject_depth(ours.depth[0], ours.intrinsics[0], ours.world_from_camera[0]).flatten(0, 1)
    camera_from_world, lens = invert_pose(theirs.world_from_camera[0]), theirs.intrinsics[0]
    x, y, z = (points @ camera_from_world[:3, :3].T + camera_from_world[:3, 3]).unbind(-1)
    column, row = (x / z * lens[0, 0] + lens[0, 2]).round(), (y / z * lens[1, 1] + lens[1, 2]).round()
    inside = (z > VALID_DEPTH) & (column >= 0) & (column < width) & (row >= 0) & (row < height)
    row, column = (t.where(inside, 0).long() for t in (row, column))
    return valid(theirs.depth[0])[row, column] / z.where(inside, torch.nan)


def valid(depth: Tensor) -> Tensor:
    """Depth with NaN where there is none."""
    return depth.where(depth > VALID_DEPTH, torch.nan)
