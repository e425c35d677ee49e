"""Predictor and mapper on one thread, and an output that keeps what it is told."""

from __future__ import annotations

from contextlib import contextmanager
from pathlib import Path

import numpy as np
from ros_helpers import parameters_of

from stac_core import Config, StreamSession
from stac_core.config import ImageConfig, ModelConfig
from stac_ros.map_directory import new_folder
from stac_ros.mapper import Mapper
from stac_ros.predictor import Predictor
from stac_ros.run_statistics import Statistics

CONFIG = Config(model=ModelConfig(device="cpu"), image=ImageConfig(size=56))


class Notes:
    """An output that keeps what it is told."""

    def __init__(self) -> None:
        self.frames, self.points, self.streams, self.moves, self.done = [], [], [], [], []
        self.loads = 0

    def publish(self, frame, points) -> None:
        self.frames.append(frame)
        self.points.append(points)

    def begin_stream(self, keep: bool) -> None:
        self.streams.append(keep)

    @property
    def jumps(self) -> list[int]:
        """Frames to which no motion leads from where the one before was said to be."""
        pairs = enumerate(zip(self.frames, self.frames[1:], strict=False), 1)
        return [index for index, (before, frame) in pairs if not _follows(frame, before)]

    def loaded(self) -> None:
        self.loads += 1

    def move(self, moves) -> None:
        self.moves.append(moves)

    def done_with(self, newest) -> None:
        self.done.append(newest)


def _follows(frame, before) -> bool:
    there = frame.map_from_before
    return there is not None and np.allclose(there, before.map_from_camera, atol=1e-6)


class InSeries:
    """What the node does on two threads, on one."""

    def __init__(self, session, parameters, statistics, output, odometry=None, calibration=None) -> None:
        self.parameters, self.mapper = parameters, Mapper(parameters, statistics, output)
        self.predictor = predictor = Predictor(
            session, parameters, statistics, self.mapper, odometry, calibration
        )
        self.process, self.pause, self.reset = predictor.process, predictor.pause, predictor.reset
        self.map, self.trajectory, self.scale = self.mapper.map, self.mapper.trajectory, self.mapper.scale

    def save(self) -> str:
        folder = new_folder(self.parameters.ros.map.directory)
        self.predictor.save(folder)
        return self.mapper.save(folder)

    def load(self, folder: Path) -> None:
        self.predictor.load(folder)
        self.mapper.load(folder)

    @property
    def session_stats(self):
        return self.predictor.session_stats


@contextmanager
def mapper_of(network, odometry=None, config=CONFIG, calibration=None, **given):
    """A mapper with settings given as section__field=value, what it says, and its statistics."""
    with parameters_of(**given) as (_, parameters):
        notes, statistics = Notes(), Statistics()
        session = StreamSession(network, config)
        yield InSeries(session, parameters, statistics, notes, odometry, calibration), notes, statistics
