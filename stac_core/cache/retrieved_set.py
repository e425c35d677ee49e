"""The merged tokens attended to until the next retrieval."""

from __future__ import annotations

import torch

from stac_core.cache.key_values import KeyScale, KeyValues
from stac_core.cache.voxel_memory import Retrieved
from stac_core.kernels.attend import Segment


class RetrievedSet:
    """A copy, so that merging in between does not change what the network sees."""

    def __init__(self, layers: int, heads: int, bits: int, scale: KeyScale, found: Retrieved) -> None:
        longest = int(found.length.max())
        self.width = longest  # columns that are padding in every lane are left out
        self._bias = found.bias[:, :longest].unflatten(0, (layers, heads)).contiguous()
        self._memory = KeyValues(layers, bits, scale)
        keys, values = (
            part[:, :longest].unflatten(0, (layers, heads)) for part in (found.keys, found.values)
        )
        for layer in range(layers if longest else 0):
            self._memory.write(layer, 0, keys[layer], values[layer], longest, 0)

    @property
    def bytes(self) -> int:
        """Allocated."""
        return self._memory.bytes + self._bias.nbytes

    @property
    def tokens(self) -> int:
        """Over all lanes, without padding."""
        return int((self._bias > -torch.inf).sum())

    def segment(self, layer: int) -> Segment | None:
        """The set of one layer, with its bias; None where it is empty."""
        if not self.width:
            return None
        found = self._memory.segment(layer, self.width)
        return Segment(found.keys, found.values, self._bias[layer])
