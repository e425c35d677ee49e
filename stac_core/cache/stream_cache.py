"""All that one stream remembers: the `AttentionContext` of the network's streaming passes.

Keys enter normalised and rotated; rotation encodes the place in the image, never time, so a kept key
needs no further work. Sources: STAC (arXiv 2603.20284); STream3R (arXiv 2508.10893) for the window and
the camera memory per iteration; StreamVGGT (arXiv 2507.11539) for the shared camera memory.
"""

from __future__ import annotations

import torch
from torch import Tensor

from stac_core.cache.stats import CacheStats
from stac_core.cache.token_store import TokenStore
from stac_core.config import CacheConfig, NetworkConfig
from stac_core.kernels.attend import Segment
from stac_core.kernels.select import Kernels


class StreamCache:
    """Memory of one stream. Several may serve one network, in turns.

    A pass is `begin`, `attend` of every layer, `attend_camera`, then `settle`. Until `settle` nothing
    of the pass counts: after a failure the stream goes on as if the pass had never started.
    """

    def __init__(self, config: CacheConfig, network: NetworkConfig, kernels: Kernels) -> None:
        self._config, self._network, self._kernels = config, network, kernels
        self.reset()

    def reset(self) -> None:
        """Forget the stream; the next frame is a first frame."""
        network = self._network
        self.frames_seen: int = 0
        self._frames = self._tokens_per_frame = 0
        self._pinned = TokenStore(network.layers)
        self._window = TokenStore(network.layers)
        self._camera = TokenStore(network.camera_blocks * self._camera_memories)

    def begin(self, frames: int, tokens_per_frame: int) -> None:
        """Announce a pass over `frames` new frames; ValueError where the stream cannot take them."""
        self._check(frames, tokens_per_frame)
        self._frames, self._tokens_per_frame = frames, tokens_per_frame
        config = self._config
        limit = None if config.mode == "causal" else config.window_size + config.chunk_size
        self._pinned.begin(0, None)
        self._window.begin(frames * tokens_per_frame, limit and limit * tokens_per_frame)
        entries = self._camera_entries
        self._camera.begin(frames * entries, limit and (limit + config.pinned_frames) * entries)

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """q, k, v [1, heads, frames·tokens, D] → like q, over the kept past and all of the chunk."""
        if q.shape[0] != 1:
            raise ValueError(f"a stream has batch size 1, got {q.shape[0]}: use one StreamCache per stream")
        self._window.stage(layer, k[0], v[0])
        return self._attend(q, self._pinned.segment(layer), self._window.segment(layer))

    def attend_camera(self, iteration: int, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """q, k, v [1, heads, frames, D] → like q.

        With the shared camera memory an iteration sees what the iterations before it left in this very
        pass; otherwise every iteration has a memory of its own.
        """
        memory = layer * self._camera_memories + (iteration if self._camera_memories > 1 else 0)
        self._camera.stage(memory, k[0], v[0])
        return self._attend(q, self._camera.segment(memory))

    @torch.no_grad()
    def settle(self) -> None:
        """Take in the pass: commit its tokens, then forget what the settings do not keep."""
        frames = torch.arange(self.frames_seen, self.frames_seen + self._frames)
        self._window.check_staged(len(frames) * self._tokens_per_frame)
        if self._camera.staged:  # the camera head may have been left out
            self._camera.commit(frames.repeat(self._camera_entries))
        self._window.commit(frames.repeat_interleave(self._tokens_per_frame))
        self.frames_seen += self._frames
        self._frames = 0
        self._forget()

    def stats(self) -> CacheStats:
        return CacheStats(
            frames_seen=self.frames_seen,
            live_tokens=self._pinned.length + self._window.length,
            live_bytes=self._pinned.bytes + self._window.bytes,
            camera_bytes=self._camera.bytes,
        )

    def _attend(self, q: Tensor, *segments: Segment | None) -> Tensor:
        return self._kernels.attend(q[0], [s for s in segments if s is not None]).out[None]

    def _forget(self) -> None:
        """Pinned frames move to their own store, older ones than the window go."""
        oldest = 0 if self._config.mode == "causal" else self.frames_seen - self._config.window_size
        frame = self._window.frame
        pinned = frame < self._config.pinned_frames
        slots = pinned.nonzero()[:, 0]
        if len(slots):
            self._pinned.begin(len(slots), self._config.pinned_frames * self._tokens_per_frame)
            self._pinned.take(self._window, slots)
        self._window.keep((frame >= oldest) & ~pinned)
        frame = self._camera.frame
        self._camera.keep((frame >= oldest) | (frame < self._config.pinned_frames))

    def _check(self, frames: int, tokens_per_frame: int) -> None:
        config = self._config
        if config.mode != "causal" and not 1 <= frames <= config.chunk_size:
            raise ValueError(f"{frames} frames in one pass, but cache.chunk_size is {config.chunk_size}")
        if self.frames_seen and tokens_per_frame != self._tokens_per_frame:
            raise ValueError(
                f"frames of {tokens_per_frame} tokens in a stream that began with {self._tokens_per_frame}: "
                "keep the image size, or reset the stream"
            )

    @property
    def _camera_memories(self) -> int:
        """Memories per camera block: one per iteration, or one that all share."""
        return 1 if self._network.camera_cache == "shared" else self._network.camera_iterations

    @property
    def _camera_entries(self) -> int:
        """Tokens that a frame leaves in each camera memory."""
        return self._network.camera_iterations // self._camera_memories
