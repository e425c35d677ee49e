"""Tokens that are attended to as they came: pinned frames, special tokens, anchors and the window.

Sources: STAC (arXiv 2603.20284), temporal memory; XStreamVGGT (arXiv 2601.01204), pruning.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from stac_core.cache import scores
from stac_core.cache.anchor_store import AnchorStore
from stac_core.cache.eviction import RULES
from stac_core.cache.key_values import KeyScale, KeyValues
from stac_core.cache.memory_model import anchor_tokens, window_frames
from stac_core.cache.saved_state import State
from stac_core.cache.token_store import TokenStore
from stac_core.cache.voxel_memory import Evicted
from stac_core.config import CacheConfig, NetworkConfig
from stac_core.kernels.attend import AnySegment, decode_keys, decode_segments
from stac_core.kernels.attend_listed import ListedSegment
from stac_core.kernels.select import Kernels


class LiveTokens(NamedTuple):
    """What a stream attends to besides retrieved tokens, for looking into it."""

    keys: Tensor  # [layers, heads, T, D]
    values: Tensor  # [layers, heads, T, D]
    score: Tensor  # [layers, heads, T]; NaN where tokens are not scored
    voxel: Tensor  # [layers, heads, T] voxel keys; NOWHERE where a token has no place


class LiveCache:
    """The stores of one stream, and who stays in them. Attention sees them in the order named above."""

    def __init__(
        self, config: CacheConfig, network: NetworkConfig, scale: KeyScale, kernels: Kernels
    ) -> None:
        self._config, self._network, self._scale, layers = config, network, scale, network.layers
        self._kernels = kernels
        self._rules = config.rules
        # Pruning judges by the last pass alone.
        self._decay = scores.Decay(0.0 if self._rules.pruned else config.temperature, config.decay_unit)
        self.window = TokenStore(layers, KeyValues(layers, config.window_bits, scale))
        self._pinned = TokenStore(layers, KeyValues(layers, config.pinned_bits, scale))
        self._special = TokenStore(layers, KeyValues(layers, config.window_bits, scale))
        self._anchors: AnchorStore | None = None
        # Of this pass: all that a layer sees but the window, by layer, once a layer asks.
        self._past: list[list[AnySegment]] | None = None
        self._contributions: list[list[Tensor]] = [[]] * layers  # [heads, n] of this pass, segment by segment
        self._mass: Tensor | None = None  # [layers, heads, T] in their place, where all layers come together
        self._frames = self._tokens_per_frame = 0  # of this pass
        self._now = 0  # when this pass has ended, in the time of scores

    @property
    def by_mass(self) -> bool:
        """Whether scores come from the attention received."""
        return self._rules.anchors and not (self._rules.pruned and self._config.importance != "mass")

    @property
    def length(self) -> int:
        """Tokens per layer and head."""
        return sum(store.length for store in self._stores)

    @property
    def anchors(self) -> int:
        """Of these, single tokens beyond the window."""
        return self._anchors.length if self._anchors else 0

    @property
    def bytes(self) -> int:
        """Allocated."""
        return sum(store.bytes for store in self._stores)

    def open(self, device: torch.device) -> None:
        """Prepare what needs to know the device; before the first tokens."""
        if self._rules.anchors:
            layers, bits = self._network.layers, self._config.anchor_bits
            memory = KeyValues(layers, bits, self._scale)
            self._anchors = AnchorStore(layers, self._network.heads, memory, device, self._kernels.take)

    def begin(self, frames: int, tokens_per_frame: int) -> None:
        """Announce a pass; what an earlier, failed one has staged is forgotten."""
        self._frames, self._tokens_per_frame, most = frames, tokens_per_frame, None
        if self._rules.bounded:
            most = (window_frames(self._config) + self._config.chunk_size) * tokens_per_frame
        self.window.begin(frames * tokens_per_frame, most)
        self._past = self._mass = None

    def stage(self, layer: int, keys: Tensor, values: Tensor) -> list[AnySegment]:
        """Take in new tokens [heads, n, D] of one layer; → all that it sees, the new ones last."""
        if self._past is None:
            stores = [store.segments() for store in self._stores if store is not self.window and store.length]
            self._past = [list(segments) for segments in zip(*stores, strict=True)]
        past = self._past[layer] if self._past else []
        return past + self.window.stage(layer, keys, values)

    def lend(self) -> list[ListedSegment | None]:
        """The same of all layers, whose new tokens come later: their places end the last segment."""
        self.window.stage_all(self._frames * self._tokens_per_frame)
        return [store.listed() for store in self._stores]

    def credit(self, layer: int, q: Tensor, live: list[AnySegment], mass: list[Tensor] | None) -> None:
        """Note what queries [heads, M, D] make of the live tokens of a layer, and what these received."""
        if self._rules.anchors:
            self._contributions[layer] = self._contribution(q, live, mass)

    def credit_all(self, mass: Tensor) -> None:
        """The same for all layers at once [layers, heads, T]; `commit` reads it."""
        if self._rules.anchors:
            self._mass = mass

    def commit(self, first_frame: int, moment: int) -> None:
        """The staged tokens become part of the stream, with their scores. RuntimeError where some lack.

        first_frame, moment: frames and passes before this pass.
        """
        frames = torch.arange(first_frame, first_frame + self._frames)
        born, lasts = self._decay.time(moment, first_frame), self._decay.time(1, self._frames)
        self.window.commit(frames.repeat_interleave(self._tokens_per_frame), born)
        self._now = born + lasts
        self._past = None
        if self._rules.anchors:
            self._score(lasts)

    def place(self, keys: Tensor) -> None:
        """Voxel keys [n] of the new tokens."""
        old = self.window.voxel
        self.window.voxel = keys if old is None else torch.cat([old, keys])

    @property
    def voxels(self) -> list[Tensor]:
        """Voxel keys of the tokens that have any, store by store."""
        return [store.voxel for store in self._stores if store.voxel is not None]

    @voxels.setter
    def voxels(self, keys: list[Tensor]) -> None:
        placed = [store for store in self._stores if store.voxel is not None]
        for store, new in zip(placed, keys, strict=True):
            store.voxel = new

    def forget(self, oldest: int, pins: set[int], moment: int, wanted: bool) -> Evicted | None:
        """Pinned frames move to their store, frames before `oldest` compete or go.

        → who went, where `wanted`.
        """
        frame = self.window.frame
        if not len(frame):  # a pass of the camera head alone
            return None
        leaves, stays = frame < oldest, frame >= oldest
        here = [pin for pin in pins if int(frame[0]) <= pin <= int(frame[-1])]
        if here:
            pinned = torch.isin(frame, torch.tensor(here))
            self._pinned.take(self.window, pinned.nonzero()[:, 0], len(pins) * self._tokens_per_frame)
            leaves, stays = leaves & ~pinned, stays & ~pinned
        leaving, evicted = leaves.nonzero()[:, 0], None
        if len(leaving):
            leaving = self._keep_special(leaving)
            evicted = self._evict(leaving, moment, wanted)
        self.window.keep(stays)
        return evicted

    def tokens(self) -> LiveTokens:
        """All of them, decoded, each store in temporal order."""
        stores = [store for store in self._stores if store.length]
        layers = []
        for stored in zip(*(store.segments() for store in stores), strict=True):
            segments = decode_segments(stored, self.window.memory.dtype)
            layers.append(
                [torch.cat(parts, 1) for parts in zip(*((s.keys, s.values) for s in segments), strict=True)]
            )
        keys, values = (torch.stack(parts) for parts in zip(*layers, strict=True))
        notes = [store.notes(self._network.layers, self._network.heads) for store in stores]
        score, voxel = (torch.cat(parts, -1) for parts in zip(*notes, strict=True))
        return LiveTokens(keys, values, score, voxel)

    def state(self) -> State:
        parts: dict[str, Any] = {"pinned": self._pinned, "special": self._special, "window": self.window}
        if self._anchors is not None:
            parts["anchors"] = self._anchors
        return {name: part.state() for name, part in parts.items()}

    def restore(self, state: State) -> None:
        if "anchors" in state:
            self.open(state["anchors"]["score"].device)
            if self._anchors is not None:
                self._anchors.restore(state["anchors"])
        for name, store in (("pinned", self._pinned), ("special", self._special), ("window", self.window)):
            store.restore(state[name])

    @property
    def _stores(self) -> list[TokenStore | AnchorStore]:
        stores = (self._pinned, self._special, self._anchors, self.window)
        return [store for store in stores if store is not None]

    def _contribution(self, q: Tensor, live: list[AnySegment], mass: list[Tensor] | None) -> list[Tensor]:
        """What this pass adds to the scores of the live tokens of one layer [heads, n], in parts."""
        if mass is not None:
            return mass[: len(live)]
        keys = torch.cat([decode_keys(segment, q.dtype) for segment in live], 1)
        newest, special = q[:, -self._tokens_per_frame :], self._network.special_tokens
        if self._config.importance == "pooled":
            return [scores.importance_pooled(newest, keys, special)]
        return [scores.importance_per_head(newest, keys, special)]

    def _score(self, lasts: int) -> None:
        """Fold the contributions of a pass that lasts so long into the scores, each in its token's place."""
        new = self._mass
        if new is None:
            new = torch.cat([part for parts in self._contributions for part in parts], -1)
            new = new.unflatten(-1, (len(self._contributions), -1)).transpose(0, 1)  # [layers, heads, T]
        if self.by_mass:
            new = scores.received(new, self._frames * self._tokens_per_frame)
        new = new * self._decay.gathered(lasts)
        known = [store.score for store in self._stores if store.score is not None]  # new tokens come last
        score = scores.update(torch.cat(known, -1), new, self._decay.left(lasts)) if known else new
        lengths = [store.length for store in self._stores]
        for store, part in zip(self._stores, score.split(lengths, -1), strict=True):
            store.score = part.clone()  # without the memory of the others
        self._contributions, self._mass = [[]] * len(self._contributions), None

    def _keep_special(self, leaving: Tensor) -> Tensor:
        """Camera and register tokens of leaving frames go to their ring; → the slots that are left."""
        most = self._config.keep_special
        if not most:
            return leaving
        count = self._network.special_tokens
        special = leaving % self._tokens_per_frame < count
        ring, kept = self._special, leaving[special][-most * count :]
        ring.take(self.window, kept, (most + self._config.chunk_size) * count)
        ring.keep(ring.frame >= ring.frame.unique()[-most:][0])
        return leaving[~special]

    def _evict(self, leaving: Tensor, moment: int, wanted: bool) -> Evicted | None:
        """Anchors and leaving tokens compete for the places of anchors."""
        if self._anchors is None:
            return None
        config = self._config
        candidates = self._anchors.candidates(self.window, leaving)
        score = candidates.score
        if config.score == "mean":
            score = score / self._decay.gathered(self._now - candidates.born)
        room = anchor_tokens(config, self._tokens_per_frame)
        rank = RULES[config.eviction](score, moment).float().flatten(0, 1)
        chosen = self._kernels.highest(rank, room, rest=wanted)
        return self._anchors.renew(self.window, leaving, candidates, chosen)
