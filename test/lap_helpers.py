"""A walk whose loop closes: what the network says of it, and where all of that lies in the end."""

from __future__ import annotations

import functools
from dataclasses import dataclass

import numpy as np
from node_helpers import header
from std_msgs.msg import Header
from walks import LAP, bundled, frames_of, images_of

from stac_core import Config, ImageGeometry, Prediction, StreamSession
from stac_core.prediction import moved_on
from stac_ros.mapped_frame import MappedFrame
from stac_ros.predictor import Predicted, View

CHUNK = 4


@dataclass(frozen=True)
class Lap:
    """What the network says of a walk whose loop closes."""

    said: list[Prediction]
    geometry: ImageGeometry

    @property
    def closing(self) -> int:
        """The chunk that tells of moves."""
        return [p.moved is not None for p in self.said].index(True)


@functools.cache
def lap() -> Lap:
    stream, images = StreamSession(bundled(), Config()), images_of(frames_of(LAP))
    said = [stream.step(images[i : i + CHUNK]).to_host() for i in range(0, len(images), CHUNK)]
    assert stream.geometry is not None
    return Lap(said, stream.geometry)


def stamped(frame: int) -> Header:
    return header(10 + frame / 10)


def chunk(number: int, odom_from_camera: np.ndarray | None = None) -> Predicted:
    images = images_of(frames_of(LAP))
    frames = range(CHUNK * number, CHUNK * number + lap().said[number].frames)
    views = [View(stamped(frame), images[frame], odom_from_camera) for frame in frames]
    return Predicted(views, lap().said[number], lap().geometry)


def expected_frames(map_from_world: np.ndarray, factor: float) -> list[MappedFrame]:
    """Every frame where the core says in the end that it lies, at `map_from_world` and `factor`."""
    found = []
    for number, p in enumerate(moved_on(lap().said)):
        for index, view in enumerate(chunk(number).views):
            pose = p.world_from_camera[index].double().numpy()
            pose[:3, 3] *= factor
            depth, confidence, lens = p.depth[index] * factor, p.depth_confidence[index], p.intrinsics[index]
            in_map, geometry = map_from_world @ pose, lap().geometry
            seen = view.header, view.image, in_map, None, depth, confidence, lens, geometry, p.submap
            found.append(MappedFrame(*seen))
    return found
