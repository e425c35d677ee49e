"""The settings that are compared: cache modes, what they are made of, and every decision of ours."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from stac_core.config import CacheConfig

DEFAULT = "stac"  # what every switch is judged against
DEFAULT_ALONE = "stac, chunk 1"  # the same for frames one by one
COARSENESS = 37 / 12  # how much wider a patch is than in the published images
BUDGET = 19 << 20  # bytes: a fifth less than `stac` takes after 300 frames of a room
PLAIN = "window_kv 1+8"  # what a frame costs where nothing else is kept


@dataclass(frozen=True)
class Row:
    """One line of a table."""

    group: str
    config: CacheConfig
    reference: str = "causal"  # the row whose outputs are to be met
    bytes_of: str = ""  # a row whose bytes the window is widened to


def _stac(**settings: Any) -> CacheConfig:
    return replace(CacheConfig(mode="stac"), **settings)


def _switch(**settings: Any) -> Row:
    return Row("switches", _stac(**settings))


def _bits(live: int, pinned: int = 0) -> dict[str, Any]:
    return {
        "pinned_bits": pinned or live, "window_bits": live, "anchor_bits": live, "retrieved_bits": 4,
    }  # fmt: skip


WINDOW = CacheConfig(mode="window_kv", window_size=8)
ROWS: dict[str, Row] = {
    "causal": Row("modes", CacheConfig(mode="causal")),
    PLAIN: Row("modes", WINDOW),
    "stac": Row("modes", _stac()),
    "window_kv, bytes of stac": Row("modes", WINDOW, bytes_of="stac"),
    "stac, no voxels": Row("modes", _stac(retrieval_size=0)),
    "window_kv, bytes of stac, no voxels": Row("modes", WINDOW, bytes_of="stac, no voxels"),
    "stac, no anchors": Row("modes", _stac(hh_size=0)),
    "stac, parity": Row("modes", CacheConfig.parity()),
    "stac, parity, scene units, no threshold": Row(
        "modes", CacheConfig.parity(voxel_unit="scene", voxel_conf=0.0)
    ),
    "xstream": Row("modes", CacheConfig(mode="xstream")),
    "xstream, bytes of stac": Row("modes", CacheConfig(mode="xstream"), bytes_of="stac"),
    "xstream, importance per_head": Row("modes", CacheConfig(mode="xstream", importance="per_head")),
    "xstream, importance mass": Row("modes", CacheConfig(mode="xstream", importance="mass")),
    "xstream, int4": Row("modes", CacheConfig(mode="xstream", anchor_bits=4)),
    "16-bit store": Row("storage", _stac(buffer_bits=16, pivot_bits=16)),
    "window_kv, bytes of 16-bit store": Row("storage", WINDOW, bytes_of="16-bit store"),
    "int8 store": Row("storage", _stac(buffer_bits=8, pivot_bits=8)),
    "int4 pivots, int8 buffers": Row("storage", _stac(buffer_bits=8)),
    "int8 live": Row("storage", _stac(**_bits(8))),
    "window_kv, bytes of int8 live": Row("storage", WINDOW, bytes_of="int8 live"),
    "int8 live, 16-bit pinned": Row("storage", _stac(**_bits(8, pinned=16))),
    "int4 live": Row("storage", _stac(**_bits(4))),
    "lengths not widened with the patch": _switch(voxel_size=0.05 / COARSENESS, edge_test=0.1 / COARSENESS),
    "voxel_size 0.025": _switch(voxel_size=0.025),
    "voxel_size 0.1": _switch(voxel_size=0.1),
    "edge_test off": _switch(edge_test=0.0),
    "voxel_unit model": _switch(voxel_unit="model"),
    "voxel_conf 2": _switch(voxel_conf=2.0),
    "positions points": _switch(positions="points"),
    "norm_keep": _switch(norm_keep=True),
    "retrieve_by near": _switch(retrieve_by="near"),
    "retrieve_by query": _switch(retrieve_by="query"),
    "retrieve_after_merge": _switch(retrieve_after_merge=True),
    "retrieve_buf off": _switch(retrieve_buf=False),
    "first_retrieval frame": _switch(first_retrieval="frame"),
    "pivot_rounding stochastic": _switch(pivot_rounding="stochastic"),
    "budget": _switch(memory_budget=BUDGET),
    "budget, forgetting alone": _switch(memory_budget=BUDGET, when_full="forget"),
    "budget, with host memory": _switch(memory_budget=BUDGET, host_budget=4 * BUDGET),
    "prefetch": _switch(prefetch=True),
    "feedback 1": _switch(feedback=1.0),
    "gate 0": _switch(gate=0.0),
    "pivot_inertia 64": _switch(pivot_inertia=64.0),
    "stale_after 8": _switch(stale_after=8),
    "keep_special 128": _switch(keep_special=128),
    "decay_unit chunk": _switch(decay_unit="chunk"),  # the same where chunks are of four
    "score sum": _switch(score="sum"),
    "temperature 0.97": _switch(temperature=0.97),
    "eviction recent": _switch(eviction="recent"),
    "eviction random": _switch(eviction="random"),
    "subsample 0.25": _switch(subsample=0.25),
    "subsample 0.25, rotating": _switch(subsample=0.25, subsample_phase="rotating"),
    "hh_size 4": _switch(hh_size=4),
    "retrieval_size 8": _switch(retrieval_size=8),
    "camera_window 8": _switch(camera_window=8),
    "camera_window 64": _switch(camera_window=64),
    "camera_window 300": _switch(camera_window=300),
    "camera_window 300, retrieve_by query": _switch(camera_window=300, retrieve_by="query"),
    "causal, chunk 1": Row("chunk", CacheConfig(mode="causal", chunk_size=1), reference="causal, chunk 1"),
    DEFAULT_ALONE: Row("chunk", _stac(chunk_size=1), reference="causal, chunk 1"),
    "stac, chunk 1, score sum": Row("chunk", _stac(chunk_size=1, score="sum"), reference="causal, chunk 1"),
    "stac, chunk 1, decay_unit chunk": Row(
        "chunk", _stac(chunk_size=1, decay_unit="chunk"), reference="causal, chunk 1"
    ),
}
