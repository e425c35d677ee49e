"""What a cache reports about itself."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class CacheStats:
    """Plain numbers about one stream's memory; bytes are those allocated, not estimates."""

    frames_seen: int = 0
    live_tokens: int = 0  # per layer and head
    live_bytes: int = 0
    camera_bytes: int = 0
