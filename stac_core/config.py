"""Every setting of the core, its default and its limits; the only place where a default lives.

Sections are frozen dataclasses; a receiver gets its section, never the whole. Dotted names
(`cache.window_size`) are the names of ROS parameters and of YAML keys alike.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from stac_core.settings import check_settings, refuse, setting

PATCH_SIZE = 14  # pixels; of every backbone, and of the rules that prepare images


@dataclass(frozen=True)
class NetworkConfig:
    """Sizes of one `CausalVGGT`; a backbone is a row of these numbers, never a branch.

    Source: backbone tables of STream3R and StreamVGGT (both fine-tunes of VGGT-1B).
    """

    name: str
    patch_size: int
    width: int  # C, of the patch encoder and of the aggregator
    position_grid: int  # the stored position embedding covers grid × grid patches
    registers: int
    encoder_blocks: int
    encoder_heads: int
    encoder_mlp_ratio: float
    layers: int  # aggregator: one frame block and one global block each
    heads: int
    mlp_ratio: float
    camera_blocks: int
    camera_heads: int
    camera_mlp_ratio: float
    camera_iterations: int
    camera_cache: str  # "per_iteration" (STream3R) or "shared" by all iterations (StreamVGGT)
    dense_features: int
    dense_channels: tuple[int, int, int, int]
    dense_layers: tuple[int, int, int, int]  # aggregator layers read by the dense heads
    image_size: int  # width in pixels that the network was trained at
    ignored_prefixes: tuple[str, ...] = ()  # checkpoint keys known to serve nothing at inference

    def __post_init__(self) -> None:
        for name, width, heads in (
            ("encoder_heads", self.width, self.encoder_heads),
            ("heads", self.width, self.heads),
            ("camera_heads", 2 * self.width, self.camera_heads),
        ):
            if width % (4 * heads):
                raise refuse(self, name, f"a width of {width} must split into heads of a multiple of 4", 1)
        layers = list(self.dense_layers)
        if layers[-1] != self.layers - 1 or layers != sorted(set(layers)):
            nearest = (*self.dense_layers[:-1], self.layers - 1)
            raise refuse(self, "dense_layers", "must ascend to the last layer, the cameras read it", nearest)
        if self.camera_cache not in ("per_iteration", "shared"):
            raise refuse(self, "camera_cache", "choose 'per_iteration' or 'shared'", "per_iteration")

    @property
    def special_tokens(self) -> int:
        """Camera and register tokens in front of the patches of every frame."""
        return 1 + self.registers


_VGGT_1B = dict(
    patch_size=PATCH_SIZE,
    width=1024,
    position_grid=37,
    registers=4,
    encoder_blocks=24,
    encoder_heads=16,
    encoder_mlp_ratio=4.0,
    layers=24,
    heads=16,
    mlp_ratio=4.0,
    camera_blocks=4,
    camera_heads=16,
    camera_mlp_ratio=4.0,
    camera_iterations=4,
    dense_features=256,
    dense_channels=(256, 512, 1024, 1024),
    dense_layers=(4, 11, 17, 23),
    image_size=518,
    ignored_prefixes=("track_head.",),
)

NETWORKS: dict[str, NetworkConfig] = {
    "stream3r": NetworkConfig(name="stream3r", camera_cache="per_iteration", **_VGGT_1B),  # type: ignore[arg-type]
    "streamvggt": NetworkConfig(name="streamvggt", camera_cache="shared", **_VGGT_1B),  # type: ignore[arg-type]
    "embedded": NetworkConfig(
        name="embedded",
        patch_size=PATCH_SIZE,
        width=192,
        position_grid=11,
        registers=4,
        encoder_blocks=4,
        encoder_heads=3,
        encoder_mlp_ratio=4.0,
        layers=6,
        heads=3,
        mlp_ratio=2.0,
        camera_blocks=1,
        camera_heads=6,
        camera_mlp_ratio=2.0,
        camera_iterations=4,
        camera_cache="per_iteration",
        dense_features=32,
        dense_channels=(24, 32, 48, 64),
        dense_layers=(1, 3, 4, 5),
        image_size=168,
    ),
}

# What suits a network, where that was measured: how far it follows a camera from its first frame
# (`submap.reach`), and the landmarks that refine its poses (`tracking.landmarks`).
_REACH = {"embedded": 0.25}
_LANDMARKS = {"embedded": 250}


@dataclass(frozen=True)
class ModelConfig:
    """Which network, its weights, and where and in which precision it runs."""

    name: str = setting("embedded", "backbone", choices=tuple(NETWORKS))
    checkpoint: str = setting(
        "", "weights: file or directory; empty = ckpt/<name>/model.* if present, else the bundled model"
    )
    device: str = setting("auto", "auto = cuda where there is one, else cpu; or a torch device name")
    dtype: str = setting(
        "auto",
        "aggregator precision; auto = bfloat16 where the GPU has it, else float16; CPU float32",
        choices=("auto", "float32", "bfloat16", "float16"),
    )
    execution: str = setting(
        "auto",
        "eager = operation by operation; compiled = small operations fused by torch.compile; recorded = "
        "compiled, and replayed as CUDA graphs; auto = recorded on a GPU, eager on the CPU",
        choices=("auto", "eager", "compiled", "recorded"),
    )
    seed: int = setting(0, "seed of random weights where no trained weights exist", minimum=0)

    def __post_init__(self) -> None:
        check_settings(self)


@dataclass(frozen=True)
class ImageConfig:
    """How a camera frame becomes network pixels."""

    rule: str = setting(
        "crop",
        "crop = fit the width, crop tall images; pad = fit the longer side, pad white; "
        "evaluation, evaluation_crop = the published evaluation scripts, reaching whole patches by a "
        "second resize or by a cut",
        choices=("crop", "pad", "evaluation", "evaluation_crop"),
    )
    size: int = setting(
        0,
        "network image width, for crop and pad a multiple of 14; 0 = the size the network was trained at",
        minimum=0,
        maximum=2044,
        unit="px",
    )

    def __post_init__(self) -> None:
        check_settings(self)
        if self.size % PATCH_SIZE and not self.rule.startswith("evaluation"):
            nearest = max(1, round(self.size / PATCH_SIZE)) * PATCH_SIZE
            raise refuse(self, "size", f"must be a multiple of the patch size {PATCH_SIZE}", nearest)


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
        256, "voxels that the first memory page has room for; it grows by an eighth", minimum=1
    )

    # Bytes
    memory_budget: int = setting(
        -1,
        "hard limit of live and merged tokens together; -1 = half of what the live cache leaves free of the "
        "device's memory, 0 = none",
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


@dataclass(frozen=True)
class KernelConfig:
    """Which implementation of attention, voxel merge and what else has hand-written kernels runs."""

    backend: str = setting(
        "auto", "kernels; auto = the fastest that loads", choices=("auto", "torch", "triton", "cuda")
    )

    def __post_init__(self) -> None:
        check_settings(self)


@dataclass(frozen=True)
class SubmapConfig:
    """When a stream goes on with an empty memory, seen from its latest frame or from one seen before."""

    reach: float = setting(
        -1.0,
        "how far the camera departs from a submap's first frame, its turn in radians plus its way in median "
        "depths, before the next submap begins; 0 = never; -1 = what suits the network: "
        f"{_REACH['embedded']} for the bundled model, 0 for others",
        minimum=-1.0,
    )
    keyframes: int = setting(
        64,
        "first frames of submaps that are kept, 16 bytes per network pixel each: where the camera comes back "
        "to one, the next submap begins there, and what drift had added is gone, also from what was mapped; "
        "0 = none",
        minimum=0,
        unit="frames",
    )

    def __post_init__(self) -> None:
        check_settings(self)
        if -1 < self.reach < 0:
            raise refuse(self, "reach", "neither a distance nor -1", 0.0)

    def reach_of(self, network: NetworkConfig) -> float:
        """The distance; 0 = a stream is one submap."""
        return _REACH.get(network.name, 0.0) if self.reach < 0 else self.reach


@dataclass(frozen=True)
class TrackingConfig:
    """Poses refined by points that are followed from frame to frame, of a calibrated camera."""

    landmarks: int = setting(
        -1,
        "points of the scene followed at once: their shifts refine poses and bring depths to one scale, "
        "where the camera's calibration is known; 0 = poses and depths are as the network says; -1 = what "
        f"suits the network: {_LANDMARKS['embedded']} for the bundled model, 0 for others",
        minimum=-1,
    )

    def __post_init__(self) -> None:
        check_settings(self)

    def landmarks_of(self, network: NetworkConfig) -> int:
        """The number; 0 = none are followed."""
        return _LANDMARKS.get(network.name, 0) if self.landmarks < 0 else self.landmarks


@dataclass(frozen=True)
class Config:
    """All sections of the core."""

    model: ModelConfig = field(default_factory=ModelConfig)
    image: ImageConfig = field(default_factory=ImageConfig)
    cache: CacheConfig = field(default_factory=CacheConfig)
    kernels: KernelConfig = field(default_factory=KernelConfig)
    submap: SubmapConfig = field(default_factory=SubmapConfig)
    tracking: TrackingConfig = field(default_factory=TrackingConfig)


def require_stream(config: Config) -> None:
    """Raises ValueError for a mode that needs all images at once, where they come one by one."""
    if config.cache.rules.offline:
        streams = ", ".join(name for name, mode in MODES.items() if not mode.offline)
        raise ValueError(
            f"cache.mode = {config.cache.mode!r} needs all images at once; a node streams: {streams}"
        )
