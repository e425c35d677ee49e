"""Every setting of the core, its default and its limits; the only place where a default lives.

Sections are frozen dataclasses; a receiver gets its section, never the whole. Dotted names
(`cache.window_size`) are the names of ROS parameters and of YAML keys alike.
"""

from __future__ import annotations

from dataclasses import dataclass, field

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


@dataclass(frozen=True)
class ModelConfig:
    """Which network, its weights, and where and in which precision it runs."""

    name: str = setting("embedded", "backbone", choices=tuple(NETWORKS))
    checkpoint: str = setting(
        "", "weights: file or directory; empty = ckpt/<name>/model.* if present, else the box model"
    )
    device: str = setting("auto", "auto = cuda where there is one, else cpu; or a torch device name")
    dtype: str = setting(
        "auto",
        "aggregator precision; auto = bfloat16 where the GPU has it, else float16; CPU float32",
        choices=("auto", "float32", "bfloat16", "float16"),
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


CACHE_MODES = ("full", "causal", "window_kv", "window", "window_chunk_merge", "stac", "xstream")


@dataclass(frozen=True)
class CacheConfig:
    """What a stream remembers. Source: STAC (arXiv 2603.20284), XStreamVGGT (arXiv 2601.01204)."""

    mode: str = setting("window_kv", "how the key/value cache is bounded", choices=CACHE_MODES)
    window_size: int = setting(4, "recent frames kept whole", minimum=1, unit="frames")
    chunk_size: int = setting(4, "most frames per forward pass", minimum=1, unit="frames")
    pinned_frames: int = setting(1, "first frames kept for ever: they carry the coordinate frame", minimum=0,
                                 unit="frames")

    def __post_init__(self) -> None:
        check_settings(self)


@dataclass(frozen=True)
class KernelConfig:
    """Which implementation of attention and voxel merge runs."""

    backend: str = setting("auto", "kernels; auto = the fastest that loads", choices=("auto", "torch", "triton", "cuda"))

    def __post_init__(self) -> None:
        check_settings(self)


@dataclass(frozen=True)
class Config:
    """All sections of the core."""

    model: ModelConfig = field(default_factory=ModelConfig)
    image: ImageConfig = field(default_factory=ImageConfig)
    cache: CacheConfig = field(default_factory=CacheConfig)
    kernels: KernelConfig = field(default_factory=KernelConfig)
