"""All that one stream remembers: the `AttentionContext` of the network's streaming passes.

Keys enter normalised and rotated; rotation encodes the place in the image, never time, so a kept key
needs no further work. Sources: STAC (arXiv 2603.20284), XStreamVGGT (arXiv 2601.01204).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from stac_core.cache import scores
from stac_core.cache.anchor_store import AnchorStore
from stac_core.cache.camera_memory import CameraMemory
from stac_core.cache.eviction import choose
from stac_core.cache.key_values import KeyScale, KeyValues
from stac_core.cache.memory_model import anchor_tokens, camera_frames, live_bytes, window_frames
from stac_core.cache.retrieved_set import RetrievedSet
from stac_core.cache.saved_state import State
from stac_core.cache.spatial_memory import SpatialMemory
from stac_core.cache.stats import CacheStats
from stac_core.cache.token_positions import TokenPositions
from stac_core.cache.token_store import TokenStore
from stac_core.cache.voxel_memory import Evicted, VoxelMemory
from stac_core.config import CacheConfig, NetworkConfig
from stac_core.kernels.attend import AnySegment, Segment, sample_queries
from stac_core.kernels.select import Kernels


class LiveTokens(NamedTuple):
    """What a stream attends to besides retrieved tokens, for looking into it."""

    keys: Tensor  # [layers, heads, T, D]
    values: Tensor  # [layers, heads, T, D]
    score: Tensor  # [layers, heads, T]; NaN where tokens are not scored
    voxel: Tensor  # [layers, heads, T] voxel keys; NOWHERE where a token has no place


class StreamCache:
    """Memory of one stream. Several may serve one network, in turns.

    A pass is `begin`, `attend` of every layer, `attend_camera`, then `settle`. Until `settle` nothing
    of the pass counts: after a failure the stream goes on as if the pass had never started.
    """

    def __init__(self, config: CacheConfig, network: NetworkConfig, kernels: Kernels) -> None:
        self._config, self._network, self._kernels = config, network, kernels
        self._rules = config.rules
        self.reset()

    def reset(self) -> None:
        """Forget the stream; the next frame is a first frame."""
        config, layers = self._config, self._network.layers
        self.frames_seen: int = 0
        self._moment = 0  # passes so far
        self._frames = self._tokens_per_frame = 0
        self._pins = set(range(config.pinned_frames))  # frame numbers
        self._scale = KeyScale(layers)
        self._pinned = TokenStore(layers, KeyValues(layers, config.pinned_bits, self._scale))
        self._special = TokenStore(layers, KeyValues(layers, config.window_bits, self._scale))
        self._window = TokenStore(layers, KeyValues(layers, config.window_bits, self._scale))
        self._anchors: AnchorStore | None = None
        self._spatial: SpatialMemory | None = None
        self._camera = CameraMemory(config, self._network)
        self._contributions: list[Tensor | None] = [None] * layers  # [heads, live tokens] of this pass
        self._queries: list[Tensor | None] = [None] * layers  # [heads, D] mean queries of this pass
        self._looked_at: list[Tensor | None] = [None] * layers  # [heads, retrieved] attention of this pass

    def begin(self, frames: int, tokens_per_frame: int) -> None:
        """Announce a pass over `frames` new frames; ValueError where the stream cannot take them."""
        self._check(frames, tokens_per_frame)
        if not self.frames_seen:
            self._scale.clear()  # of a first pass that failed
        self._frames, self._tokens_per_frame = frames, tokens_per_frame
        self._looked_at = [None] * self._network.layers
        config = self._config
        most = (window_frames(config) + config.chunk_size) * tokens_per_frame if self._rules.bounded else None
        self._window.begin(frames * tokens_per_frame, most)
        self._camera.begin(frames)

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """q, k, v [1, heads, frames·tokens, D] → like q, over the kept past and all of the chunk."""
        if q.shape[0] != 1:
            raise ValueError(f"a stream has batch size 1, got {q.shape[0]}: use one StreamCache per stream")
        if not self.frames_seen:
            self._open(layer, k[0])
        past = [self._pinned.segment(layer), self._special.segment(layer)]
        past.append(self._anchors.segment(layer) if self._anchors else None)
        live = [s for s in past if s is not None] + self._window.stage(layer, k[0], v[0])
        retrieved = self._spatial.retrieved if self._spatial else None
        attached = retrieved.segment(layer) if retrieved else None
        segments = live if attached is None else [*live, attached]
        out, mass = self._attend(q[0], segments)
        if self._rules.anchors:
            self._contributions[layer] = self._contribution(q[0], live, mass)
        if self._config.feedback and attached is not None and mass is not None:
            average = q.shape[2] / sum(s.length for s in live)
            self._looked_at[layer] = mass[-1] / average
        if self._config.retrieve_by == "query":
            self._queries[layer] = q[0].float().mean(1)
        return out[None]

    def attend_camera(self, iteration: int, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """q, k, v [1, heads, frames, D] → like q, over the frames that the pose head remembers."""
        segments = self._camera.stage(iteration, layer, k[0], v[0])
        return self._kernels.attend(q[0], segments).out[None]

    @torch.no_grad()
    def settle(self, positions: TokenPositions | None = None) -> None:
        """Take in the pass: commit its tokens, score and place them, and forget by the settings.

        positions: where the chunk's tokens lie; without them no token of it gets a place.
        """
        first_frame = self.frames_seen
        self._commit()
        if self._rules.anchors:
            self._score()
        if self._spatial is None:
            self._forget()
            return
        looked_at = [mass for mass in self._looked_at if mass is not None]
        if looked_at:
            self._spatial.feed_back(torch.cat(looked_at))
        self._place(positions)
        if not self._config.retrieve_after_merge:
            self._retrieve(first_frame)
        evicted = self._forget()
        if evicted is not None:
            self._spatial.insert(evicted)
        if self._config.retrieve_after_merge:
            self._retrieve(first_frame)

    def pin(self, frame: int) -> None:
        """Keep one more frame whole for ever, by its number in the stream.

        ValueError where the frame is no longer whole, or the byte limit has no room for it.
        """
        if 0 <= frame < self.frames_seen and not bool((self._window.frame == frame).any()):
            raise ValueError(f"frame {frame} has left the window; pin a frame from {self._oldest_whole} on")
        pins = self._pins | {frame}
        if self._config.memory_budget and self._window.length:
            self._most_live_bytes = self._budgeted(len(pins), self.live().keys.dtype)
        self._pins = pins

    @property
    def wants_positions(self) -> bool:
        """Whether `settle` has a use for them."""
        return self._rules.voxels and self._config.retrieval_size != 0

    def stats(self) -> CacheStats:
        """The state after the last `settle`."""
        anchors = self._anchors.length if self._anchors else 0
        numbers: dict[str, Any] = self._spatial.stats() if self._spatial else {}
        return CacheStats(
            frames_seen=self.frames_seen,
            live_tokens=self._pinned.length + self._special.length + anchors + self._window.length,
            anchors=anchors,
            live_bytes=self._live_bytes(),
            camera_bytes=self._camera.store.bytes,
            **numbers,
        )

    def state(self) -> State:
        """Everything that the stream needs to go on, as nested dicts of tensors."""
        numbers = torch.tensor([self.frames_seen, self._moment, self._tokens_per_frame])
        parts = {name: part.state() for name, part in self._parts().items()}
        return {"numbers": numbers, "pins": torch.tensor(sorted(self._pins), dtype=torch.int64), **parts}

    def restore(self, state: State) -> None:
        """Go on where `state` was taken; this cache must be new. KeyError where something is missing."""
        self.frames_seen, self._moment, self._tokens_per_frame = state["numbers"].tolist()
        if "anchors" in state:
            self._anchors = self._new_anchors(state["anchors"]["score"].device)
        self._scale.restore(state.get("scale", {}))
        if "spatial" in state:
            like = state["window"]["memory"]
            self._spatial = self._new_spatial(like["like"].dtype, like["0.0"].device)
        for name, part in self._parts().items():
            part.restore(state.get(name, {}))
        self._pins = set(state["pins"].tolist())
        if self._config.memory_budget:
            self._most_live_bytes = self._budgeted(len(self._pins), state["window"]["memory"]["like"].dtype)

    @property
    def voxels(self) -> VoxelMemory | None:
        """The voxel memory, once the stream has begun."""
        return self._spatial.voxels if self._spatial else None

    @property
    def retrieved(self) -> RetrievedSet | None:
        """What the next pass sees of the voxel memory."""
        return self._spatial.retrieved if self._spatial else None

    def live(self) -> LiveTokens:
        """All live tokens, decoded: pinned, special, anchors, window, each in temporal order."""
        stores = [s for s in (self._pinned, self._special, self._anchors, self._window) if s and s.length]
        heads = self._network.heads
        keys, values = [], []
        for layer in range(self._network.layers):
            segments = [s for s in (store.segment(layer) for store in stores) if s is not None]
            keys.append(torch.cat([s.keys for s in segments], 1))
            values.append(torch.cat([s.values for s in segments], 1))
        notes = [store.notes(self._network.layers, heads) for store in stores]
        score, voxel = (torch.cat(parts, -1) for parts in zip(*notes, strict=True))
        return LiveTokens(torch.stack(keys), torch.stack(values), score, voxel)

    def _open(self, layer: int, keys: Tensor) -> None:
        """With the first chunk's keys [heads, tokens, D] the types are known: prepare what needs them."""
        config = self._config
        if layer == 0 and config.memory_budget:
            self._most_live_bytes = self._budgeted(len(self._pins), keys.dtype)
        if config.coded:
            self._scale.fix(layer, keys[:, : self._tokens_per_frame])
        if self._rules.anchors and layer == 0:
            self._anchors = self._new_anchors(keys.device)
        if self.wants_positions and layer == self._network.layers - 1:
            self._spatial = self._new_spatial(keys.dtype, keys.device)

    def _new_anchors(self, device: torch.device) -> AnchorStore:
        layers, heads = self._network.layers, self._network.heads
        return AnchorStore(layers, heads, KeyValues(layers, self._config.anchor_bits, self._scale), device)

    def _new_spatial(self, dtype: torch.dtype, device: torch.device) -> SpatialMemory:
        return SpatialMemory(
            self._config, self._network, dtype, device, self._kernels.voxel_merge, self._scale
        )

    def _parts(self) -> dict[str, Any]:
        """What can be saved, by name."""
        parts = {
            "scale": self._scale, "pinned": self._pinned, "special": self._special, "window": self._window,
            "camera": self._camera.store, "anchors": self._anchors, "spatial": self._spatial,
        }  # fmt: skip
        return {name: part for name, part in parts.items() if part is not None}

    def _attend(self, q: Tensor, segments: Sequence[AnySegment]) -> tuple[Tensor, list[Tensor] | None]:
        """Output, and what each key received of the queries [heads, M, D] that count."""
        share, turn = self._config.subsample, 0
        if self._config.subsample_phase == "rotating":
            turn = self._moment % sample_queries(q.shape[1], share).stride
        out, _, mass = self._kernels.attend(q.roll(-turn, 1) if turn else q, segments, self._by_mass, share)
        return out.roll(turn, 1) if turn else out, mass

    @property
    def _by_mass(self) -> bool:
        return self._rules.anchors and not (self._rules.pruned and self._config.importance != "mass")

    def _contribution(self, q: Tensor, live: list[Segment], mass: list[Tensor] | None) -> Tensor:
        """What this pass adds to the scores of the live tokens of one layer [heads, T]."""
        if mass is not None:
            return scores.received(torch.cat(mass[: len(live)], -1), q.shape[1])
        keys = torch.cat([segment.keys for segment in live], 1)
        newest, special = q[:, -self._tokens_per_frame :], self._network.special_tokens
        if self._config.importance == "pooled":
            return scores.importance_pooled(newest, keys, special)
        return scores.importance_per_head(newest, keys, special)

    def _commit(self) -> None:
        """The staged tokens become part of the stream."""
        frames = torch.arange(self.frames_seen, self.frames_seen + self._frames)
        self._window.check_staged(self._frames * self._tokens_per_frame)
        self._camera.check(self._frames)
        self._window.commit(frames.repeat_interleave(self._tokens_per_frame), self._moment)
        self._moment += 1
        self.frames_seen += self._frames
        self._camera.settle(frames, self._moment, self._oldest(camera_frames(self._config)), self._pins)

    def _score(self) -> None:
        """Fold the pass's contributions into the scores, each in the place of its token."""
        config = self._config
        decay = scores.decay_of_pass(config.temperature, config.decay_unit, self._frames)
        decay = 0.0 if self._rules.pruned else decay
        new = torch.stack([c for c in self._contributions if c is not None])  # [layers, heads, T]
        stores = [s for s in (self._pinned, self._special, self._anchors, self._window) if s is not None]
        for store, part in zip(stores, new.split([store.length for store in stores], -1), strict=True):
            known = part[..., :0] if store.score is None else store.score
            store.score = scores.update(known, part, decay)
        self._contributions = [None] * len(self._contributions)

    def _place(self, positions: TokenPositions | None) -> None:
        """Give the new tokens their voxel keys."""
        if self._spatial is None or self._window.score is None:
            return
        if positions is None:
            positions = TokenPositions.nowhere(
                self._frames, self._tokens_per_frame, self._window.score.device
            )
        limit = None
        if self._config.memory_budget:
            limit = self._config.memory_budget - self._most_live_bytes
        new = self._spatial.place(positions, limit)
        old = self._window.voxel
        self._window.voxel = new if old is None else torch.cat([old, new])

    def _retrieve(self, first_frame: int) -> None:
        if self._spatial is not None:
            queries = [q for q in self._queries if q is not None]
            query = torch.cat(queries) if queries else None
            self._spatial.retrieve(first_frame, self._tokens_per_frame, query)

    def _forget(self) -> Evicted | None:
        """Pinned frames move to their own store, older ones than the window compete or go; → who went."""
        config, frame = self._config, self._window.frame
        pinned = torch.isin(frame, torch.tensor(sorted(self._pins), dtype=torch.int64))
        slots = pinned.nonzero()[:, 0]
        if len(slots):
            self._pinned.take(self._window, slots, len(self._pins) * self._tokens_per_frame)
        recent = frame >= self._oldest(window_frames(config))
        leaving = (~recent & ~pinned).nonzero()[:, 0]
        evicted = None
        if len(leaving):
            leaving = self._keep_special(leaving)
            evicted = self._evict(leaving) if self._anchors else None
        self._window.keep(recent & ~pinned)
        return evicted

    def _keep_special(self, leaving: Tensor) -> Tensor:
        """Camera and register tokens of leaving frames go to their ring; → the slots that are left."""
        most = self._config.keep_special
        if not most:
            return leaving
        count = self._network.special_tokens
        special = leaving % self._tokens_per_frame < count
        ring = self._special
        ring.keep(ring.frame >= torch.cat([ring.frame, self._window.frame[leaving]]).unique()[-most:][0])
        kept = leaving[special][-most * count :]
        ring.take(self._window, kept, (most + self._config.chunk_size) * count)
        return leaving[~special]

    def _evict(self, leaving: Tensor) -> Evicted | None:
        """Anchors and leaving tokens compete for the places of anchors."""
        if self._anchors is None:
            return None
        config = self._config
        score, born = self._anchors.candidates(self._window, leaving)
        if config.score == "mean":
            decay = scores.decay_of_pass(config.temperature, config.decay_unit, config.chunk_size)
            score = score / scores.exposure(self._moment - born, decay)
        room = anchor_tokens(config, self._tokens_per_frame)
        choice = choose(config.eviction, score, room, self._moment)
        wanted = self._spatial is not None
        return self._anchors.renew(self._window, leaving, choice, room, wanted)

    def _oldest(self, frames: int) -> int:
        """The oldest frame among the last `frames`."""
        return self.frames_seen - frames if self._rules.bounded else 0

    def _live_bytes(self) -> int:
        parts = (self._pinned, self._special, self._anchors, self._window, self._camera.store, self._spatial)
        return sum(part.bytes for part in parts if part is not None) + self._scale.bytes

    def _check(self, frames: int, tokens_per_frame: int) -> None:
        config = self._config
        if self._rules.bounded and not 1 <= frames <= config.chunk_size:
            raise ValueError(f"{frames} frames in one pass, but cache.chunk_size is {config.chunk_size}")
        if self.frames_seen and tokens_per_frame != self._tokens_per_frame:
            raise ValueError(
                f"frames of {tokens_per_frame} tokens in a stream that began with {self._tokens_per_frame}: "
                "keep the image size, or reset the stream"
            )
        anchor_tokens(config, tokens_per_frame)

    def _budgeted(self, pins: int, dtype: torch.dtype) -> int:
        """Bytes of the live cache at its fullest; ValueError where the byte limit does not even hold that."""
        config = replace(self._config, pinned_frames=pins)
        most = live_bytes(config, self._network, self._tokens_per_frame, dtype)
        if self._config.memory_budget < most:
            raise ValueError(
                f"cache.memory_budget = {self._config.memory_budget}: less than the {most} bytes of the live "
                f"cache alone; nearest value that works: {most}"
            )
        return most

    @property
    def _oldest_whole(self) -> int:
        """The oldest frame that is still whole without being pinned; the next one where there is none."""
        return int(self._window.frame.min()) if self._window.length else self.frames_seen
