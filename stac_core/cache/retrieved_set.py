"""The merged tokens attended to until the next retrieval."""

from __future__ import annotations

import torch

from stac_core.cache.key_values import KeyScale, KeyValues
from stac_core.cache.later import Later
from stac_core.cache.saved_state import State
from stac_core.cache.voxel_retrieval import Retrieved
from stac_core.kernels.attend import AnySegment
from stac_core.kernels.attend_listed import ListedSegment


class RetrievedSet:
    """A copy, so that merging in between does not change what the network sees."""

    def __init__(self, layers: int, bits: int, scale: KeyScale) -> None:
        self._bias = torch.empty(layers, 0, 0)  # [layers, heads, tokens]
        self._memory = KeyValues(layers, bits, scale)
        self._lengths: list[int] | Later = []  # tokens of each lane that are not padding

    @property
    def width(self) -> int:
        """Tokens of the fullest lane; columns that are padding in every lane are left out."""
        return max(self.lengths, default=0)

    @property
    def lengths(self) -> list[int]:
        """Tokens of each lane, without padding."""
        return self._lengths.list if isinstance(self._lengths, Later) else self._lengths

    def fill(self, found: Retrieved) -> None:
        """Take over what was found, once, without a copy of what is exact."""
        self._lengths = Later(found.length)
        self._bias = found.bias.unflatten(0, (len(self._bias), -1))
        self._memory.hold(self._memory.encode(found.keys, found.values))

    def state(self) -> State:
        return {"bias": self._bias[..., : self.width], "memory": self._memory.state(self.width)}

    def restore(self, state: State) -> None:
        self._bias = state["bias"]
        self._lengths = (self._bias > -torch.inf).sum(-1).flatten().tolist()
        self._memory.restore(state.get("memory", {}))

    @property
    def bytes(self) -> int:
        """Allocated."""
        return self._memory.bytes + self._bias.nbytes

    @property
    def tokens(self) -> int:
        """Over all lanes, without padding."""
        return sum(self.lengths)

    def segments(self) -> list[AnySegment]:
        """The set of every layer, with its bias; empty where it is."""
        width = self.width
        return self._memory.segments(width, self._bias[..., :width]) if width else []

    def listed(self) -> ListedSegment | None:
        """The same for kernels that read where it lies."""
        return self._memory.listed(self.width, self._bias.flatten(0, 1))
