"""Rendered clips that serve several steps: on a CPU, casting rays costs more than learning from them.

Clip i depends on the run's seed and on i alone. A clip that is not in the folder is rendered and
kept, so helpers may render ahead of the training:

    python -m stac_core.training.clips --folder out/training/clips --first 0 --count 4000
"""

from __future__ import annotations

import argparse
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch
from safetensors import safe_open
from safetensors.torch import save
from torch import Tensor

from stac_core.files import write_whole
from stac_core.training.config import CLIP_FRAMES, CLIP_HEIGHT, CLIP_WIDTH
from stac_core.training.sequences import Sequences
from stac_core.worlds import World, WorldConfig

WORLDS = WorldConfig()


def training_seed(run_seed: int, index: int) -> int:
    """Seed of a world to train on: always odd. Held-out worlds have even seeds."""
    return (run_seed << 33) + 2 * index + 1


def held_out_seed(index: int) -> int:
    """Seed of a world that no run trains on."""
    return 2 * index


class Clips:
    """A folder of clips, each [CLIP_FRAMES, ..., CLIP_HEIGHT, CLIP_WIDTH]."""

    def __init__(self, folder: Path, run_seed: int) -> None:
        self.folder, self.run_seed = folder, run_seed
        folder.mkdir(parents=True, exist_ok=True)

    def read(self, index: int, frames: Tensor) -> Sequences:
        """Some frames [S] of one clip, with a leading axis of 1."""
        with safe_open(self._rendered(index), framework="pt") as file:
            images, depth, poses, lenses = (
                file.get_tensor(name)[frames][None]
                for name in ("images", "depth", "world_from_camera", "intrinsics")
            )
        return Sequences(images.float() / 255, depth.float(), poses, lenses)

    def departures(self, index: int) -> np.ndarray:
        """How far frame j (column) of one clip has departed from frame i, [N, N]: its turn in radians plus
        its way in mean depths of frame i."""
        return _departures(self._rendered(index))

    def _rendered(self, index: int) -> Path:
        """File of one clip, which is rendered where it is missing."""
        path = self.path(index)
        if not path.exists():
            self.render(index)
        return path

    def render(self, index: int) -> None:
        """Render one clip into the folder."""
        world = World(training_seed(self.run_seed, index), WORLDS).render(
            0, CLIP_FRAMES, CLIP_HEIGHT, CLIP_WIDTH
        )
        content = {
            "images": (world.images[0] * 255).round().byte(),
            "depth": world.depth[0].half(),
            "world_from_camera": world.world_from_camera[0],
            "intrinsics": world.intrinsics[0],
        }
        write_whole(self.path(index), save({name: value.contiguous() for name, value in content.items()}))

    def path(self, index: int) -> Path:
        """File of one clip."""
        return self.folder / f"{self.run_seed}-{index:07d}.safetensors"


@lru_cache(maxsize=1 << 14)
def _departures(path: Path) -> np.ndarray:
    with safe_open(path, framework="pt") as file:
        poses = file.get_tensor("world_from_camera").double().numpy()
        depth = file.get_tensor("depth")[:, ::8, ::8].flatten(1).double()
    mean = (depth.sum(1) / (depth > 0).sum(1).clamp(min=1)).clamp(min=1e-3).numpy()
    way = np.linalg.norm(poses[:, None, :3, 3] - poses[None, :, :3, 3], axis=-1)
    traces = np.einsum("iab,jab->ij", poses[:, :3, :3], poses[:, :3, :3])
    return np.arccos(((traces - 1) / 2).clip(-1, 1)) + way / mean[:, None]


def main(arguments: list[str] | None = None) -> int:
    """Render clips ahead of a run, on one thread."""
    parser = argparse.ArgumentParser(prog="python -m stac_core.training.clips", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--seed", type=int, default=0, help="seed of the run")
    parser.add_argument("--first", type=int, default=0)
    parser.add_argument("--count", type=int, required=True)
    given = parser.parse_args(arguments)
    torch.set_num_threads(1)
    clips = Clips(given.folder, given.seed)
    for index in range(given.first, given.first + given.count):
        if not clips.path(index).exists():
            clips.render(index)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
