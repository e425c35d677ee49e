"""What the pose head remembers of earlier frames: one token per frame, block and iteration.

STream3R (arXiv 2508.10893) gives every refinement iteration a memory of its own; in StreamVGGT
(arXiv 2507.11539) all iterations share one, so an iteration also sees what the ones before it left.
"""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from stac_core.cache.key_values import KeyValues
from stac_core.cache.memory_model import camera_frames
from stac_core.cache.token_store import TokenStore
from stac_core.config import CacheConfig, NetworkConfig
from stac_core.kernels.attend import AnySegment
from stac_core.kernels.attend_listed import FIELDS, LENGTH_FIELD, write_list


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
        return self.store.stage(self._memory(iteration, layer), keys, values)

    def lend(self, frames: int) -> NDArray[np.int64]:
        """The same of all iterations and blocks, listed [iterations, blocks, 1, FIELDS].

        So many new frames come later: their places end each segment.
        """
        self.store.stage_all(frames * self._entries)
        listed = write_list([self.store.listed()], self.store.layers).reshape(-1, self._memories, FIELDS)
        behind = frames * np.arange(self._entries)[::-1]  # what later iterations append to the same memory
        by_iteration = listed.swapaxes(0, 1).repeat(self._entries, 0)
        by_iteration[..., LENGTH_FIELD] -= np.tile(behind, self._memories)[:, None]
        return by_iteration[:, :, None]

    def _memory(self, iteration: int, layer: int) -> int:
        return layer * self._memories + (iteration if self._memories > 1 else 0)

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
