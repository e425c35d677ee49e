"""The shapes of the backbones."""

from __future__ import annotations

from dataclasses import dataclass

from stac_core.settings import refuse

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
