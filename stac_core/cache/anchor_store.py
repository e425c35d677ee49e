"""Single tokens that have outlived the window, chosen separately in every layer and head."""

from __future__ import annotations

import torch
from torch import Tensor

from stac_core.cache.eviction import Choice
from stac_core.cache.key_values import KeyValues
from stac_core.cache.saved_state import State
from stac_core.cache.token_store import TokenStore
from stac_core.cache.voxel_keys import NOWHERE
from stac_core.cache.voxel_memory import Evicted
from stac_core.kernels.attend import AnySegment


class AnchorStore:
    """Tokens in temporal order; every layer and head holds the same number, not the same tokens.

    A score lies in the slot of its token, so it cannot go stale.
    """

    def __init__(self, layers: int, heads: int, memory: KeyValues, device: torch.device) -> None:
        self.memory = memory
        self.score = torch.empty(layers, heads, 0, device=device)  # [layers, heads, length]
        self.voxel = torch.empty(layers, heads, 0, dtype=torch.int64, device=device)  # key, or NOWHERE
        self.born = torch.empty(layers, heads, 0, dtype=torch.int32, device=device)  # pass it came with

    @property
    def length(self) -> int:
        return self.score.shape[-1]

    @property
    def bytes(self) -> int:
        """Allocated."""
        return self.memory.bytes + self.score.nbytes + self.voxel.nbytes + self.born.nbytes

    def notes(self, layers: int, heads: int) -> tuple[Tensor, Tensor]:
        """Score and voxel key of the tokens, both [layers, heads, length]."""
        return self.score, self.voxel

    def segment(self, layer: int) -> AnySegment | None:
        """The tokens of one layer; None where there are none."""
        return self.memory.segment(layer, self.length) if self.length else None

    def state(self) -> State:
        notes = {"score": self.score, "voxel": self.voxel, "born": self.born}
        return {**notes, "memory": self.memory.state(self.length)}

    def restore(self, state: State) -> None:
        self.score, self.voxel, self.born = state["score"], state["voxel"], state["born"]
        self.memory.restore(state.get("memory", {}))

    def candidates(self, window: TokenStore, leaving: Tensor) -> tuple[Tensor, Tensor]:
        """Score and pass of birth [layers, heads, n] of the anchors, then of the window's `leaving` slots."""
        score, born = _scores(window, leaving), window.born[leaving].to(self.born)
        born = born.expand(*self.born.shape[:2], -1)
        return torch.cat([self.score, score], -1), torch.cat([self.born, born], -1)

    def renew(
        self, window: TokenStore, leaving: Tensor, choice: Choice, capacity: int, evict: bool
    ) -> Evicted | None:
        """Keep the chosen of the candidates; → the others, where `evict` says that somebody wants them.

        The chosen are written to fresh buffers, so that a step that fails can go back.
        """
        score, born = self.candidates(window, leaving)
        voxel = self._voxels(window, leaving)
        self.memory.adopt(window.memory)
        renewed = self.memory.emptied()
        keys, values = [], []
        for layer, (kept, dropped) in enumerate(zip(choice.kept, choice.dropped, strict=True)):
            fields = self._joined(window, leaving, layer)
            if evict:
                gone = self.memory.decode(layer, tuple(_gather(field, dropped) for field in fields))
                keys.append(gone[0])
                values.append(gone[1])
            renewed.put(layer, 0, tuple(_gather(field, kept) for field in fields), capacity, 0)
        self.memory = renewed
        evicted = None
        if evict:
            out = choice.dropped
            evicted = Evicted(
                torch.cat(keys), torch.cat(values), score.gather(-1, out).flatten(0, 1),
                voxel.gather(-1, out).flatten(0, 1),
            )  # fmt: skip
        kept = choice.kept
        self.score, self.voxel, self.born = (note.gather(-1, kept) for note in (score, voxel, born))
        return evicted

    def _joined(self, window: TokenStore, leaving: Tensor, layer: int) -> tuple[Tensor, ...]:
        """Stored fields [heads, n, …] of the anchors and of the leaving tokens."""
        source = window.fields(layer)
        slots = leaving.to(source[0].device)
        new = self.memory.convert(window.memory, layer, tuple(field[:, slots] for field in source))
        if not self.length:
            return new
        own = (field[:, : self.length] for field in self.memory.fields(layer))
        return tuple(torch.cat(pair, 1) for pair in zip(own, new, strict=True))

    def _voxels(self, window: TokenStore, leaving: Tensor) -> Tensor:
        if window.voxel is None:
            new = self.voxel.new_full((len(leaving),), NOWHERE)
        else:
            new = window.voxel[leaving.to(window.voxel.device)]
        return torch.cat([self.voxel, new.expand(*self.voxel.shape[:2], -1)], -1)


def _scores(window: TokenStore, leaving: Tensor) -> Tensor:
    if window.score is None:
        raise RuntimeError("anchors are chosen by score, and the window keeps none")
    return window.score[..., leaving.to(window.score.device)]


def _gather(field: Tensor, slots: Tensor) -> Tensor:
    """field [heads, n, w], slots [heads, m] → [heads, m, w]."""
    return field.gather(1, slots[..., None].expand(-1, -1, field.shape[-1]))
