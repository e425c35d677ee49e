"""Keys and values of whole frames in buffers allocated once; new tokens are staged, then committed."""

from __future__ import annotations

import torch
from torch import Tensor

from stac_core.cache.key_values import Fields, KeyValues, Move, as_index
from stac_core.cache.saved_state import State
from stac_core.cache.voxel_keys import NOWHERE
from stac_core.kernels.attend import AnySegment, Segment
from stac_core.kernels.attend_listed import ListedSegment

GROWTH = 1.5  # of a store without a limit


class TokenStore:
    """Frames kept whole: slot t of every layer and head holds the same token of the same frame.

    Tokens staged during a forward pass can already be attended to, but belong to the store only after
    `commit`; `begin` forgets what a pass that failed had staged.
    """

    def __init__(self, layers: int, memory: KeyValues) -> None:
        self.capacity = 0  # slots per layer and head
        self.memory = memory
        self.frame = torch.empty(0, dtype=torch.int64)  # [length] on the host: frame of each slot
        self.born = torch.empty(0, dtype=torch.int64)  # [length] on the host: when its pass began
        self.voxel: Tensor | None = None  # [length] voxel key, where tokens are placed in space
        self.score: Tensor | None = None  # [layers, heads, length], where tokens are scored
        self._staged = [0] * layers
        self._staying: Tensor | None = None  # [length] slots to be moved to the front when next used
        self._moves: list[Move] = []  # those of them that are left, once that has begun; the next one is last

    @property
    def length(self) -> int:
        return len(self.frame)

    @property
    def layers(self) -> int:
        return len(self._staged)

    @property
    def bytes(self) -> int:
        """Allocated."""
        notes = (self.frame, self.born, self.voxel, self.score)
        return self.memory.bytes + sum(note.nbytes for note in notes if note is not None)

    def notes(self, layers: int, heads: int) -> tuple[Tensor, Tensor]:
        """Score and voxel key of the committed tokens, both [layers, heads, length]."""
        shape = (layers, heads, self.length)
        score = torch.full(shape, torch.nan) if self.score is None else self.score
        voxel = torch.full(shape, NOWHERE) if self.voxel is None else self.voxel.expand(shape)
        return score, voxel.to(score.device)

    def begin(self, tokens: int, limit: int | None) -> None:
        """Make room for at most `tokens` more; `limit` = final size of the buffers, None = they may grow."""
        self._close_gaps()
        self._staged = [0] * len(self._staged)
        wanted = self.length + tokens
        if wanted > self.capacity:
            self.capacity = max(wanted, limit if limit is not None else int(GROWTH * self.capacity))

    def stage(self, layer: int, keys: Tensor, values: Tensor) -> list[AnySegment]:
        """Append [heads, n, D] to one layer; → all that can be attended to now, the new tokens included."""
        start = self.length + self._staged[layer]
        stop = start + keys.shape[1]
        if stop > self.capacity:
            raise ValueError(f"layer {layer}: {stop} tokens exceed the {self.capacity} announced to begin()")
        self.memory.write(layer, start, keys, values, self.capacity, self.length)
        self._staged[layer] += keys.shape[1]
        if self.memory.exact:
            return [self.memory.segment(layer, stop)]
        past = [self.memory.segment(layer, start)] if start else []
        return [*past, Segment(keys, values)]

    def stage_all(self, tokens: int) -> None:
        """So many tokens are about to be appended to every layer by whoever knows `listed`."""
        self.memory.reserve(self.capacity, self.length)
        self._staged = [tokens] * len(self._staged)

    def listed(self) -> ListedSegment | None:
        """The tokens of every layer, staged ones included; None where there are none."""
        self._close_gaps()
        return self.memory.listed(self.length + self.staged)

    def segments(self) -> list[AnySegment]:
        """The committed tokens of every layer; empty where there are none."""
        if not self.length:
            return []
        self._close_gaps()
        return self.memory.segments(self.length)

    @property
    def fields(self) -> Fields:
        """The buffers of all lanes; slot t is the t-th along their second axis."""
        self._close_gaps()
        return self.memory.fields

    @property
    def staged(self) -> int:
        """The most tokens that a layer has staged."""
        return max(self._staged, default=0)

    def check_staged(self, tokens: int) -> None:
        """RuntimeError unless every layer has staged this many tokens."""
        if any(n != tokens for n in self._staged):
            raise RuntimeError(f"incomplete forward pass: layers staged {self._staged}, not {tokens} each")

    def commit(self, frame: Tensor, born: int) -> None:
        """Keep the staged tokens; `frame` [n] is the frame of each, `born` when their pass began.

        RuntimeError where a layer has staged another number: the forward pass was not complete.
        """
        self.check_staged(len(frame))
        self.frame = torch.cat([self.frame, frame])
        self.born = torch.cat([self.born, torch.full_like(frame, born)])
        self._staged = [0] * len(self._staged)

    def keep(self, kept: Tensor) -> None:
        """Keep the slots where `kept` [length] is true, in their order.

        The buffers stay as they are until they are next used, so that a step that fails can go back.
        """
        slots = kept.nonzero()[:, 0]
        if len(slots) == len(kept):
            return
        if self._moves:
            self._close_gaps()
        self._staying = slots if self._staying is None else self._staying[slots]
        self.frame, self.born = self.frame[slots], self.born[slots]
        self.voxel, self.score = _pick(slots, self.voxel, self.score)

    def state(self) -> State:
        """All committed tokens."""
        notes = {"frame": self.frame, "born": self.born, "voxel": self.voxel, "score": self.score}
        present = {name: note for name, note in notes.items() if note is not None}
        self._close_gaps()
        return {**present, "memory": self.memory.state(self.length)}

    def restore(self, state: State) -> None:
        self.frame, self.born = state["frame"].cpu(), state["born"].cpu()
        self.voxel, self.score = state.get("voxel"), state.get("score")
        self.memory.restore(state.get("memory", {}))

    def take(self, other: TokenStore, slots: Tensor, limit: int) -> None:
        """Append copies of the tokens in `slots` of another store; `limit` = final size of the buffers."""
        self.begin(len(slots), limit)
        where = as_index(slots, other.memory.device)
        moved = self.memory.convert(other.memory, tuple(field[:, where] for field in other.fields))
        self.memory.put(self.length, moved, self.capacity, self.length)
        self.frame = torch.cat([self.frame, other.frame[slots]])
        self.born = torch.cat([self.born, other.born[slots]])
        voxel, score = _pick(slots, other.voxel, other.score)
        self.voxel, self.score = _extend(self.voxel, voxel), _extend(self.score, score)

    def _close_gaps(self) -> None:
        """Move what stays to the front. What an interruption leaves undone is done by the next call."""
        if self._staying is not None:
            slots, count = as_index(self._staying, self.memory.device), len(self._staying)
            self._moves = self.memory.compact(slots, count)[::-1]
            self._staying = None
        while self._moves:
            self._moves[-1]()
            self._moves.pop()


def _pick(slots: Tensor, *notes: Tensor | None) -> list[Tensor | None]:
    """A part of each note there is, alone, without the memory of the rest."""
    where = next((as_index(slots, note.device) for note in notes if note is not None), slots)
    return [None if note is None else note[..., where].clone() for note in notes]


def _extend(own: Tensor | None, new: Tensor | None) -> Tensor | None:
    if own is None or new is None:
        return own if new is None else new
    return torch.cat([own, new], -1)
