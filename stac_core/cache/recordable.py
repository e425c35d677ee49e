"""Attention of a stream as part of a recorded pass.

What a pass asks of a stream's memory is the same every time, only where the past lies and how long it is
changes. Kernels that read this from a list can be recorded together with everything around them: before each
pass the stream writes into the list where its memory is.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from stac_core.cache.memory_model import anchor_tokens, camera_frames, window_frames
from stac_core.config import CacheConfig, NetworkConfig
from stac_core.device import send
from stac_core.kernels.attend_listed import (
    ALIGNMENT,
    FIELDS,
    Counted,
    ListedKernels,
    ListedSegment,
    Listing,
    room_to_count,
    write_list,
)


@dataclass(frozen=True)
class Plan:
    """How a stream attends, whatever it holds. Streams with equal plans can use one recording."""

    kernels: ListedKernels
    scene: Listing
    camera: Listing
    layers: int
    heads: int
    iterations: int  # of the camera head
    blocks: int  # of its trunk

    def open(self, device: torch.device) -> RecordableAttention:
        return RecordableAttention(self, device)


class RecordableAttention:
    """Answers the network's questions from memory that `point_to` has named last."""

    def __init__(self, plan: Plan, device: torch.device) -> None:
        """Until something is named everything is empty, and new tokens are not kept."""
        self._plan, scene = plan, plan.scene
        shapes = (plan.layers, len(scene.biased), FIELDS), (plan.iterations, plan.blocks, 1, FIELDS)
        sizes = [math.prod(shape) for shape in shapes]
        self._lists = torch.zeros(sum(sizes), dtype=torch.int64, device=device)
        self._scene, self._camera = (
            part.view(shape) for part, shape in zip(self._lists.split(sizes), shapes, strict=True)
        )
        self.mass: Tensor | None = None  # [layers, heads, tokens] what each key has received in the last pass
        if scene.subsample is not None:
            self.mass = torch.zeros(plan.layers, plan.heads, scene.most_keys, device=device)
        self._counted: Counted | None = None  # what that takes, by layer; a recording has passes of one size

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """q, k, v [1, heads, frames·tokens, D] → like q."""
        plan, counted = self._plan, None
        if plan.scene.subsample is not None:
            if self._counted is None:  # not of the memory that a recording shares: nothing is recorded yet
                self._counted = room_to_count(plan.layers * plan.heads, q[0], plan.scene.subsample)
            counted = self._counted.of(slice(layer * plan.heads, (layer + 1) * plan.heads))
        return plan.kernels.attend(q[0], k[0], v[0], self._scene[layer], plan.scene, counted)[None]

    def finish(self) -> None:
        """Once all layers have been answered: the mass, for which none of them waits."""
        if self.mass is not None and self._counted is not None:
            mass = self.mass.flatten(0, 1)
            self._plan.kernels.sum_mass(self._counted, self._scene[0], self._plan.scene, mass)

    def attend_camera(self, iteration: int, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """q, k, v [1, heads, frames, D] → like q."""
        listed = self._camera[iteration, layer]
        return self._plan.kernels.attend(q[0], k[0], v[0], listed, self._plan.camera, None)[None]

    def point_to(self, scene: Sequence[ListedSegment | None], camera: NDArray[np.int64]) -> None:
        """scene: in the plan's order, new tokens included; camera [iterations, blocks, 1, FIELDS]: listed."""
        listed = write_list(scene, self._plan.layers)
        self._lists.copy_(send(torch.from_numpy(np.concatenate([listed, camera], None)), self._lists.device))


def make_plan(
    kernels: ListedKernels | None,
    config: CacheConfig,
    network: NetworkConfig,
    tokens_per_frame: int,
    dtype: torch.dtype,
    pins: int,
) -> Plan | None:
    """None where attention asks for more than the kernels over listed segments give.

    They know numbers, not codes, in memory that is bounded; queries cannot be looked at beside them.
    """
    rules, dim = config.rules, network.width // network.heads
    bits = min(config.pinned_bits, config.window_bits, config.anchor_bits, config.retrieved_bits)
    obstacles = (
        not rules.bounded,
        bits < 16,
        config.retrieve_by == "query" or config.subsample_phase == "rotating",
        rules.pruned and config.importance != "mass",
        rules.voxels and config.retrieval_size < 0,
        dim * dtype.itemsize % ALIGNMENT != 0,
    )
    if kernels is None or any(obstacles):
        return None
    frames = pins + window_frames(config) + config.chunk_size + config.retrieval_size * rules.voxels
    ring = (config.keep_special + config.chunk_size) * network.special_tokens
    most = frames * tokens_per_frame + anchor_tokens(config, tokens_per_frame) + ring
    retrieves = rules.voxels and config.retrieval_size > 0
    biased = (False,) * (3 + rules.anchors) + (True,) * retrieves
    entries = pins + camera_frames(config) + config.chunk_size
    if network.camera_cache == "shared":
        entries *= network.camera_iterations
    return Plan(
        kernels,
        Listing(biased, biased.count(False) - 1, config.subsample if rules.anchors else None, most),
        Listing((False,), 0, None, entries),
        network.layers,
        network.heads,
        network.camera_iterations,
        network.camera_blocks,
    )
