"""A stream in pieces, each seen from its own first frame: where they lie in world, and when the next begins.

A network tells where cameras are relative to the first frame that it has been shown, and the less of that
frame is still in view, the worse. So the stream goes on with an empty memory once its camera has departed
too far. The next submap begins with the last frame, or with the first one of an earlier submap where the
camera has come back to it: by its pose, or by what it sees where drift has led the pose away. Where such a
frame lies is known, and so is its depth, which gives the similarity between submap and world. A camera that
came back also tells how the submaps in between lie (`pose_graph`). Source: submaps of VGGT-SLAM (arXiv
2505.12549) and VGGT-Long (arXiv 2507.16443); here the camera's way decides when they begin.
"""

from __future__ import annotations

from copy import copy
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor

from stac_core.camera_tracker import CameraTracker
from stac_core.geometry import (
    encode_pose,
    pose_matrix,
    quaternion_from_rotation,
    rotation_from_quaternion,
)
from stac_core.keyframes import DISAGREEMENT, Keyframe, Keyframes, disagreement, valid
from stac_core.moves import Moves
from stac_core.pose_graph import PoseGraph
from stac_core.prediction import Prediction
from stac_core.relocalization import See, find_camera
from stac_core.uncertainty import with_variances


@dataclass(frozen=True)
class Similarity:
    """world = scale · rotation · submap + translation."""

    rotation: Tensor  # [3, 3]
    translation: Tensor  # [3]
    scale: Tensor  # []

    @classmethod
    def restored(cls, state: dict[str, Tensor]) -> Similarity:
        """KeyError where something is missing."""
        return cls(*(state[field.name] for field in fields(cls)))

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


