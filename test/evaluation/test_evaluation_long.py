"""What long sequences take: no image waits in memory until the last one has been read."""

import tracemalloc
import weakref
from types import SimpleNamespace

import numpy as np
import pytest

from stac_core.evaluation import score
from stac_core.evaluation.datasets import Frame
from stac_core.evaluation.score import ReconOptions, score_depth
from stac_core.evaluation.trajectory import Trajectory

FRAMES, SIZE = 120, (60, 60)
INTRINSICS = np.array([[60.0, 0, 30], [0, 60, 30], [0, 0, 1]])


class Wall:
    """A wall seen again and again from the same place, of which every second column is measured."""

    name, max_depth_m = "wall", np.inf

    def __init__(self) -> None:
        self.alive = self.most_alive = 0

    def __len__(self) -> int:
        return FRAMES

    def cloud(self) -> None:
        return None

    def frame(self, index: int) -> Frame:
        depth = wall()
        depth[:, ::2] = 0
        self.alive += 1
        self.most_alive = max(self.most_alive, self.alive)
        weakref.finalize(depth, self._gone)
        return Frame(np.zeros((*SIZE, 3), np.uint8), index, np.eye(4), depth, INTRINSICS)

    def _gone(self) -> None:
        self.alive -= 1


def wall() -> np.ndarray:
    return 2 + np.random.default_rng(0).random(SIZE, np.float32)


def run() -> SimpleNamespace:
    return SimpleNamespace(
        indices=range(FRAMES),
        trajectory=Trajectory(np.arange(FRAMES), np.tile(np.eye(4), (FRAMES, 1, 1))),
        camera_intrinsics=np.tile(INTRINSICS, (FRAMES, 1, 1)),
        camera_depth=lambda number: wall() / 2,
        camera_confidence=lambda number: np.ones(SIZE, np.float32),
    )


def test_true_depth_is_read_image_by_image():
    sequence = Wall()
    assert score_depth(run(), sequence, "scale", "sequence")["abs_rel"] < 1e-6
    assert sequence.most_alive <= 60  # `tee` lets go of 57 at once


class Aligned(Exception):
    """The points are there."""


def test_an_alignment_keeps_only_the_points_that_it_uses(monkeypatch):
    def align(source, target, with_scale):
        held = tracemalloc.get_traced_memory()[0]
        tracemalloc.stop()
        assert len(source) == len(target) <= 100 * FRAMES and held < 3_000_000
        raise Aligned

    monkeypatch.setattr(score, "_MOST_PAIRS", 100 * FRAMES)
    monkeypatch.setattr(score, "align_points", align)
    tracemalloc.start()
    with pytest.raises(Aligned):
        score.reconstruct(run(), Wall(), ReconOptions())
