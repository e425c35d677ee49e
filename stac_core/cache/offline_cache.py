"""The modes that see a whole sequence in one pass and remember nothing: `full` and `window`."""

from __future__ import annotations

from stac_core.cache.camera_tokens import Cameras
from stac_core.cache.one_pass import OnePass
from stac_core.cache.stats import CacheStats
from stac_core.cache.token_positions import TokenPositions
from stac_core.config import CacheConfig


class OfflineCache(OnePass):
    """A one-pass context with the interface of a stream of exactly one pass."""

    def __init__(self, config: CacheConfig) -> None:
        # The mask counts the frame itself, the setting counts the frames before it.
        super().__init__(config.mode, config.window_size + 1)
        self._config = config
        self.reset()

    def reset(self) -> None:
        self.frames_seen = 0
        self._frames = 0

    def begin(self, frames: int, tokens_per_frame: int) -> None:
        if self.frames_seen:
            raise ValueError(
                f"cache.mode = {self._config.mode!r} takes the whole sequence in one step, and "
                f"{self.frames_seen} frames have been: reset, or choose a streaming mode"
            )
        super().begin(frames, tokens_per_frame)
        self._frames = frames

    wants_positions = False

    def settle(self, positions: TokenPositions | None = None, cameras: Cameras | None = None) -> None:
        self.frames_seen, self._frames = self._frames, 0

    def stats(self, members: bool = False) -> CacheStats:
        return CacheStats(frames_seen=self.frames_seen)