class Submaps:
    """The submaps of one stream; a session tells what the network says and asks whether the next is due.

    reach: how far the camera may depart from a submap's first frame; 0 = one submap for ever, which is world.
    keyframes: how many first frames of earlier submaps are kept.
    tracker: refines poses; None = they are as the network says.
    measured: how much the network errs is known (`uncertainty`), and said of each frame.
    """

    def __init__(
        self, reach: float, keyframes: int, tracker: CameraTracker | None = None, measured: bool = False
    ) -> None:
        self.reach, self._most_keyframes, self._tracker = reach, keyframes, tracker
        self._measured = measured
        self.forget()

    def forget(self) -> None:
        """What follows is a new stream."""
        self.count = 1
        self.frames_seen = 0  # of the stream
        self.loops = 0  # closed: times that earlier submaps have moved
        self.carried = False  # the camera is known to be elsewhere than the last pose says, near the keyframe
        self._world_from_submap: Similarity | None = None  # None = the first submap, which is world
        self._first: Keyframe | None = None  # of the present submap
        self._last: Keyframe | None = None
        self.keyframes = Keyframes(self._most_keyframes)  # first frames of submaps
        self._graph = PoseGraph()
        if self._tracker is not None:
            self._tracker.forget()

    def copy(self) -> Submaps:
        """Another one of the same state, whose changes leave this one as it is."""
        twin = copy(self)
        twin.keyframes, twin._tracker = copy(self.keyframes), copy(self._tracker)
        twin._graph = copy(self._graph)
        return twin

    @property
    def tracks(self) -> bool:
        """Whether poses can be refined."""
        return self._tracker is not None

    @property
    def landmarks(self) -> int:
        """That the last frame shows."""
        return 0 if self._tracker is None else len(self._tracker)

    @property
    def next_is_due(self) -> bool:
        """Whether the camera has departed too far. Waits for the device where there is a limit."""
        if not self.reach or self._first is None or self._last is None:
            return False
        return not float(self._first.departure(self._last)) <= self.reach  # NaN: nothing valid was seen

    @property
    def first(self) -> Keyframe:
        """The frame that the present submap has begun with."""
        assert self._first is not None, "a submap is due only after a frame"
        return self._first

    @property
    def last(self) -> Keyframe:
        """The latest frame."""
        assert self._last is not None, "a submap is due only after a frame"
        return self._last

    @property
    def lost(self) -> bool:
        """Whether the pose of the latest frame is no number, so that nothing can go on from there."""
        return not bool(self.last.pose.isfinite().all())

    def come_back_to(self, see: See) -> Keyframe | None:
        """The first frame of an earlier submap that the camera is near: by its pose, or by what is seen.

        see: the network, which is asked about a few whose departures drift may have made too great. Waits
        for the device.
        """
        near = self.keyframes.nearest(self.last, self.reach)
        if near is not None:
            return near
        return find_camera(see, self.keyframes.hidden(self.last, self.reach), self.last.pixels, self.reach)

    def go_back(self, keyframe: Keyframe, first: Prediction, last: Prediction) -> tuple[bool, Moves | None]:
        """The next submap begins with an earlier frame, and the last one is placed anew, as seen from there.

        first, last: the two, as the network sees them anew. → whether it does; not, and nothing has changed,
        where their depths contradict each other: then the camera is not where it is thought to be. Also how
        all submaps so far have moved, where that was told for the first time.
        """
        lies = self._lies(keyframe, first)
        again, placed = lies.prediction(first), lies.prediction(last)
        if float(disagreement(again, placed)) > DISAGREEMENT:
            return False, None
        moves = self._graph.close(keyframe, self.last, Keyframe.of(self.last.pixels, placed, 0))
        if moves is not None:
            self.loops += 1
            self.keyframes.move(moves)
            keyframe = keyframe.moved(moves)
            lies = self._lies(keyframe, first)
            placed = lies.prediction(last)
        self._graph.go_to(keyframe)
        self._begin(keyframe, lies)
        if self._tracker is not None:
            self._tracker.forget()
            self._tracker.refine(self.last.pixels, placed)
        self._last = Keyframe.of(self.last.pixels, placed, 0)
        return True, moves

    def go_to(self, keyframe: Keyframe, first: Prediction) -> None:
        """The next submap begins with an earlier frame, as the network sees it anew; the camera is near."""
        self._graph.go_to(keyframe)
        self._begin(keyframe, self._lies(keyframe, first))
        self._last, self.carried = keyframe, True
        if self._tracker is not None:
            self._tracker.forget()

    def go_on(self, last: Prediction) -> None:
        """The next submap begins with the last frame, as the network sees it anew."""
        present = self._first or self.last
        drift = present.drift_to(self.last.pose).nan_to_num(1.0)  # far, where nothing valid tells
        first = replace(self.last, submap=self.count, drift=drift)
        self._graph.go_on(first)
        self._begin(first, self._lies(first, last))
        if self._tracker is not None:
            self._tracker.go_on()

    def hold(self) -> None:
        """What has been seen so far stays where it is from here on; loops move what comes after."""
        self._graph.hold()

    def follow(self, pixels: Tensor, prediction: Prediction, calibrated: bool = False) -> Prediction:
        """New frames [S, 3, H, W] and what the network says of them, in world from here on.

        calibrated: the intrinsics are true; poses are refined, if there is a tracker.
        """
        self.frames_seen += prediction.frames
        self.carried = False
        lies = self._world_from_submap
        placed = prediction if lies is None else lies.prediction(prediction)
        if self._tracker is not None:
            placed = self._tracker.refine(pixels, placed, calibrated)
        if self.reach:
            if self._first is None:
                self._first = Keyframe.of(pixels, placed, 0)
                self.keyframes.serve(self._first)
            if self._measured:
                placed = with_variances(placed, self._first, self._last or self._first, calibrated)
            self._last = Keyframe.of(pixels, placed, -1)
        return replace(placed, submap=self.count - 1)

    def state(self) -> dict[str, Any]:
        """Everything needed to go on, as nested dicts of tensors."""
        frames = {"first": self._first, "last": self._last}
        return {
            "numbers": torch.tensor([self.count, self.frames_seen, self.loops, self.carried]),
            "keyframes": self.keyframes.state(),
            "graph": self._graph.state(),
            "tracker": {} if self._tracker is None else self._tracker.state(),
            "lies": {} if self._world_from_submap is None else dict(vars(self._world_from_submap)),
            **{name: frame.state() for name, frame in frames.items() if frame is not None},
        }

    def restore(self, state: dict[str, Any]) -> None:
        """Go on where `state` was taken. KeyError where something is missing."""
        self.count, self.frames_seen, self.loops, carried = state["numbers"].tolist()
        self.carried = bool(carried)
        lies, frames = state.get("lies"), [state.get(name) for name in ("first", "last")]
        self._world_from_submap = Similarity.restored(lies) if lies else None
        self._first, self._last = (None if frame is None else Keyframe.restored(frame) for frame in frames)
        self.keyframes.restore(state.get("keyframes", {}))
        self._graph.restore(state["graph"])
        if self._tracker is not None:
            self._tracker.restore(state.get("tracker", {}))

    def _begin(self, first: Keyframe, lies: Similarity) -> None:
        """The next submap, with its first frame; what was kept of others may make room."""
        self._first, self._world_from_submap = first, lies
        self.keyframes.serve(first)
        self._graph.keep(self.keyframes)
        self.count += 1

    def _lies(self, known: Keyframe, again: Prediction) -> Similarity:
        """Where a submap lies that begins with a frame of known pose and depth."""
        pose, ratio = again.world_from_camera[0], (valid(known.depth) / valid(again.depth[0])).nanmedian()
        scale = ratio.where(ratio.isfinite(), self._scale(ratio))  # nothing valid: lengths as before
        rotation = known.pose[:3, :3] @ pose[:3, :3].T
        rotation = rotation_from_quaternion(quaternion_from_rotation(rotation))  # else rounding adds up
        return Similarity(rotation, known.pose[:3, 3] - scale * (rotation @ pose[:3, 3]), scale)

    def _scale(self, like: Tensor) -> Tensor:
        """Of the present submap, [] like another one."""
        return torch.ones_like(like) if self._world_from_submap is None else self._world_from_submap.scale
