"""What leaves the core for one chunk of frames."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, fields, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from stac_core.device import HostCopy
from stac_core.geometry import encode_pose
from stac_core.moves import Moves


@dataclass(frozen=True)
class Prediction:
    """S frames of H×W network pixels; a leading batch axis B is allowed everywhere.

    Frames: `world` is the stream's own frame, close to the first camera; cameras are OpenCV
    optical frames (x right, y down, z forward). Lengths are in the stream's own unit unless a
    metric scale has been applied. Confidences start at 1 and have no upper bound.
    """

    pose_encoding: Tensor  # [S, 9] translation, quaternion xyzw (world to camera), fov h, fov w
    world_from_camera: Tensor  # [S, 4, 4]
    intrinsics: Tensor  # [S, 3, 3] of the network pixels
    depth: Tensor  # [S, H, W] along the optical axis; valid where > `geometry.VALID_DEPTH`
    depth_confidence: Tensor  # [S, H, W]
    points: Tensor | None = None  # [S, H, W, 3] the point head's own points, in world
    point_confidence: Tensor | None = None  # [S, H, W]
    camera_tokens: Tensor | None = None  # [S, 2C] what the poses were read from; stays in the session
    continues: bool = True  # False: placed anew by a frame seen before, not moved there since the last pose
    before: NDArray[np.float64] | None = None  # [4, 4] where the frame before turned out to be, if poses do
    # not continue; None = unknown, as after `load`
    submap: int = 0  # of the stream, in which these frames lie
    pose_variance: Tensor | None = None  # [S, 2] of the turn about, and the place along, each axis of world:
    # radians² and squared lengths; None = unknown. Against a world fixed to the first camera.
    step_variance: Tensor | None = None  # [S, 2] likewise, of the motion from the frame before
    moved: Moves | None = None  # how submaps have moved since the last prediction: a loop was closed

    @property
    def frames(self) -> int:
        return self.depth.shape[-3]

    def frame(self, index: int) -> Prediction:
        """One of the frames alone, S = 1, without a batch axis."""
        return self.map(lambda tensor: tensor[index : index + 1])

    def map(self, change: Callable[[Tensor], Tensor]) -> Prediction:
        """Apply one function to every tensor that is present."""
        present = {f.name: getattr(self, f.name) for f in fields(self)}
        changed: dict[str, Any] = {k: change(v) for k, v in present.items() if isinstance(v, Tensor)}
        return replace(self, **changed)

    def to_host(self) -> Prediction:
        """Move to CPU memory in float32, detached from the network."""
        return self.sent_to_host()()

    def sent_to_host(self) -> Callable[[], Prediction]:
        """Begin with that; → what waits until it is done, but not for what the device does afterwards."""
        present = {f.name: getattr(self, f.name) for f in fields(self)}
        copies = {k: HostCopy(v.detach().float()) for k, v in present.items() if isinstance(v, Tensor)}

        def arrived() -> Prediction:
            taken: dict[str, Any] = {name: copy.take() for name, copy in copies.items()}
            return replace(self, **taken)

        return arrived

    def moved_by(self, moves: Moves) -> Prediction:
        """On the host: where the frames lie once their submap has moved."""
        poses = torch.from_numpy(moves.poses(self.submap, self.world_from_camera.numpy())).float()
        points = None
        if self.points is not None:
            points = torch.from_numpy(moves.points(self.submap, self.points.numpy())).float()
        return replace(
            self,
            world_from_camera=poses,
            pose_encoding=encode_pose(poses, self.intrinsics, *self.depth.shape[-2:]),
            depth=float(moves.scale[self.submap]) * self.depth,
            points=points,
            pose_variance=None,  # it was that of another place
        )


def moved_on(predictions: Iterable[Prediction]) -> list[Prediction]:
    """All predictions of one stream, on the host, each where those after it have moved it."""
    said = list(predictions)
    moves = Moves.composed(p.moved for p in said)
    return [p.moved_by(moves) if p.submap < len(moves) else p for p in said]
