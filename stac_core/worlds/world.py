"""Worlds as training and evaluation meet them: a batch of short clips, or one long stream."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

from stac_core.worlds.building import draw_building
from stac_core.worlds.camera_defects import Defects, apply_defects, draw_defects
from stac_core.worlds.config import WorldConfig, check_count, check_frame_size
from stac_core.worlds.draws import Draws, world_seeds
from stac_core.worlds.path import Path, draw_path
from stac_core.worlds.render import render
from stac_core.worlds.route import draw_route
from stac_core.worlds.scene import Scene, build_scene


@dataclass(frozen=True)
class WorldBatch:
    """S frames in each of B worlds."""

    images: Tensor  # [B, S, 3, H, W] in [0, 1]
    depth: Tensor  # [B, S, H, W] metres along the optical axis; 0 = nothing there
    world_from_camera: Tensor  # [B, S, 4, 4] metres; world z is up, cameras are OpenCV
    intrinsics: Tensor  # [B, S, 3, 3] pixels


@dataclass(frozen=True)
class Worlds:
    """B worlds, ready to be looked at."""

    seeds: Tensor  # [B]
    scene: Scene
    path: Path
    fov: Tensor  # [B] field of view of the longer side, rad
    defects: Defects

    def render(self, frames: Tensor, height: int, width: int) -> WorldBatch:
        """Frames with the given numbers [S] of every world."""
        check_frame_size(height, width)
        with _exact(self.seeds.device):
            poses = self.path.poses(frames)
            lenses = self.intrinsics(height, width)[:, None].repeat(1, len(frames), 1, 1)
            images, depth = render(self.scene, poses, lenses, height, width)
            return WorldBatch(apply_defects(self.defects, images, frames), depth, poses, lenses)

    def intrinsics(self, height: int, width: int) -> Tensor:
        """Pinhole matrices [B, 3, 3]; the axis meets the image at (width / 2, height / 2)."""
        focal = 0.5 * max(height, width) / torch.tan(0.5 * self.fov)
        matrix = torch.zeros(len(focal), 3, 3, device=focal.device)
        matrix[:, 0, 0] = matrix[:, 1, 1] = focal
        matrix[:, 0, 2], matrix[:, 1, 2], matrix[:, 2, 2] = width / 2, height / 2, 1
        return matrix


def build_worlds(config: WorldConfig, seeds: Tensor) -> Worlds:
    """Build the worlds of seeds [B] on the seeds' device."""
    draws = Draws(seeds)
    with _exact(seeds.device):
        building = draw_building(draws, config)
        route = draw_route(draws, building, config.path)
        scene = build_scene(draws, building, route, config)
        path = draw_path(draws, building, route, config)
        fov = draws.uniform(low=math.radians(config.fov_min), high=math.radians(config.fov_max))
        return Worlds(seeds, scene, path, fov, draw_defects(draws, config.defects))


@contextmanager
def _exact(device: torch.device) -> Iterator[None]:
    """Truth is computed without gradients and in full precision, whatever surrounds the call."""
    with torch.no_grad(), torch.autocast(device.type, enabled=False):
        yield


class World:
    """One world to walk through for as long as one likes.

    Frame numbers start at 0; any stretch can be rendered without the frames before it.
    """

    def __init__(self, seed: int, config: WorldConfig, device: torch.device | str = "cpu") -> None:
        self.seed, self.config, self.device = seed, config, torch.device(device)
        self._worlds = build_worlds(config, world_seeds(seed, 1, device))

    @property
    def lap(self) -> int:
        """Frames until a looping path returns, or until an exploring path ends."""
        return int(self._worlds.path.lap[0])

    def intrinsics(self, height: int, width: int) -> Tensor:
        """Pinhole matrix [3, 3] of frames of this size."""
        return self._worlds.intrinsics(height, width)[0]

    def render(self, first: int, last: int, height: int, width: int) -> WorldBatch:
        """Frames first … last − 1 as a batch of one world."""
        check_count("first", first, 0)
        check_count("last", last, first + 1)
        return self._worlds.render(torch.arange(first, last, device=self.device), height, width)
