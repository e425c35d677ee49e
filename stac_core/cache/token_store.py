"""Keys and values of whole frames in buffers allocated once; new tokens are staged, then committed.

Buffers are one tensor per layer, so that growing or compacting needs spare memory of one layer only.
"""

from __future__ import annotations

import torch
from torch import Tensor

from stac_core.kernels.attend import Segment

GROWTH = 1.5  # of a store without a limit


class TokenStore:
    """Frames kept whole: slot t of every layer and head holds the same token of the same frame.

    Tokens staged during a forward pass can already be attended to, but belong to the store only after
    `commit`; `begin` forgets what a pass that failed had staged.
    """

    def __init__(self, layers: int) -> None:
        self.capacity = 0  # slots per layer and head
        self.keys: list[Tensor | None] = [None] * layers  # [heads, capacity, D]; allocated at first use
        self.values: list[Tensor | None] = [None] * layers
        self.frame = torch.empty(0, dtype=torch.int64)  # [length] on the host: frame number of each slot
        self._staged = [0] * layers

    @property
    def length(self) -> int:
        return len(self.frame)

    def begin(self, tokens: int, limit: int | None) -> None:
        """Make room for at most `tokens` more; `limit` = final size of the buffers, None = they may grow."""
        self._staged = [0] * len(self.keys)
        wanted = self.length + tokens
        if wanted > self.capacity:
            self.capacity = max(wanted, limit if limit is not None else int(GROWTH * self.capacity))

    def stage(self, layer: int, keys: Tensor, values: Tensor) -> None:
        """Append [heads, n, D] to one layer, behind what the same pass has staged before."""
        start = self.length + self._staged[layer]
        stop = start + keys.shape[1]
        if stop > self.capacity:
            raise ValueError(f"layer {layer}: {stop} tokens exceed the {self.capacity} announced to begin()")
        for buffers, tokens in ((self.keys, keys), (self.values, values)):
            buffer = self._allocated(buffers, layer, tokens)
            buffer[:, start:stop] = tokens
        self._staged[layer] += keys.shape[1]

    def commit(self, frame: Tensor) -> None:
        """Keep the staged tokens; `frame` [n] is the frame number of each, in the order of staging.

        RuntimeError where a layer has staged another number: the forward pass was not complete.
        """
        self.check_staged(len(frame))
        self.frame = torch.cat([self.frame, frame])
        self._staged = [0] * len(self.keys)

    def check_staged(self, tokens: int) -> None:
        """RuntimeError unless every layer has staged this many tokens."""
        if any(n != tokens for n in self._staged):
            raise RuntimeError(f"incomplete forward pass: layers staged {self._staged}, not {tokens} each")

    @property
    def staged(self) -> int:
        """The most tokens that a layer has staged."""
        return max(self._staged, default=0)

    def segment(self, layer: int) -> Segment | None:
        """Keys and values of one layer, staged ones included; None where there are none."""
        keys, values = self.keys[layer], self.values[layer]
        stop = self.length + self._staged[layer]
        if keys is None or values is None or stop == 0:
            return None
        return Segment(keys[:, :stop], values[:, :stop])

    def keep(self, kept: Tensor) -> None:
        """Keep the slots where `kept` [length] is true, in their order."""
        if bool(kept.all()):
            return
        slots = kept.nonzero()[:, 0]
        for buffers in (self.keys, self.values):
            for buffer in buffers:
                if buffer is not None:
                    buffer[:, : len(slots)] = buffer[:, slots.to(buffer.device)]
        self.frame = self.frame[kept]

    def take(self, other: TokenStore, slots: Tensor) -> None:
        """Append copies of the tokens in `slots` of another store of the same shape."""
        for layer, (keys, values) in enumerate(zip(other.keys, other.values, strict=True)):
            if keys is not None and values is not None:
                on_device = slots.to(keys.device)
                self.stage(layer, keys[:, on_device], values[:, on_device])
        self.commit(other.frame[slots])

    @property
    def bytes(self) -> int:
        """Allocated for keys and values."""
        return sum(b.nbytes for buffers in (self.keys, self.values) for b in buffers if b is not None)

    def _allocated(self, buffers: list[Tensor | None], layer: int, like: Tensor) -> Tensor:
        """The buffer of one layer, grown to the capacity if it is smaller."""
        old = buffers[layer]
        if old is None or old.shape[1] < self.capacity:
            with torch.inference_mode(False):  # the store outlives the mode of this pass
                new = torch.empty(
                    like.shape[0], self.capacity, like.shape[2], dtype=like.dtype, device=like.device
                )
            if old is not None:
                new[:, : self.length] = old[:, : self.length]
            buffers[layer] = new
            return new
        return old
