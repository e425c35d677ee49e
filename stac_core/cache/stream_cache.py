"""All that one stream remembers: the `AttentionContext` of the network's streaming passes.

Keys enter normalised and rotated; rotation encodes the place in the image, never time, so a kept key
needs no further work. Sources: STAC (arXiv 2603.20284), XStreamVGGT (arXiv 2601.01204).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from stac_core.cache.all_or_nothing import all_or_nothing
from stac_core.cache.byte_limit import ByteLimit
from stac_core.cache.camera_memory import CameraMemory
from stac_core.cache.camera_tokens import Cameras, CameraTokens
from stac_core.cache.key_values import KeyScale
from stac_core.cache.live_cache import LiveCache, LiveTokens
from stac_core.cache.memory_model import anchor_tokens, camera_frames, window_frames
from stac_core.cache.recordable import Plan, RecordableAttention, make_plan
from stac_core.cache.retrieved_set import RetrievedSet
from stac_core.cache.saved_state import State
from stac_core.cache.spatial_memory import SpatialMemory
from stac_core.cache.stats import CacheStats
from stac_core.cache.token_positions import TokenPositions
from stac_core.cache.voxel_memory import Evicted, VoxelMemory
from stac_core.config import CacheConfig, NetworkConfig
from stac_core.geometry import invert_pose
from stac_core.kernels.attend import AnySegment, sample_queries
from stac_core.kernels.select import Kernels


class Unmerged(NamedTuple):
    """What a pass leaves to be done for the voxel memory."""

    work: Sequence[Callable[[], None]]
    bytes: int  # of the tokens that wait for it


class StreamCache:
    """Memory of one stream. Several may serve one network, in turns.

    A pass is `begin`, `attend` of every layer, `attend_camera`, then `settle`. Until `settle` nothing
    of the pass counts: after a failure the stream goes on as if the pass had never started. Whoever calls
    `catch_up` in between, while the device is at the pass, is left with as much as can wait for the next one.
    """

    def __init__(
        self, config: CacheConfig, network: NetworkConfig, kernels: Kernels, free: int | None = None
    ) -> None:
        """free: bytes of the device that nobody has taken, see `ByteLimit`."""
        self._config, self._network, self._kernels = config, network, kernels
        self._rules, self._limit = config.rules, ByteLimit(config, network, free)
        self.reset()

    def reset(self) -> None:
        """Forget the stream; the next frame is a first frame. Whatever is raised, nothing is forgotten."""
        with all_or_nothing(self):
            self._begin_anew()

    def _begin_anew(self) -> None:
        config, layers = self._config, self._network.layers
        self.frames_seen: int = 0
        self._moment = 0  # passes so far
        self._frames = self._tokens_per_frame = 0
        self._pins = set(range(config.pinned_frames))  # frame numbers
        self._scale = KeyScale(layers)
        self._live = LiveCache(config, self._network, self._scale, self._kernels)
        self._spatial: SpatialMemory | None = None
        self._camera = CameraMemory(config, self._network)
        self.camera_tokens = CameraTokens(config.repose_frames)
        # Retrieved tokens that this pass sees, by layer, once a layer asks.
        self._attached: list[AnySegment] | None = None
        self._queries: list[Tensor | None] = [None] * layers  # [heads, D] mean queries of this pass
        # Attention of this pass for what was retrieved: [heads, n] by layer, or one [layers, heads, n].
        self._looked_at: list[Tensor | None] = [None] * layers
        self._average_mass = 1.0  # of the live tokens
        self._unmerged: Unmerged | None = None
        self._merges_beside = False  # somebody catches up while the device is at a pass

    def begin(self, frames: int, tokens_per_frame: int) -> None:
        """Announce a pass over `frames` new frames; ValueError where the stream cannot take them."""
        self._check(frames, tokens_per_frame)
        if not self.frames_seen:
            self._scale.clear()  # of a first pass that failed
        self._frames, self._tokens_per_frame = frames, tokens_per_frame
        self._looked_at = [None] * self._network.layers
        self._live.begin(frames, tokens_per_frame)
        self._attached, self._merges_beside = None, False
        self._camera.begin(frames)

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """q, k, v [1, heads, frames·tokens, D] → like q, over the kept past and all of the chunk."""
        if q.shape[0] != 1:
            raise ValueError(f"a stream has batch size 1, got {q.shape[0]}: use one StreamCache per stream")
        if not self.frames_seen:
            self._open(layer, k[0])
        live = self._live.stage(layer, k[0], v[0])
        if self._attached is None:
            self._attached = self.retrieved.segments() if self.retrieved else []
        attached = self._attached[layer] if self._attached else None
        segments = live if attached is None else [*live, attached]
        out, mass = self._attend(q[0], segments)
        self._live.credit(layer, q[0], live, mass)
        if self._config.feedback and attached is not None and mass is not None:
            self._looked_at[layer] = mass[-1]
            self._average_mass = q.shape[2] / sum(s.length for s in live)
        if self._config.retrieve_by == "query":
            self._queries[layer] = q[0].float().mean(1)
        return out[None]

    def attend_camera(self, iteration: int, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """q, k, v [1, heads, frames, D] → like q, over the frames that the pose head remembers."""
        segments = self._camera.stage(iteration, layer, k[0], v[0])
        return self._kernels.attend(q[0], segments).out[None]

    def plan(self) -> Plan | None:
        """How the next pass attends, where that can be recorded."""
        if not self.frames_seen:
            return None
        dtype, pins = self._live.window.memory.dtype, len(self._pins)
        return make_plan(
            self._kernels.listed, self._config, self._network, self._tokens_per_frame, dtype, pins
        )

    def lend(self, attention: RecordableAttention) -> None:
        """In place of `attend` and `attend_camera`: have the pass that has begun answered from here."""
        scene, retrieved = self._live.lend(), self.retrieved
        live = sum(segment.length for segment in scene if segment)
        if self.wants_positions:
            scene = [*scene, retrieved.listed() if retrieved else None]
        attention.point_to(scene, self._camera.lend(self._frames))
        if attention.mass is None:
            return
        self._live.credit_all(attention.mass[..., :live])
        if self._config.feedback and scene[-1] is not None:
            self._looked_at = [attention.mass[..., live : live + scene[-1].length]]
            self._average_mass = self._frames * self._tokens_per_frame / live

    def catch_up(self) -> None:
        """Beside a pass that is under way, which looks at none of it: merge what has left the live cache.

        Whatever is raised, the stream is as it was, and this is still to be done.
        """
        self._merges_beside = True
        self._merge()

    @torch.no_grad()
    def settle(self, positions: TokenPositions | None = None, cameras: Cameras | None = None) -> None:
        """Take in the pass: commit its tokens, score and place them, and forget by the settings.

        positions: where the chunk's tokens lie; without them no token of it gets a place. cameras: kept for
        `repose`. Whatever is raised, the stream is as if the pass had never started.
        """
        self._merge()
        with all_or_nothing(self):
            self._settle(positions)
            if self._config.repose_frames and cameras is not None:
                self.camera_tokens.add(cameras)

    def _settle(self, positions: TokenPositions | None) -> None:
        first_frame = self.frames_seen
        self._commit()
        spatial = self._spatial
        if spatial is None:
            self._forget()
            return
        looked_at = [mass for mass in self._looked_at if mass is not None]
        if looked_at:
            spatial.feed_back(torch.cat(looked_at).flatten(0, -2) / self._average_mass)
        if positions is None:
            positions = TokenPositions.nowhere(self._frames, self._tokens_per_frame, spatial.device)
        keys = self._place(spatial, positions)
        evicted = self._forget()  # before the host first waits, while the device is still at the pass
        enter = partial(spatial.enter, positions, keys, first_frame, self._limit.for_voxels)
        work, needed = [enter, partial(spatial.insert, evicted)], 0  # before the next pass
        if spatial.next_is_in_turn:
            needed = 3 if self._config.retrieve_after_merge else 2
            work.insert(needed - 1, partial(self._retrieve, spatial, first_frame))
        for do in work[:needed]:
            do()
        left, waiting = work[needed:], evicted.bytes if evicted else 0
        if left and self._merges_beside and self._limit.has_room(self._merged_bytes, waiting):
            self._unmerged = Unmerged(left, waiting)
            return
        for do in left:
            do()

    @torch.no_grad()
    def _merge(self) -> None:
        """What the last pass has left to be done, if anything."""
        if self._unmerged is not None:
            with all_or_nothing(self._spatial):
                for do in self._unmerged.work:
                    do()
            self._unmerged = None

    @torch.no_grad()
    def follow(self, world_from_camera: Tensor) -> None:
        """Believe better poses [n, 4, 4] of the frames of `camera_tokens`: voxels move with their frames."""
        self._merge()
        frames, old = self.camera_tokens.frames, self.camera_tokens.poses
        with all_or_nothing(self):
            if self._spatial is not None:
                self._live.voxels = self._spatial.move(
                    frames, world_from_camera @ invert_pose(old), self._live.voxels, self._limit.for_voxels
                )
            self.camera_tokens.poses = world_from_camera

    def pin(self, frame: int) -> None:
        """Keep one more frame whole for ever, by its number in the stream.

        ValueError where the frame is no longer whole, or the byte limit has no room for it. What a frame
        takes is known with the first pass, which refuses what was pinned before and does not fit.
        """
        if frame < 0:
            raise ValueError(f"frame = {frame}: frames count from 0; nearest value that works: 0")
        if frame in self._pins:
            return
        if frame < self.frames_seen and not bool((self._live.window.frame == frame).any()):
            raise ValueError(f"frame {frame} has left the window; pin a frame from {self._oldest_whole} on")
        pins = self._pins | {frame}
        if self.frames_seen:
            self._merge()
            self._limit.pin(len(pins), self._merged_bytes)
        self._pins = pins

    @property
    def wants_positions(self) -> bool:
        """Whether `settle` has a use for them."""
        return self._rules.voxels and self._config.retrieval_size != 0

    def stats(self, members: bool = False) -> CacheStats:
        """The state after the last `settle`, without what is still to be merged.

        members: also the histogram, which looks at every pivot, once all is merged.
        """
        if members:
            self._merge()
        numbers: dict[str, Any] = self._spatial.stats(members) if self._spatial else {}
        waiting = self._unmerged.bytes if self._unmerged else 0
        return CacheStats(
            frames_seen=self.frames_seen,
            live_tokens=self._live.length,
            anchors=self._live.anchors,
            live_bytes=sum(part.bytes for part in self._parts().values()) + waiting,
            camera_bytes=self._camera.store.bytes,
            byte_limit=self._limit.bytes or 0,
            **numbers,
        )

    def state(self) -> State:
        """Everything that the stream needs to go on, as nested dicts of tensors."""
        self._merge()
        numbers = torch.tensor([self.frames_seen, self._moment, self._tokens_per_frame])
        parts = {name: part.state() for name, part in self._parts().items()}
        return {"numbers": numbers, "pins": torch.tensor(sorted(self._pins), dtype=torch.int64), **parts}

    def restore(self, state: State) -> None:
        """Go on where `state` was taken; this cache must be new. KeyError where something is missing."""
        self.frames_seen, self._moment, self._tokens_per_frame = state["numbers"].tolist()
        self._scale.restore(state.get("scale", {}))
        if "spatial" in state:
            like = state["live"]["window"]["memory"]
            self._spatial = self._new_spatial(like["like"].dtype, like["0"].device)
        for name, part in self._parts().items():
            part.restore(state.get(name, {}))
        self._pins = set(state["pins"].tolist())
        if self.frames_seen:
            dtype = self._live.window.memory.dtype
            self._limit.begin(self._tokens_per_frame, dtype, len(self._pins), self._merged_bytes)

    @property
    def voxels(self) -> VoxelMemory | None:
        """The voxel memory with all that has left the live cache, once the stream has begun."""
        self._merge()
        return self._spatial.voxels if self._spatial else None

    @property
    def retrieved(self) -> RetrievedSet | None:
        """What the next pass sees of the voxel memory."""
        return self._spatial.retrieved if self._spatial else None

    def live(self) -> LiveTokens:
        """All live tokens, decoded: pinned, special, anchors, window, each in temporal order."""
        return self._live.tokens()

    def _open(self, layer: int, keys: Tensor) -> None:
        """With the first chunk's keys [heads, tokens, D] the types are known: prepare what needs them."""
        config = self._config
        if layer == 0:
            self._begin_limit(keys.dtype)
        if config.coded:
            self._scale.fix(layer, keys[:, : self._tokens_per_frame])
        if layer == 0:
            self._live.open(keys.device)
        if self.wants_positions and layer == self._network.layers - 1:
            self._spatial = self._new_spatial(keys.dtype, keys.device)

    def _new_spatial(self, dtype: torch.dtype, device: torch.device) -> SpatialMemory:
        return SpatialMemory(self._config, self._network, dtype, device, self._kernels, self._scale)

    def _parts(self) -> dict[str, Any]:
        """What holds memory and can be saved, by name."""
        parts: dict[str, Any] = {
            "scale": self._scale, "live": self._live, "camera": self._camera.store,
            "camera_tokens": self.camera_tokens,
        }  # fmt: skip
        return parts if self._spatial is None else {**parts, "spatial": self._spatial}

    def _attend(self, q: Tensor, segments: Sequence[AnySegment]) -> tuple[Tensor, list[Tensor] | None]:
        """Output, and what each key received of the queries [heads, M, D] that count."""
        share, turn = self._config.subsample, 0
        if self._config.subsample_phase == "rotating":
            turn = self._moment % sample_queries(q.shape[1], share).stride
        out, _, mass = self._kernels.attend(
            q.roll(-turn, 1) if turn else q, segments, self._live.by_mass, share
        )
        return out.roll(turn, 1) if turn else out, mass

    def _commit(self) -> None:
        """The staged tokens become part of the stream."""
        self._camera.check(self._frames)
        self._live.commit(self.frames_seen, self._moment)
        self._attached = None
        frames = torch.arange(self.frames_seen, self.frames_seen + self._frames)
        self._moment += 1
        self.frames_seen += self._frames
        self._camera.settle(frames, self._moment, self._oldest(camera_frames(self._config)), self._pins)

    def _place(self, spatial: SpatialMemory, positions: TokenPositions) -> Tensor:
        """Give the new tokens their voxel keys [S, P]."""
        keys = spatial.place(positions)
        self._live.place(keys.flatten())
        return keys

    @property
    def _merged_bytes(self) -> int:
        """What the voxel memory has taken."""
        voxels = self._spatial.voxels if self._spatial else None
        return voxels.rows.most_bytes + voxels.grid.most_bytes if voxels else 0

    def _retrieve(self, spatial: SpatialMemory, first_frame: int) -> None:
        sought = spatial.seek(first_frame)
        queries = [q for q in self._queries if q is not None]
        spatial.retrieve(sought, self._tokens_per_frame, torch.cat(queries) if queries else None)

    def _forget(self) -> Evicted | None:
        oldest = self._oldest(window_frames(self._config))
        return self._live.forget(oldest, self._pins, self._moment, wanted=self._spatial is not None)

    def _oldest(self, frames: int) -> int:
        """The oldest frame among the last `frames`."""
        return self.frames_seen - frames if self._rules.bounded else 0

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

    def _begin_limit(self, dtype: torch.dtype) -> None:
        """Set bytes aside for the live cache; ValueError where they are too many.

        Frames pinned before the stream began are then pinned no more, so that it can begin without them.
        """
        pins = self._pins
        try:
            self._limit.begin(self._tokens_per_frame, dtype, len(pins))
        except ValueError as cause:
            self._pins = set(range(self._config.pinned_frames))
            refused = ", ".join(map(str, sorted(pins - self._pins)))
            if not refused:
                raise
            raise ValueError(f"pinned no more, so step again: frames {refused}. {cause}") from None

    @property
    def _oldest_whole(self) -> int:
        """The oldest frame that is still whole without being pinned; the next one where there is none."""
        return int(self._live.window.frame.min()) if self._live.window.length else self.frames_seen
