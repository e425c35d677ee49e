"""What a stream remembers, and how it forgets."""

from __future__ import annotations

from stac_core.cache.offline_cache import OfflineCache
from stac_core.cache.stream_cache import StreamCache
from stac_core.config import CacheConfig, NetworkConfig
from stac_core.kernels.select import Kernels


def open_cache(
    config: CacheConfig, network: NetworkConfig, kernels: Kernels, free: int | None = None
) -> StreamCache | OfflineCache:
    """The memory of one new stream, as the mode asks for. free: see `ByteLimit`."""
    if config.rules.offline:
        return OfflineCache(config)
    return StreamCache(config, network, kernels, free)
