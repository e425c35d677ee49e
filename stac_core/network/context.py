"""The one thing the network asks of its surroundings: attention across frames.

Whoever implements this decides what the past is: all of it, a window, a compressed memory, or,
in one pass over many frames, a mask. The network never learns which.
"""

from __future__ import annotations

from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor


class RecordableAttention(Protocol):
    """Attention that can be recorded with the pass around it: it finds the past by itself, on the device."""

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """As in `AttentionContext`."""

    def attend_camera(self, iteration: int, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """As in `AttentionContext`."""

    def finish(self) -> None:
        """Once all layers have asked: what none of them waits for."""


class Plan(Protocol):
    """What attention of a context is like in every pass; hashable, equal where one recording serves."""

    def open(self, device: torch.device) -> RecordableAttention:
        """Over an empty past, until a context lends its own."""


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


@runtime_checkable
class LendingContext(AttentionContext, Protocol):
    """One whose attention can be recorded."""

    def plan(self) -> Plan | None:
        """None where the next pass has to ask layer by layer all the same."""

    def lend(self, attention: Any) -> None:
        """After `begin`, in place of all questions: have this pass answered by what the plan has opened."""

    def catch_up(self) -> None:
        """Once the pass is under way: do what the one before has left to be done, which this one can miss."""
