"""Synthetic worlds with exact truth: images, metric depth, camera poses and intrinsics.

Batched, the same on CPU and GPU, deterministic by seed; no files, no downloads.
"""

from stac_core.worlds.config import WorldConfig
from stac_core.worlds.draws import world_seeds
from stac_core.worlds.world import World, WorldBatch, build_worlds

__all__ = ["World", "WorldBatch", "WorldConfig", "build_worlds", "world_seeds"]
