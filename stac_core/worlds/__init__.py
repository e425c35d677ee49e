"""Synthetic worlds with exact truth: images, metric depth, camera poses and intrinsics.

Batched, the same on CPU and GPU, deterministic by seed; no files, no downloads.
"""

from stac_core.worlds.config import WorldConfig
from stac_core.worlds.world import World, WorldBatch, sample_batch

__all__ = ["World", "WorldBatch", "WorldConfig", "sample_batch"]
