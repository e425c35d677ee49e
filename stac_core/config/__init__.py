"""Every setting of the core, its default and its limits; the only place where a default lives.

Sections are frozen dataclasses; a receiver gets its section, never the whole. Dotted names
(`cache.window_size`) are the names of ROS parameters and of YAML keys alike.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from stac_core.config.cache import MODES, CacheConfig
from stac_core.config.model import ImageConfig, KernelConfig, ModelConfig
from stac_core.config.network import NETWORKS, PATCH_SIZE, NetworkConfig
from stac_core.config.stream import SubmapConfig, TrackingConfig

__all__ = [
    "MODES", "NETWORKS", "PATCH_SIZE", "CacheConfig", "Config", "ImageConfig", "KernelConfig", "ModelConfig",
    "NetworkConfig", "SubmapConfig", "TrackingConfig", "require_stream",
]  # fmt: skip


@dataclass(frozen=True)
class Config:
    """All sections of the core."""

    model: ModelConfig = field(default_factory=ModelConfig)
    image: ImageConfig = field(default_factory=ImageConfig)
    cache: CacheConfig = field(default_factory=CacheConfig)
    kernels: KernelConfig = field(default_factory=KernelConfig)
    submap: SubmapConfig = field(default_factory=SubmapConfig)
    tracking: TrackingConfig = field(default_factory=TrackingConfig)


def require_stream(config: Config) -> None:
    """Raises ValueError for a mode that needs all images at once, where they come one by one."""
    if config.cache.rules.offline:
        streams = ", ".join(name for name, mode in MODES.items() if not mode.offline)
        raise ValueError(
            f"cache.mode = {config.cache.mode!r} needs all images at once; a node streams: {streams}"
        )
