"""Frames of new worlds, and pinhole arithmetic in NumPy, written apart from the renderer as its judge."""

from __future__ import annotations

import numpy as np
import torch

from stac_core.worlds import WorldBatch, WorldConfig, build_worlds, world_seeds


def sample_batch(
    config: WorldConfig, batch: int, frames: int, height: int, width: int, *, seed: int, device: str = "cpu"
) -> WorldBatch:
    """The first frames of new worlds; the same seed gives the same worlds anywhere."""
    worlds = build_worlds(config, world_seeds(seed, batch, device))
    return worlds.render(torch.arange(frames, device=device), height, width)


def view(batch: WorldBatch, world: int, frame: int):
    """Image [H, W, 3], depth [H, W], world_from_camera [4, 4] and intrinsics [3, 3] in float64."""
    image = batch.images[world, frame].permute(1, 2, 0).double().numpy()
    depth, pose, lens = (
        value[world, frame].double().numpy()
        for value in (batch.depth, batch.world_from_camera, batch.intrinsics)
    )
    return image, depth, pose, lens


def unproject(depth: np.ndarray, pose: np.ndarray, lens: np.ndarray) -> np.ndarray:
    """World points [N, 3] of the valid pixels; pixel (u, v) has integer coordinates."""
    v, u = np.nonzero(depth > 0)
    z = depth[v, u]
    camera = np.stack([(u - lens[0, 2]) * z / lens[0, 0], (v - lens[1, 2]) * z / lens[1, 1], z], 1)
    return camera @ pose[:3, :3].T + pose[:3, 3]


def project(points: np.ndarray, pose: np.ndarray, lens: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Pixel coordinates [N, 2] and depth [N] of world points."""
    camera = (points - pose[:3, 3]) @ pose[:3, :3]
    z = camera[:, 2]
    safe = np.where(np.abs(z) > 1e-9, z, 1e-9)
    return np.stack([camera[:, 0] * lens[0, 0] / safe, camera[:, 1] * lens[1, 1] / safe], 1) + lens[:2, 2], z
