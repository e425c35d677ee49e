"""When tokens get a place, when merged ones are retrieved, and around which places.

Source: STAC (arXiv 2603.20284), retrieval; what it retrieves from is `VoxelMemory`.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from stac_core.cache.key_values import KeyScale
from stac_core.cache.later import Later
from stac_core.cache.retrieved_set import RetrievedSet
from stac_core.cache.saved_state import State
from stac_core.cache.token_positions import TokenPositions
from stac_core.cache.voxel_grid import Frustum
from stac_core.cache.voxel_keys import NOWHERE, keys_from_points
from stac_core.cache.voxel_memory import Evicted, Sought, VoxelMemory
from stac_core.config import CacheConfig, NetworkConfig
from stac_core.geometry import invert_pose
from stac_core.kernels.select import Kernels

EARLIEST = 16  # frame, in the published rule


class SpatialMemory:
    """The voxel memory of one stream and the set retrieved from it."""

    def __init__(
        self, config: CacheConfig, network: NetworkConfig, dtype: torch.dtype, device: torch.device,
        kernels: Kernels, scale: KeyScale,
    ) -> None:  # fmt: skip
        self.retrieved: RetrievedSet | None = None
        self.edge = 0.0  # of the finest voxels, in units of the prediction; 0 = not known yet
        self._config, self._network, self._scale = config, network, scale
        coded = config.store_bits < 16
        lanes, dim = network.layers * network.heads, network.width // network.heads
        self.voxels = VoxelMemory(config, lanes, dim, dtype, device, kernels, scale.lanes if coded else None)
        self._unplaced = 0  # patches that had no place, before the last pass
        self._unplaced_now: int | Later = 0  # those of the last pass
        self._recent = torch.empty(0, dtype=torch.int64, device=device)  # keys of the last window_size frames
        self._pose: Tensor | None = None  # [4, 4] world_from_camera of the last pass, for `prefetch`
        self._ahead: Frustum | None = None  # what the next pass will see, until retrieval
        self._chosen: Tensor | None = None  # [lanes, n] int32: slots of what is retrieved, for `feedback`

    @property
    def device(self) -> torch.device:
        return self._recent.device

    @property
    def bytes(self) -> int:
        """Allocated for places and for the retrieved set; the voxels count themselves."""
        notes = (self._recent, self._pose, self._chosen)
        places = sum(note.nbytes for note in notes if note is not None)
        return places + (self.retrieved.bytes if self.retrieved is not None else 0)

    @property
    def unplaced(self) -> int:
        """Patches so far that had no place."""
        return self._unplaced + int(self._unplaced_now)

    def place(self, positions: TokenPositions) -> Tensor:
        """Voxel keys [S, P] of new tokens; freezes the voxel edge with the first chunk that shows depth."""
        if not self.edge:
            scale = 1.0
            if self._config.voxel_unit == "scene":
                scale = positions.median_depth() * positions.coarseness
            self.edge = self._config.voxel_size * scale if math.isfinite(scale) and scale > 0 else 0.0
        if not self.edge:
            return torch.full(positions.valid.shape, NOWHERE, device=positions.valid.device)
        return keys_from_points(positions.points, positions.valid, self.edge)

    def enter(self, positions: TokenPositions, keys: Tensor, first_frame: int, limit: int | None) -> None:
        """Begin a pass with new tokens and their voxel keys [S, P]: every place seen gets a voxel."""
        frames, tokens = keys.shape
        self._unplaced = self.unplaced  # the last pass has long told
        self._unplaced_now = Later((keys[:, self._network.special_tokens :] == NOWHERE).sum())
        if not positions.lost:
            self._recent = torch.cat([self._recent, keys.flatten()])[-self._config.window_size * tokens :]
        makes_room = self.edge and limit is not None
        self.voxels.begin(keys, positions.camera / self.edge if makes_room else None, limit)
        if self._config.repose_frames:
            frame = torch.arange(first_frame, first_frame + frames, device=keys.device)
            self.voxels.mover.see(
                keys.flatten(), positions.points.flatten(0, 1), frame.repeat_interleave(tokens)
            )
        if self._config.prefetch:
            self._look_ahead(positions)

    def move(
        self, frames: Tensor, new_from_old: Tensor, keys: list[Tensor], limit: int | None
    ) -> list[Tensor]:
        """Move all places with the frames that saw them; keys of tokens → the same after the move."""
        keys = [self._recent, *keys]
        self._recent, *moved = self.voxels.move(frames, new_from_old, self.edge, keys, limit)
        self._chosen = None  # its slots may hold others now
        return moved

    def feed_back(self, mass: Tensor) -> None:
        """mass [lanes, n]: attention of the retrieved tokens in the pass just seen, 1 for an average token.

        Counts once per retrieval: later, merging may have put others into their slots.
        """
        if self._chosen is not None:
            slots = self._chosen[:, : mass.shape[1]].long()
            self.voxels.add_weight(slots, self._config.feedback * mass[:, : slots.shape[1]])
        self._chosen = None

    def seek(self, first_frame: int) -> Sought | None:
        """The voxels that the next chunk may see, in turn; None as long as there is nothing to retrieve.

        first_frame: of the chunk just seen.
        """
        if not self._has_begun(first_frame):
            return None
        return self.voxels.seek(self._seeds())

    def retrieve(self, sought: Sought | None, tokens_per_frame: int, query: Tensor | None) -> None:
        """Choose what the next chunk sees of the voxels sought; where there are none the old set stays.

        query [lanes, D]: mean queries of the chunk just seen, where they choose.
        """
        if sought is None:
            return
        config = self._config
        budget = max(-1, config.retrieval_size * tokens_per_frame)
        found = self.voxels.retrieval.retrieve(
            sought.voxels,
            budget,
            with_buffer=config.retrieve_buf,
            query=query,
            seeds=self._seeds() if config.retrieve_by == "near" else None,
        )
        self.retrieved = self._empty_set()
        self.retrieved.fill(found)
        self._chosen = found.pivots.int() if config.feedback and found.pivots is not None else None

    def insert(self, evicted: Evicted | None) -> None:
        """See `VoxelMemory.insert`; None where no token leaves."""
        if evicted is not None:
            self.voxels.insert(evicted)

    def state(self) -> State:
        numbers = torch.tensor([self.edge, self.unplaced], dtype=torch.float64)
        optional = {"pose": self._pose, "chosen": self._chosen}
        present: State = {name: note for name, note in optional.items() if note is not None}
        if self.retrieved:
            present["retrieved"] = self.retrieved.state()
        return {"numbers": numbers, "recent": self._recent, "voxels": self.voxels.state(), **present}

    def restore(self, state: State) -> None:
        edge, unplaced = state["numbers"].tolist()
        self.edge, self._recent = edge, state["recent"]
        self._unplaced, self._unplaced_now = int(unplaced), 0
        self._pose, self._chosen = state.get("pose"), state.get("chosen")
        self.voxels.restore(state["voxels"])
        if "retrieved" in state:
            self.retrieved = self._empty_set()
            self.retrieved.restore(state["retrieved"])

    def _empty_set(self) -> RetrievedSet:
        return RetrievedSet(self._network.layers, self._config.retrieved_bits, self._scale)

    def stats(self, members: bool) -> dict[str, Any]:
        """Fields of `CacheStats`; members: the histogram too, which looks at every pivot."""
        voxels, room = self.voxels, self.voxels.room
        counts = voxels.counts
        return {
            "retrieved_tokens": self.retrieved.tokens if self.retrieved else 0,
            "retrieved_bytes": self.retrieved.bytes if self.retrieved else 0,
            "voxel_bytes": voxels.bytes,
            "host_bytes": room.host.bytes,
            "voxels": voxels.grid.count,
            "pivot_slots": voxels.pivots,
            "buffer_slots": voxels.buffered,
            "voxel_edge": self.edge,
            "inserted": counts.inserted,
            "merged": counts.merged,
            "buffered": counts.buffered,
            "gated": counts.gated,
            "forgotten": counts.forgotten + room.counts.forgotten_tokens,
            "unplaced": self.unplaced,
            "spilled_voxels": room.counts.spilled,
            "reloaded_voxels": room.counts.reloaded,
            "coarsened_voxels": room.counts.coarsened,
            "members": voxels.histogram() if members else {},
        }

    def _seeds(self) -> Tensor:
        """Keys of the places around which is retrieved."""
        if self._ahead is None:
            return self._recent
        return torch.cat([self._recent, self.voxels.inside(self._ahead, self.edge)])

    def _look_ahead(self, positions: TokenPositions) -> None:
        """Places that the camera will see after moving as it did since the last pass."""
        view, before = positions.view, self._pose
        self._ahead = None
        if view is None or positions.lost:
            return
        self._pose = now = view.world_from_camera
        if before is None or not self.edge:
            return
        depth = ((positions.points - now[:3, 3]) @ now[:3, 2]).masked_fill(~positions.valid, 0).amax()
        self._ahead = Frustum(now @ invert_pose(before) @ now, view.reach, depth)

    @property
    def next_is_in_turn(self) -> bool:
        """Whether the chunk that enters next may retrieve."""
        period = max(1, self._config.window_size // self._config.chunk_size)
        return self._config.retrieval_size != 0 and (self.voxels.moment + 1) % period == 0

    def _has_begun(self, first_frame: int) -> bool:
        """Whether anything is retrieved yet."""
        config = self._config
        if config.first_retrieval == "frame":
            fullest = config.chunk_size + config.pinned_frames + config.window_size + config.hh_size
            return first_frame > max(fullest, EARLIEST)
        return self.voxels.pivots > 0 or (config.retrieve_buf and self.voxels.buffered > 0)
