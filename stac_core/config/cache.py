"""What a stream remembers, and how it forgets."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from stac_core.settings import check_settings, refuse, setting


@dataclass(frozen=True)
class CacheMode:
    """What a mode switches on; the settings of `CacheConfig` say how much of it."""

    offline: bool = False  # one pass over the whole sequence, nothing stored
    bounded: bool = True  # frames older than the window go
    anchors: bool = False  # single tokens outlive the window, by score
    voxels: bool = False  # tokens with a place in space outlive that too, merged by voxel
    pruned: bool = False  # anchors are counted in tokens per layer, the window is the newest frame


MODES: dict[str, CacheMode] = {
    "full": CacheMode(offline=True),
    "window": CacheMode(offline=True),
    "causal": CacheMode(bounded=False),
    "window_kv": CacheMode(),
    "window_chunk_merge": CacheMode(anchors=True, voxels=True),
    "stac": CacheMode(anchors=True, voxels=True),  # the defaults below are its preset
    "xstream": CacheMode(anchors=True, pruned=True),
}
CACHE_BITS = (16, 8, 4)


@dataclass(frozen=True)
class CacheConfig:
    """What a stream remembers. Sources: STAC (arXiv 2603.20284), XStreamVGGT (arXiv 2601.01204).

    Sizes in frames mean that many frames' worth of tokens per layer and head. `parity` gives the settings
    under which the published method and this one agree; the defaults depart from it where noted.
    """

    mode: str = setting("stac", "how the key/value cache is bounded", choices=tuple(MODES))
    chunk_size: int = setting(4, "most frames per forward pass", minimum=1, unit="frames")
    window_size: int = setting(4, "recent frames kept whole", minimum=1, unit="frames")
    pinned_frames: int = setting(
        1, "first frames kept for ever: they carry the coordinate frame", minimum=0, unit="frames"
    )
    first_confidence: float = setting(
        0.0,
        "mean confidence that a chunk needs to begin the stream, as a bad reference hurts for ever; 0 = any",
        minimum=0.0,
    )
    camera_window: int = setting(
        128,
        "frames the pose head looks back in stac and xstream, 0.3 % of a frame's memory each: longer keeps "
        "poses more consistent",
        minimum=1,
        unit="frames",
    )
    repose_frames: int = setting(
        0,
        "frames whose poses can be read again with all later knowledge, 8 KiB each at full size; 0 = none",
        minimum=0,
        unit="frames",
    )

    # Tokens that outlive the window by score
    hh_size: int = setting(2, "heavy hitters kept beyond the window", minimum=0, unit="frames")
    eviction: str = setting(
        "score",
        "which tokens stay: highest score, most recent, or random",
        choices=("score", "recent", "random"),
    )
    temperature: float = setting(0.9, "factor on old scores at every decay", minimum=0.0, maximum=1.0)
    decay_unit: str = setting(
        "frames",
        "chunk = one decay per pass as published; frames = temperature^(frames/4), "
        "so that the horizon does not depend on the chunk size",
        choices=("chunk", "frames"),
    )
    score: str = setting(
        "mean",
        "mean divides by exposure; sum favours tokens scored for long, as published",
        choices=("sum", "mean"),
    )
    subsample: float = setting(1.0, "share of queries that count for scores", minimum=0.01, maximum=1.0)
    subsample_phase: str = setting(
        "fixed",
        "which queries a share of them is: fixed = the same in every pass, as published; "
        "rotating = others in turn, since an even stride can follow the columns of the image",
        choices=("fixed", "rotating"),
    )
    keep_special: int = setting(
        0,
        "evicted frames whose camera and register tokens stay in a ring: they have "
        "no place in space and would be lost",
        minimum=0,
        unit="frames",
    )

    # Tokens merged by voxel
    retrieval_size: int = setting(
        2, "merged tokens attended to; -1 = all near ones", minimum=-1, unit="frames"
    )
    retrieve_buf: bool = setting(
        True,
        "fill up what merged tokens leave free with single evicted ones, as the "
        "paper says; no effect in the published code",
    )
    retrieve_by: str = setting(
        "weight",
        "which merged tokens come first: heaviest, nearest voxel, or most alike the queries",
        choices=("weight", "near", "query"),
    )
    retrieve_after_merge: bool = setting(
        False, "retrieve after the chunk's own evictions are merged: no blind gap of one chunk"
    )
    feedback: float = setting(
        0.0,
        "part of the attention received by a retrieved merged token that adds to its weight, so that "
        "what is looked at comes back; 0 = none",
        minimum=0.0,
    )
    prefetch: bool = setting(
        False,
        "retrieve also around what the camera will see if it moves on as before: the next chunk uses it",
    )
    first_retrieval: str = setting(
        "pivot",
        "frame = the published rule, not before frame 16; pivot = as soon as something is merged",
        choices=("frame", "pivot"),
    )
    positions: str = setting(
        "depth",
        "where a token lies: depth through the predicted pose, usually the more accurate, or the point head",
        choices=("depth", "points"),
    )
    voxel_size: float = setting(0.05, "voxel edge, in voxel_unit", minimum=1e-6)
    voxel_unit: str = setting(
        "scene",
        "model = units of the prediction; scene = times the median depth of the first chunk, since scale is "
        "arbitrary, and in images narrower than 37 patches so much wider as a patch is",
        choices=("model", "scene"),
    )
    voxel_conf: float = setting(
        0.0,
        "tokens at or below this confidence get no place and are lost when evicted, hence 0 = none; "
        "published: 2, on the scale of the published networks",
        minimum=0.0,
    )
    lost_confidence: float = setting(
        0.0,
        "mean confidence of a chunk below which its tokens get no place, as it would be a wrong one; 0 = off",
        minimum=0.0,
    )
    edge_test: float = setting(
        0.1,
        "relative depth range in a patch, at 37 patches across, from which a token lies on an edge and gets "
        "no place: its mean point would float; 0 = off",
        minimum=0.0,
    )
    voxel_buf_cap: int = setting(8, "single tokens waiting per voxel, layer and head", minimum=2)
    voxel_piv_cap: int = setting(4, "merged tokens per voxel, layer and head", minimum=2)
    merge_threshold: float = setting(
        0.8, "cosine from which a token joins a merged one", minimum=-1.0, maximum=1.0
    )
    stale_after: int = setting(
        0,
        "passes after which a merged token that nothing has joined takes only tokens from stale_threshold "
        "on: what was there may have moved away; 0 = off",
        minimum=0,
        unit="passes",
    )
    stale_threshold: float = setting(
        0.9, "cosine from which a token joins a stale merged one", minimum=-1.0, maximum=1.0
    )
    norm_keep: bool = setting(
        False,
        "merged keys are as long as their members on average: the plain mean is shorter, so seen too little",
    )
    gate: float = setting(
        0.2,
        "tokens that match nothing and score below this share of their voxel's mean are dropped; 0 = none",
        minimum=0.0,
    )
    pivot_inertia: float = setting(
        0.0, "largest weight of a merged token, so that it stays able to move; 0 = none", minimum=0.0
    )
    allocator: str = setting(
        "segment",
        "static = all slots of a voxel at once, slab = four at a time, segment = one at a time; same results",
        choices=("static", "slab", "segment"),
    )
    voxel_num: int = setting(
        256, "voxels that the first memory page has room for; later ones add a sixteenth each", minimum=1
    )

    # Bytes
    memory_budget: int = setting(
        -1,
        "hard limit of live and merged tokens together; -1 = half of what the live cache leaves free of the "
        "device's memory (on the CPU within a container's limit), 0 = none",
        minimum=-1,
        unit="B",
    )
    host_budget: int = setting(
        0, "host memory for voxels that do not fit the limit; 0 = none", minimum=0, unit="B"
    )
    when_full: str = setting(
        "spill,coarsen,forget",
        "what makes room under memory_budget, in this order; spilling needs host_budget",
        choices=("spill,coarsen,forget", "coarsen,spill,forget", "forget"),
    )
    coarsen_levels: int = setting(
        2, "times that the edge of a voxel may double to make room", minimum=0, maximum=8
    )
    pinned_bits: int = setting(
        16, "storage of pinned frames; 16 = as the network computes", choices=CACHE_BITS
    )
    window_bits: int = setting(16, "storage of the window and of the running chunk", choices=CACHE_BITS)
    anchor_bits: int = setting(16, "storage of tokens beyond the window", choices=CACHE_BITS)
    retrieved_bits: int = setting(16, "storage of the retrieved set between chunks", choices=CACHE_BITS)
    buffer_bits: int = setting(
        4,
        "storage of single tokens in voxels; 4 costs nothing that could be measured; published: 16",
        choices=CACHE_BITS,
    )
    pivot_bits: int = setting(
        4, "storage of merged tokens, whose means tolerate rounding best; published: 16", choices=CACHE_BITS
    )
    pivot_rounding: str = setting(
        "nearest",
        "of coded merged tokens: nearest, or stochastic = up or down by chance, since an update smaller "
        "than half a step would else be lost every time",
        choices=("nearest", "stochastic"),
    )

    # XStreamVGGT
    xstream_budget: int = setting(0, "tokens per layer; 0 = four frames' worth", minimum=0, unit="tokens")
    importance: str = setting(
        "pooled",
        "pooled = head-averaged pooled queries, as published; per_head = pooled "
        "queries of each head; mass = exact attention received",
        choices=("pooled", "per_head", "mass"),
    )

    def __post_init__(self) -> None:
        check_settings(self)
        if self.window_bits < self.anchor_bits or (
            self.window_bits < 16 and self.window_bits != self.anchor_bits
        ):
            why = f"tokens leave the window (window_bits = {self.window_bits}) and are coded only once"
            raise refuse(self, "anchor_bits", why, self.window_bits)
        if self.stale_after and self.stale_threshold < self.merge_threshold:
            why = f"stale merged tokens must be stricter than merge_threshold = {self.merge_threshold}"
            raise refuse(self, "stale_threshold", why, self.merge_threshold)
        if self.memory_budget > 0 and not self.rules.bounded:
            why = f"mode {self.mode!r} keeps every frame, so no limit can hold; choose another mode"
            raise refuse(self, "memory_budget", why, 0)
        if self.memory_budget > 0 and self.retrieval_size < 0:
            raise refuse(
                self, "retrieval_size", "a retrieved set without a limit has no place in a budget", 2
            )

    @property
    def can_be_limited(self) -> bool:
        """Whether a limit in bytes could hold."""
        return self.rules.bounded and self.retrieval_size >= 0

    @property
    def rules(self) -> CacheMode:
        """What the mode switches on."""
        return MODES[self.mode]

    def frames_per_pass(self, total: int) -> int:
        """Frames of a sequence of `total` that the network sees at once: an offline mode sees all of them."""
        return total if self.rules.offline else self.chunk_size

    @property
    def coded(self) -> bool:
        """Whether anything is stored as codes."""
        live = min(self.pinned_bits, self.window_bits, self.anchor_bits, self.retrieved_bits)
        return min(live, self.store_bits) < 16

    @property
    def store_bits(self) -> int:
        """The least of the voxel memory; 16 where there is none."""
        return min(self.buffer_bits, self.pivot_bits) if self.rules.voxels and self.retrieval_size else 16

    @classmethod
    def parity(cls, **settings: Any) -> CacheConfig:
        """The published behaviour of `stac`, with the given settings on top."""
        published = {
            "mode": "stac",
            "decay_unit": "chunk",
            "score": "sum",
            "retrieve_buf": False,
            "first_retrieval": "frame",
            "positions": "points",
            "voxel_unit": "model",
            "voxel_conf": 2.0,
            "edge_test": 0.0,
            "buffer_bits": 16,
            "pivot_bits": 16,
        }
        return cls(**{**published, **settings})
