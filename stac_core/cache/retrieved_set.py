"""The merged tokens attended to until the next retrieval."""

from __future__ import annotations

import torch

from stac_core.cache.key_values import KeyScale, KeyValues
from stac_core.cache.saved_state import State
from stac_core.cache.voxel_memory import Retrieved
from stac_core.kernels.attend import AnySegment


class RetrievedSet:
    """A copy, so that merging in between does not change what the network sees."""

    def __init__(self, layers: int, bits: int, scale: KeyScale) -> None:
        self._bias = torch.empty(layers, 0, 0)  # [layers, heads, tokens]
        self._memory = KeyValues(layers, bits, scale)

    @property
    def width(self) -> int:
        """Tokens of the fullest lane; columns that are padding in every lane are left out."""
        return self._bias.shape[-1]

    def fill(self, found: Retrieved) -> None:
        """Take over what was found, once."""
        width = int(found.length.max())
        self._bias = found.bias[:, :width].unflatten(0, (len(self._bias), -1)).contiguous()
        if width:
            fields = self._memory.encode(found.keys[:, :width], found.values[:, :width])
            self._memory.put(0, fields, width, 0)

    def state(self) -> State:
        return {"bias": self._bias, "memory": self._memory.state(self.width)}

    def restore(self, state: State) -> None:
        self._bias = state["bias"]
        self._memory.restore(state.get("memory", {}))

    @property
    def bytes(self) -> int:
        """Allocated."""
        return self._memory.bytes + self._bias.nbytes

    @property
    def tokens(self) -> int:
        """Over all lanes, without padding."""
        return int((self._bias > -torch.inf).sum())

    def segments(self) -> list[AnySegment]:
        """The set of every layer, with its bias; empty where it is."""
        return self._memory.segments(self.width, self._bias) if self.width else []
