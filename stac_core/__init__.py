"""Streaming 3D reconstruction with a memory that stays small; useful without ROS.

loaded = load_network(config.model, config.kernels)
session = StreamSession(loaded.network, config)
prediction = session.step([image])  # uint8 RGB [H, W, 3]
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from stac_core.checkpoint import LoadedNetwork, load_network
    from stac_core.confidence import most_confident
    from stac_core.config import Config
    from stac_core.first_use import check_budget, warm_up
    from stac_core.geometry import unproject_depth, unproject_pixels
    from stac_core.images import ImageGeometry, ResizedImages
    from stac_core.intrinsics import check_intrinsics
    from stac_core.moves import Moves
    from stac_core.prediction import Prediction
    from stac_core.session import SessionStats, StreamSession

__all__ = [
    "Config",
    "ImageGeometry",
    "LoadedNetwork",
    "Moves",
    "Prediction",
    "ResizedImages",
    "SessionStats",
    "StreamSession",
    "check_budget",
    "check_intrinsics",
    "load_network",
    "most_confident",
    "unproject_depth",
    "unproject_pixels",
    "warm_up",
]

_HOMES = {
    "Config": "config",
    "ImageGeometry": "images",
    "LoadedNetwork": "checkpoint",
    "Moves": "moves",
    "Prediction": "prediction",
    "ResizedImages": "images",
    "SessionStats": "session",
    "StreamSession": "session",
    "check_budget": "first_use",
    "check_intrinsics": "intrinsics",
    "load_network": "checkpoint",
    "most_confident": "confidence",
    "unproject_depth": "geometry",
    "unproject_pixels": "geometry",
    "warm_up": "first_use",
}


def __getattr__(name: str) -> Any:
    """Load a public name when it is asked for: PyTorch takes seconds, and settings need none of it."""
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)
