"""A stream in pieces, each seen from its own first frame: where they lie in world, and when the next begins.

A network tells where cameras are relative to the first frame that it has been shown, and the less of that
frame is still in view, the worse. So the stream goes on with an empty memory once its camera has departed
too far, and the last frame of a submap is the first of the next. Both know its pose and its depth, which
gives the similarity between them. Source: submaps of VGGT-SLAM (arXiv 2505.12549) and VGGT-Long (arXiv
2507.16443), here one after the other without closing loops, and as long as the camera's way decides.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from stac_core.geometry import VALID_DEPTH, encode_pose, invert_pose, pose_matrix
from stac_core.prediction import Prediction


@dataclass(frozen=True)
class Similarity:
    """world = scale · rotation · submap + translation."""

    rotation: Tensor  # [3, 3]
    translation: Tensor  # [3]
    scale: Tensor  # []

    def points(self, in_submap: Tensor) -> Tensor:
        """Points [..., 3] in world."""
        return self.scale * (in_submap @ self.rotation.T) + self.translation

    def poses(self, submap_from_camera: Tensor) -> Tensor:
        """world_from_camera [..., 4, 4]; poses stay rigid, only their centres are scaled."""
        rotation = self.rotation @ submap_from_camera[..., :3, :3]
        return pose_matrix(rotation, self.points(submap_from_camera[..., :3, 3]))

    def prediction(self, p: Prediction) -> Prediction:
        """What the network said, in world and its lengths."""
        poses = self.poses(p.world_from_camera)
        return replace(
            p,
            world_from_camera=poses,
            pose_encoding=encode_pose(poses, p.intrinsics, *p.depth.shape[-2:]),
            depth=self.scale * p.depth,
            points=None if p.points is None else self.points(p.points),
        )


@dataclass(frozen=True)
class _Frame:
    """What is kept of one frame."""

    pixels: Tensor  # [1, 3, H, W] as the network took them
    pose: Tensor  # world_from_camera [4, 4]
    depth: Tensor  # [H, W] in lengths of world


class Submaps:
    """The submaps of one stream; a session tells what the network says and asks whether the next is due.

    reach: how far the camera may depart from a submap's first frame; 0 = one submap for ever, which is world.
    """

    def __init__(self, reach: float) -> None:
        self.reach = reach
        self.forget()

    def forget(self) -> None:
        """What follows is a new stream."""
        self.count = 1
        self.frames_seen = 0  # of the stream
        self.first_frame = 0  # of the present submap, by its number in the stream
        self._world_from_submap: Similarity | None = None  # None = the first submap, which is world
        self._first: _Frame | None = None  # of the present submap
        self._last: _Frame | None = None

    @property
    def next_is_due(self) -> bool:
        """Whether the camera has departed too far. Waits for the device where there is a limit."""
        if not self.reach or self._first is None or self._last is None:
            return False
        return float(_departure(self._first, self._last)) > self.reach

    @property
    def last_pixels(self) -> Tensor:
        """The latest frame [1, 3, H, W], with which the next submap begins."""
        assert self._last is not None, "a submap is due only after a frame"
        return self._last.pixels

    def begin(self, last_again: Prediction) -> None:
        """The next submap begins: its first frame is the last one, as the network sees it anew."""
        assert self._last is not None
        pose, ratio = last_again.world_from_camera[0], _median_ratio(self._last.depth, last_again.depth[0])
        scale = ratio.where(ratio.isfinite(), self._scale(ratio))
        rotation = self._last.pose[:3, :3] @ pose[:3, :3].T
        centre = scale * (rotation @ pose[:3, 3])
        self._world_from_submap = Similarity(rotation, self._last.pose[:3, 3] - centre, scale)
        self.count += 1
        self.first_frame = self.frames_seen - 1
        self._first = self._last

    def follow(self, pixels: Tensor, prediction: Prediction) -> Prediction:
        """New frames [S, 3, H, W] and what the network says of them, in world from here on."""
        self.frames_seen += prediction.frames
        placed = self.in_world(prediction)
        if self.reach:
            self._first = self._first or _frame(pixels, placed, 0)
            self._last = _frame(pixels, placed, -1)
        return placed

    def in_world(self, prediction: Prediction) -> Prediction:
        """What the network says in the present submap, in world."""
        lies = self._world_from_submap
        return prediction if lies is None else lies.prediction(prediction)

    def poses_in_world(self, submap_from_camera: Tensor) -> Tensor:
        """world_from_camera [n, 4, 4]."""
        lies = self._world_from_submap
        return submap_from_camera if lies is None else lies.poses(submap_from_camera)

    def state(self) -> dict[str, Any]:
        """Everything needed to go on, as nested dicts of tensors."""
        numbers = {"numbers": torch.tensor([self.count, self.frames_seen, self.first_frame])}
        parts = {"lies": self._world_from_submap, "first": self._first, "last": self._last}
        return numbers | {name: dict(vars(part)) for name, part in parts.items() if part is not None}

    def restore(self, state: dict[str, Any]) -> None:
        """Go on where `state` was taken. KeyError where something is missing."""
        self.count, self.frames_seen, self.first_frame = state["numbers"].tolist()
        self._world_from_submap = Similarity(**state["lies"]) if "lies" in state else None
        self._first, self._last = (
            _Frame(**state[name]) if name in state else None for name in ("first", "last")
        )

    def _scale(self, like: Tensor) -> Tensor:
        """Of the present submap, [] like another one."""
        return torch.ones_like(like) if self._world_from_submap is None else self._world_from_submap.scale


def _frame(pixels: Tensor, placed: Prediction, index: int) -> _Frame:
    """A frame of a pass, in memory of its own: that of the pass is the caller's."""
    kept = pixels[index][None], placed.world_from_camera[index], placed.depth[index]
    return _Frame(*(tensor.clone() for tensor in kept))


def _departure(first: _Frame, last: _Frame) -> Tensor:
    """How far a camera is from the first one: its turn in radians plus its way in median depths, []."""
    moved = invert_pose(first.pose) @ last.pose
    turn = ((moved.diagonal()[:3].sum() - 1) / 2).clamp(-1, 1).acos()
    return turn + moved[:3, 3].norm() / _valid(first.depth).nanmedian()


def _median_ratio(depth: Tensor, other: Tensor) -> Tensor:
    """Median of depth / other [H, W] where both are valid, []; NaN where nothing is."""
    return (_valid(depth) / _valid(other)).nanmedian()


def _valid(depth: Tensor) -> Tensor:
    """Depth with NaN where there is none."""
    return depth.where(depth > VALID_DEPTH, torch.nan)
