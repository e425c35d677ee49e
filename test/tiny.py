"""A tiny network with golden weights, its images, and synthetic frames: shared by all tests.

The golden figures and their tolerances are described in test/golden/README.md.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file
from torch import Tensor

from stac_core.config import NetworkConfig
from stac_core.network.causal_vggt import CausalVGGT

GOLDEN = Path(__file__).parent / "golden"
TINY = NetworkConfig(
    name="tiny",
    patch_size=14,
    width=64,
    position_grid=5,
    registers=4,
    encoder_blocks=3,
    encoder_heads=8,
    encoder_mlp_ratio=4.0,
    layers=6,
    heads=4,
    mlp_ratio=4.0,
    camera_blocks=3,
    camera_heads=8,
    camera_mlp_ratio=4.0,
    camera_iterations=4,
    camera_cache="per_iteration",
    dense_features=16,
    dense_channels=(16, 24, 32, 40),
    dense_layers=(1, 3, 4, 5),
    image_size=84,
    ignored_prefixes=("track_head.",),
)
HEIGHT, WIDTH = 70, 84  # of the golden images
TOKENS = 35  # per golden frame


def golden(name: str) -> dict[str, Tensor]:
    """The tensors of one golden file."""
    return load_file(GOLDEN / f"{name}.safetensors")


def golden_weights() -> dict[str, Tensor]:
    """The state dict of the reduced STream3R."""
    return golden("weights_aggregator") | golden("weights_heads")


def tiny_network(camera_cache: str = "per_iteration") -> CausalVGGT:
    """The reduced network with its golden weights, in eval mode."""
    network = CausalVGGT(replace(TINY, camera_cache=camera_cache))
    network.load_state_dict(golden_weights())
    return network.eval()


def golden_images(frames: int = 8) -> Tensor:
    """[1, S, 3, 70, 84] in [0, 1]."""
    return golden("inputs")["images"][None, :frames]


def synthetic_frames(count: int, height: int = 104, width: int = 128, seed: int = 0) -> list[np.ndarray]:
    """uint8 RGB [H, W, 3]: a textured plane that slides past, so that neighbouring frames overlap.

    At the default size the tiny network sees them at the golden 70×84 pixels.
    """
    noise = np.random.default_rng(seed).random((height // 8 + 2, (width + 4 * count) // 8 + 2, 3))
    plane = np.kron(noise, np.ones((8, 8, 1)))[:height]
    return [(plane[:, 4 * i : 4 * i + width] * 255).astype(np.uint8) for i in range(count)]


def assert_matches(actual: Tensor, expected: Tensor, tolerance: float, what: str = "") -> None:
    """|a − b| ≤ tolerance · max(1, max|b|), the rule of the golden figures."""
    assert actual.shape == expected.shape, f"{what}: {list(actual.shape)} against {list(expected.shape)}"
    limit = tolerance * max(1.0, expected.abs().max().item())
    error = (actual.to(expected.dtype) - expected).abs().max().item()
    assert error <= limit, f"{what}: largest difference {error:.2e}, allowed {limit:.2e}"


@torch.inference_mode()
def figures(network: CausalVGGT, images: Tensor, context: object, points: bool = True) -> dict[str, Tensor]:
    """One pass in full detail, under the names of the golden files."""
    height, width = images.shape[-2:]
    tokens = network.aggregator(images, context)
    encodings = network.camera_head(tokens.camera, context)
    found = dict(zip((f"agg_{layer}" for layer in network.config.dense_layers), tokens.layers, strict=True))
    found |= {f"pose_enc_iter{i}": encoding for i, encoding in enumerate(encodings)}
    found["pose_enc"] = encodings[-1]
    found["depth"], found["depth_conf"] = network.depth_head(tokens.layers, height, width)
    if points:
        found["world_points"], found["world_points_conf"] = network.point_head(tokens.layers, height, width)
    return found
