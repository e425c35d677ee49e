"""What can be known and done before the first image: whether the cache has room, and everything compiled."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import torch

from stac_core.cache.byte_limit import ByteLimit
from stac_core.config import Config, SubmapConfig, TrackingConfig
from stac_core.device import free_bytes
from stac_core.images import plan_resize
from stac_core.network.causal_vggt import CausalVGGT
from stac_core.session import StreamSession

USUAL_SIZE = 480, 640  # height and width that images are supposed to have until one has come


def warm_up(network: CausalVGGT, config: Config) -> None:
    """Step over noise until every kernel has run: a GPU compiles and records on first use.

    The camera is taken to be 4:3; with another one only the recordings are made again. A session of its
    own takes the noise, and all of it, however unsure the network is. The modes that take a sequence in
    one pass have nothing to warm up.
    """
    if config.cache.rules.offline:
        return
    cache = replace(config.cache, first_confidence=0.0, lost_confidence=0.0)
    config = replace(config, cache=cache, submap=SubmapConfig(0.0), tracking=TrackingConfig(0))
    session = StreamSession(network, config)
    noise = np.random.default_rng(0).integers(0, 256, (cache.chunk_size, *USUAL_SIZE, 3), dtype=np.uint8)
    frames = cache.pinned_frames + cache.window_size + cache.hh_size + 2 * cache.chunk_size
    steps = [cache.chunk_size] * -(-frames // cache.chunk_size) + list(range(1, cache.chunk_size))
    for count in steps:
        session.step(list(noise[:count]))
    session.reset()
    session.step(list(noise[:1]))  # as a submap begins


def check_budget(network: CausalVGGT, config: Config, dtype: torch.dtype) -> None:
    """ValueError, as of the first step, where the cache's limits leave no room for the live cache.

    Images are taken to be 4:3, since it depends on their shape. dtype: of `LoadedNetwork`.
    """
    row = network.config
    plan = plan_resize(*USUAL_SIZE, config.image, row.image_size)
    tokens = plan.height // row.patch_size * (plan.width // row.patch_size) + row.special_tokens
    limit = ByteLimit(config.cache, row, free_bytes(next(network.parameters()).device))
    limit.begin(tokens, dtype, config.cache.pinned_frames)
