"""How many bytes live and merged tokens may take together, and how many of them voxels may have."""

from __future__ import annotations

import torch

from stac_core.cache.memory_model import live_bytes
from stac_core.config import CacheConfig, NetworkConfig


class ByteLimit:
    """The limit of one stream: given by the settings, or by what the device has left.

    Bytes for the live cache at its fullest are set aside; the rest is for voxels.
    """

    def __init__(self, config: CacheConfig, network: NetworkConfig, free: int | None) -> None:
        """free: bytes of the device that nobody has taken; None = not known: no limit unless one is given."""
        self.bytes: int | None = None  # None = no limit
        self._config, self._network, self._free = config, network, free
        self._set_aside = 0

    def begin(self, tokens_per_frame: int, dtype: torch.dtype, pins: int, merged: int = 0) -> None:
        """With these figures of a stream the limit is known. ValueError where it is less than the live cache.

        pins: pinned frames. merged: what voxels have taken, and never give back.
        """
        self._tokens_per_frame, self._dtype = tokens_per_frame, dtype
        self.bytes = self._limit(merged)
        self.pin(pins, merged)

    def pin(self, pins: int, merged: int) -> None:
        """Set aside what the live cache takes with so many pinned frames. ValueError: that is too much."""
        live = self._live_bytes(pins)
        if self.bytes is not None and self.bytes < live + merged:
            raise ValueError(self._refusal(live, pins, merged))
        self._set_aside = live

    @property
    def for_voxels(self) -> int | None:
        return None if self.bytes is None else self.bytes - self._set_aside

    def has_room(self, taken: int, more: int) -> bool:
        """Whether something of `more` bytes may stand beside the `taken` ones of the voxels."""
        return self.for_voxels is None or taken + more <= self.for_voxels

    def _limit(self, merged: int) -> int | None:
        """If none is given, half of what the live cache leaves; a stream that goes on keeps what it has."""
        config = self._config
        if config.memory_budget >= 0:
            return config.memory_budget or None
        if self._free is None or not config.can_be_limited:
            return None
        live = self._live_bytes(config.pinned_frames)
        return min(self._free, max((live + self._free) // 2, live + merged))

    def _live_bytes(self, pins: int) -> int:
        return live_bytes(self._config, self._network, self._tokens_per_frame, self._dtype, pins)

    def _refusal(self, live: int, pins: int, merged: int) -> str:
        given, cure = str(self._config.memory_budget), f"nearest value that works: {live + merged}"
        if self._config.memory_budget < 0:
            given += f", which gives {self.bytes} here"
            cure = "free memory of the device, or lower image.size, cache.window_size or cache.hh_size"
        beside = f" beside {merged} that the voxel memory has taken" if merged else " alone"
        return (
            f"cache.memory_budget = {given}: less than the {live} bytes of the live cache{beside}, with "
            f"{pins} pinned frames; {cure}"
        )
