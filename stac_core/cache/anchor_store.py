"""Single tokens that have outlived the window, chosen separately in every layer and head."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from stac_core.cache.key_values import KeyValues, as_index
from stac_core.cache.saved_state import State
from stac_core.cache.token_store import TokenStore
from stac_core.cache.voxel_keys import NOWHERE
from stac_core.cache.voxel_memory import Evicted
from stac_core.device import send
from stac_core.kernels.attend import AnySegment
from stac_core.kernels.attend_listed import ListedSegment
from stac_core.kernels.highest import Highest
from stac_core.kernels.take import Take


class AnchorStore:
    """Tokens in temporal order; every layer and head holds the same number, not the same tokens.

    A score lies in the slot of its token, so it cannot go stale.
    """

    def __init__(self, layers: int, heads: int, memory: KeyValues, device: torch.device, take: Take) -> None:
        self.memory, self._take = memory, take
        self.score = torch.empty(layers, heads, 0, device=device)  # [layers, heads, length]
        self.voxel = torch.empty(layers, heads, 0, dtype=torch.int64, device=device)  # key, or NOWHERE
        self.born = torch.empty(layers, heads, 0, dtype=torch.int32, device=device)  # see `TokenStore.born`

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

    def segments(self) -> list[AnySegment]:
        """The tokens of every layer; empty where there are none."""
        return self.memory.segments(self.length) if self.length else []

    def listed(self) -> ListedSegment | None:
        """The same for kernels that read where they lie."""
        return self.memory.listed(self.length)

    def state(self) -> State:
        notes = {"score": self.score, "voxel": self.voxel, "born": self.born}
        return {**notes, "memory": self.memory.state(self.length)}

    def restore(self, state: State) -> None:
        self.score, self.voxel, self.born = state["score"], state["voxel"], state["born"]
        self.memory.restore(state.get("memory", {}))

    def candidates(self, window: TokenStore, leaving: Tensor) -> Candidates:
        """The anchors, then the window's `leaving` slots."""
        if window.score is None:
            raise RuntimeError("anchors are chosen by score, and the window keeps none")
        where = as_index(leaving, self.score.device)
        new = (
            window.score[..., where],
            self.voxel.new_full((len(leaving),), NOWHERE) if window.voxel is None else window.voxel[where],
            send(window.born[leaving].int(), self.score.device),
        )
        own, shape = (self.score, self.voxel, self.born), (*self.score.shape[:2], -1)
        return Candidates(*(torch.cat([a, b.expand(shape)], -1) for a, b in zip(own, new, strict=True)))

    def renew(
        self, window: TokenStore, leaving: Tensor, candidates: Candidates, chosen: Highest
    ) -> Evicted | None:
        """Keep the candidates chosen in each lane; → the others, where somebody has asked for them.

        The kept ones are written to fresh buffers, so that a step that fails can go back.
        """
        parts = self._parts(window, leaving)
        renewed = self.memory.emptied()
        renewed.hold(tuple(self._take(part, chosen.places) for part in parts))
        evicted = None
        if chosen.rest is not None:
            gone = tuple(self._take(part, chosen.rest) for part in parts)
            score, voxel = (
                note.flatten(0, 1).gather(1, chosen.rest) for note in (candidates.score, candidates.voxel)
            )
            evicted = Evicted(*self.memory.decode(gone), score, voxel)
        self.memory = renewed
        kept = chosen.places.unflatten(0, self.score.shape[:2])
        self.score, self.voxel, self.born = (note.gather(-1, kept) for note in candidates)
        return evicted

    def _parts(self, window: TokenStore, leaving: Tensor) -> list[list[Tensor]]:
        """Of each stored field the anchors [lanes, n, …], then the leaving tokens."""
        where = as_index(leaving, self.score.device)
        new = self.memory.convert(window.memory, tuple(field[:, where] for field in window.fields))
        if not self.length:
            return [[added] for added in new]
        return [[own[:, : self.length], added] for own, added in zip(self.memory.fields, new, strict=True)]


class Candidates(NamedTuple):
    """Tokens that compete for the places of anchors [layers, heads, n]."""

    score: Tensor
    voxel: Tensor
    born: Tensor
