"""How many bytes a stream's live cache takes at most, before a single token is there."""

from __future__ import annotations

import torch

from stac_core.config import CacheConfig, NetworkConfig
from stac_core.kernels.quantization import Codec

FRAME_NOTES = 3 * 8  # frame, birth and voxel key of a slot in a store of whole frames
ANCHOR_NOTES = 4 + 8 + 4  # score, voxel key and birth of a slot, per layer and head


def token_bytes(bits: int, dim: int, dtype: torch.dtype) -> int:
    """Key and value of one token in one layer and head."""
    return 2 * sum(column.width * column.dtype.itemsize for column in Codec(bits, dim, dtype).columns)


def anchor_tokens(config: CacheConfig, tokens_per_frame: int) -> int:
    """Tokens kept beyond the window per layer and head.

    ValueError where an xstream budget does not even hold the first and the newest frame.
    """
    if not config.rules.anchors:
        return 0
    if not config.rules.pruned:
        return config.hh_size * tokens_per_frame
    whole = (config.pinned_frames + 1) * tokens_per_frame
    budget = config.xstream_budget or 4 * tokens_per_frame
    if budget < whole:
        raise ValueError(
            f"cache.xstream_budget = {budget}: the pinned and the newest frame alone are {whole} tokens; "
            f"nearest value that works: {whole}, and tokens in between survive only beyond that"
        )
    return budget - whole


def window_frames(config: CacheConfig) -> int:
    """Recent frames kept whole; a pruned cache keeps the newest only."""
    return 1 if config.rules.pruned else config.window_size


def camera_frames(config: CacheConfig) -> int:
    """Recent frames that the camera memory keeps."""
    return config.camera_window if config.rules.anchors else config.window_size


def live_bytes(
    config: CacheConfig,
    network: NetworkConfig,
    tokens_per_frame: int,
    dtype: torch.dtype,
    pins: int | None = None,
) -> int:
    """All but the voxel memory, at its fullest: what a byte limit must grant in any case.

    pins: pinned frames, where there are more than the settings say. They come on top of `xstream_budget`.
    """
    pins = config.pinned_frames if pins is None else pins
    lanes, dim, frame = network.layers * network.heads, network.width // network.heads, tokens_per_frame
    window = window_frames(config) + config.chunk_size

    def store(frames: int, tokens: int, bits: int) -> int:
        scored = 4 if config.rules.anchors else 0
        return frames * tokens * (lanes * (token_bytes(bits, dim, dtype) + scored) + FRAME_NOTES)

    anchors = anchor_tokens(config, frame) * lanes
    total = store(pins, frame, config.pinned_bits) + store(window, frame, config.window_bits)
    total += anchors * (token_bytes(config.anchor_bits, dim, dtype) + ANCHOR_NOTES)
    if config.keep_special:
        ring = config.keep_special + config.chunk_size
        total += store(ring, network.special_tokens, config.window_bits)
    if config.rules.voxels and config.retrieval_size > 0:
        retrieved = config.retrieval_size * frame * lanes
        total += retrieved * (token_bytes(config.retrieved_bits, dim, dtype) + 4)  # 4: the bias
        total += 4 * retrieved if config.feedback else 0  # where each came from
        total += 8 * (config.window_size * frame + 1)  # places seen recently, and how many had none
        total += 64 if config.prefetch else 0  # the last pose
    if config.coded:
        total += 4 * lanes * dim  # the key scale
    total += config.repose_frames * 4 * (2 * network.width + 16)
    entries = pins + camera_frames(config) + config.chunk_size
    entries *= network.camera_iterations * network.camera_blocks
    return total + entries * (2 * 2 * network.width * 4) + 2 * 8 * entries
