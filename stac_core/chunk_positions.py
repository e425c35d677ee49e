"""What the memory is told of a chunk: where its tokens lie, and what its poses were read from."""

from __future__ import annotations

import torch

from stac_core.cache.camera_tokens import Cameras
from stac_core.cache.token_positions import TokenPositions, View, token_positions
from stac_core.config import CacheConfig, NetworkConfig
from stac_core.geometry import unproject_depth
from stac_core.prediction import Prediction


def positions_of(prediction: Prediction, cache: CacheConfig, network: NetworkConfig) -> TokenPositions:
    """Where the tokens of S frames lie: by the points that the network says, or else by depth and pose."""
    p = prediction
    points, confidence = p.points, p.point_confidence
    if points is None or confidence is None:
        points = unproject_depth(p.depth, p.intrinsics, p.world_from_camera)
        confidence = p.depth_confidence
    return token_positions(
        points,
        confidence,
        p.depth,
        p.world_from_camera[-1, :3, 3],
        patch_size=network.patch_size,
        special_tokens=network.special_tokens,
        least_confidence=cache.voxel_conf,
        edge_test=cache.edge_test,
        lost_confidence=cache.lost_confidence,
        view=_view(p) if cache.prefetch else None,
    )


def cameras_of(prediction: Prediction) -> Cameras | None:
    """What the poses were read from, and they."""
    tokens = prediction.camera_tokens
    return None if tokens is None else Cameras(tokens, prediction.world_from_camera)


def _view(prediction: Prediction) -> View:
    """What the newest camera sees."""
    intrinsics, (height, width) = prediction.intrinsics[-1], prediction.depth.shape[-2:]
    half_width, half_height = width / 2 / intrinsics[0, 0], height / 2 / intrinsics[1, 1]
    return View(prediction.world_from_camera[-1], torch.stack([half_width, half_height]))
