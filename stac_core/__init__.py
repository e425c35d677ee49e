"""Streaming 3D reconstruction with a memory that stays small; useful without ROS.

    loaded = load_network(config.model)
    session = StreamSession(loaded.network, config)
    prediction = session.step([image])  # uint8 RGB [H, W, 3]
"""

from stac_core.checkpoint import LoadedNetwork, load_network
from stac_core.config import Config
from stac_core.images import ImageGeometry
from stac_core.prediction import Prediction
from stac_core.session import SessionStats, StreamSession

__all__ = [
    "Config",
    "ImageGeometry",
    "LoadedNetwork",
    "Prediction",
    "SessionStats",
    "StreamSession",
    "load_network",
]
