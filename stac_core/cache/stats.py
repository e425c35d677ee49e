"""What a cache reports about itself."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(frozen=True)
class CacheStats:
    """Plain numbers about one stream's memory. Bytes are those allocated, not estimates."""

    frames_seen: int = 0
    live_tokens: int = 0  # per layer and head: pinned, anchors, window
    anchors: int = 0  # of these, single tokens beyond the window
    retrieved_tokens: int = 0  # over all layers and heads
    byte_limit: int = 0  # of live and merged tokens together; 0 = none
    live_bytes: int = 0  # everything but the voxel memory
    camera_bytes: int = 0  # of these, memory of the pose head
    retrieved_bytes: int = 0  # of these, the retrieved set
    voxel_bytes: int = 0
    host_bytes: int = 0  # spilled voxels
    voxels: int = 0
    pivot_slots: int = 0
    buffer_slots: int = 0
    voxel_edge: float = 0.0  # in units of the prediction; 0 = not known
    inserted: int = 0  # tokens so far, over all layers and heads, from here on
    merged: int = 0
    buffered: int = 0
    gated: int = 0
    forgotten: int = 0  # for want of room
    unplaced: int = 0  # patches so far that were given no place
    spilled_voxels: int = 0
    reloaded_voxels: int = 0
    coarsened_voxels: int = 0
    members: dict[int, int] = field(default_factory=dict)  # if asked for: pivots by tokens merged, in octaves

    @property
    def full(self) -> bool:
        """Whether the limit has cost anything yet."""
        return bool(self.coarsened_voxels or self.forgotten)

    @property
    def bytes(self) -> int:
        """Of keys and values and all that belongs to them, on the device."""
        return self.live_bytes + self.voxel_bytes
