"""Synthetic rooms through which a camera walks in laps: rendered once, kept on disk."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

from stac_core.evaluation.datasets.sequence import FRAME_PERIOD_NS, Array, Frame
from stac_core.files import replacing
from stac_core.worlds import World, WorldConfig

ROOM = WorldConfig(kind="room", stops=0.0)
FIRST_SEED = 900
SEARCHED = 200  # rooms in a row, none of which suits: then there may be none
LAPS = (0.4, 0.6)  # of the frames: most of the loop is seen twice


class LoopWorld:
    """One room as a `Sequence`; frames from number `lap` on show places seen before."""

    max_depth_m = np.inf

    def __init__(self, seed: int, frames: int, height: int, width: int, folder: Path) -> None:
        """Read the frames from `folder`, or render them to there.

        Raises ValueError where the camera would not return within so many frames.
        """
        world = World(seed, ROOM)
        self.name, self.lap = f"room_{seed}", world.lap
        if self.lap >= frames:
            raise ValueError(
                f"frames = {frames}: the camera of world {seed} returns after {self.lap}; "
                f"nearest value that works: {self.lap + 1}"
            )
        path = folder / f"{self.name}_{frames}x{height}x{width}.npz"
        if not path.exists():
            _render(world, self.name, frames, height, width, path)
        with np.load(path) as stored:
            self._images, self._depth = stored["images"], stored["depth"]
            self._poses, self._intrinsics = stored["world_from_camera"], stored["intrinsics"]

    def __len__(self) -> int:
        return len(self._images)

    def frame(self, index: int) -> Frame:
        return Frame(
            self._images[index],
            index * FRAME_PERIOD_NS,
            self._poses[index],
            self._depth[index],
            self._intrinsics,
        )

    def cloud(self) -> Array | None:
        return None

    @property
    def world_from_camera(self) -> NDArray[np.float64]:
        """[N, 4, 4]."""
        return self._poses


def loop_seeds(worlds: int, frames: int) -> list[int]:
    """The first seeds whose camera returns about half way through so many frames; ValueError where these
    are hardly to be found."""
    found: list[int] = []
    for _ in tqdm(range(worlds), desc="find rooms", unit="room", leave=False, disable=None):
        found.append(_next_seed(found[-1] + 1 if found else FIRST_SEED, frames))
    return found


def _next_seed(first: int, frames: int) -> int:
    """The first one from there on; ValueError after `SEARCHED` rooms."""
    low, high = (share * frames for share in LAPS)
    seeds = range(first, first + SEARCHED)
    for seed in seeds:
        if low <= World(seed, ROOM).lap <= high:
            return seed
    raise ValueError(
        f"frames = {frames}: in none of the rooms {first} to {seeds[-1]} does the camera return after "
        f"{low:.0f} to {high:.0f} frames; take 300 frames, or name rooms by --seeds"
    )


def _render(world: World, name: str, frames: int, height: int, width: int, path: Path) -> None:
    images = np.empty((frames, height, width, 3), np.uint8)
    depth = np.empty((frames, height, width), np.float32)
    poses = np.empty((frames, 4, 4))
    for index in tqdm(range(frames), desc=f"render {name}", unit="frame", leave=False):
        batch = world.render(index, index + 1, height, width)
        images[index] = (batch.images[0, 0].permute(1, 2, 0) * 255).round().byte().numpy()
        depth[index], poses[index] = batch.depth[0, 0].numpy(), batch.world_from_camera[0, 0].numpy()
    intrinsics = world.intrinsics(height, width).double().numpy()
    with replacing(path) as partial, partial.open("wb") as file:
        np.savez(file, images=images, depth=depth, world_from_camera=poses, intrinsics=intrinsics)
