"""What the pose head remembers of earlier frames: one token per frame, block and iteration.

STream3R (arXiv 2508.10893) gives every refinement iteration a memory of its own; in StreamVGGT
(arXiv 2507.11539) all iterations share one, so an iteration also sees what the ones before it left.
"""

from __future__ import annotations

import torch
from torch import Tensor

from stac_core.cache.key_values import KeyValues
from stac_core.cache.memory_model import camera_frames
from stac_core.cache.token_store import TokenStore
from stac_core.config import CacheConfig, NetworkConfig
from stac_core.kernels.attend import AnySegment


class CameraMemory:
    """Pinned and recent frames; always exact, because it is small."""

    def __init__(self, config: CacheConfig, network: NetworkConfig) -> None:
        self._config = config
        self._memories = 1 if network.camera_cache == "shared" else network.camera_iterations  # per block
        self._entries = network.camera_iterations // self._memories  # a frame leaves in each memory
        layers = network.camera_blocks * self._memories
        self.store = TokenStore(layers, KeyValues(layers))

    def begin(self, frames: int) -> None:
        bounded = self._config.rules.bounded
        most = self._config.pinned_frames + camera_frames(self._config) + self._config.chunk_size
        self.store.begin(frames * self._entries, most * self._entries if bounded else None)

    def stage(self, iteration: int, layer: int, keys: Tensor, values: Tensor) -> list[AnySegment]:
        """Append [heads, frames, D]; → everything that this iteration sees."""
        memory = layer * self._memories + (iteration if self._memories > 1 else 0)
        return self.store.stage(memory, keys, values)

    def settle(self, frames: Tensor, moment: int, oldest: int, pins: set[int]) -> None:
        """Keep the staged frames [n] and forget, except the pinned ones, all before `oldest`."""
        if not self.store.staged:  # the camera head may have been left out
            return
        self.store.commit(frames.repeat(self._entries), moment)
        kept = self.store.frame
        self.store.keep((kept >= oldest) | torch.isin(kept, torch.tensor(sorted(pins), dtype=torch.int64)))

    def check(self, frames: int) -> None:
        """RuntimeError where only part of the camera head has run."""
        if self.store.staged:
            self.store.check_staged(frames * self._entries)
