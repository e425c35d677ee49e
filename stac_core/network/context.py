"""The one thing the network asks of its surroundings: attention across frames.

Whoever implements this decides what the past is: all of it, a window, a compressed memory, or,
in one pass over many frames, a mask. The network never learns which.
"""

from __future__ import annotations

from typing import Protocol

from torch import Tensor


class AttentionContext(Protocol):
    """Attention of the global blocks and of the camera trunk, the only layers that look across frames.

    q, k and v hold only during the call, their memory may serve the next one: whoever keeps keys copies
    them. So does what is returned: the network is done with it before it asks again.
    """

    frames_seen: int  # frames of this stream before the current call; 0 = the stream begins

    def begin(self, frames: int, tokens_per_frame: int) -> None:
        """Announce one forward pass; forget whatever an earlier, failed pass had staged."""

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Global block `layer`. q, k, v [B, heads, frames·tokens, dim], keys normalised and rotated."""

    def attend_camera(self, iteration: int, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Camera trunk block `layer` in refinement `iteration`. q, k, v [B, heads, frames, dim]."""
