"""The whole network in one pass against the figures of the published architectures."""

import json

import pytest
import torch
from tiny import (
    GOLDEN,
    HEIGHT,
    TINY,
    TOKENS,
    WIDTH,
    assert_matches,
    figures,
    golden,
    golden_images,
    tiny_network,
)

from stac_core.cache.one_pass import OnePass
from stac_core.geometry import decode_pose, invert_pose

TOLERANCE = 2e-5


@pytest.fixture(scope="module")
def network():
    return tiny_network()


def test_the_tiny_network_has_the_sizes_of_the_figures():
    sizes = json.loads((GOLDEN / "config.json").read_text())
    assert (TINY.width, TINY.layers, TINY.heads) == (
        sizes["embed_dim"],
        sizes["aggregator_depth"],
        sizes["aggregator_num_heads"],
    )
    assert list(TINY.dense_layers) == sizes["dpt_layer_idx"]
    assert (sizes["image_height"], sizes["image_width"]) == (HEIGHT, WIDTH)
    assert TINY.special_tokens + HEIGHT * WIDTH // TINY.patch_size**2 == TOKENS


@pytest.mark.parametrize(
    ("file", "mode", "frames"),
    [
        ("s3r_full", "full", 5),
        ("s3r_causal", "causal", 5),
        ("s3r_causal", "window", 5),
        ("s3r_window", "window", 8),
        ("sv_causal", "causal", 5),
    ],
)
def test_one_pass(network, file, mode, frames):
    expected = golden(file)
    found = figures(network, golden_images(frames), OnePass(mode), points="world_points" in expected)
    world_from_camera, intrinsics = decode_pose(found["pose_enc"], HEIGHT, WIDTH)
    found |= {"extrinsic": invert_pose(world_from_camera)[..., :3, :], "intrinsic": intrinsics}
    for name, value in expected.items():
        tolerance = 1e-4 if name == "intrinsic" else TOLERANCE
        assert_matches(found[name], value, tolerance, name)


def test_forward_is_its_parts(network):
    images = golden_images(3)
    parts = figures(network, images, OnePass("causal"))
    with torch.inference_mode():
        prediction = network(images, OnePass("causal"), points=True)
        without_points = network(images, OnePass("causal"))
    assert torch.equal(prediction.pose_encoding, parts["pose_enc"])
    assert torch.equal(prediction.depth, parts["depth"][..., 0])
    assert torch.equal(prediction.points, parts["world_points"])
    assert without_points.points is None
    assert torch.equal(without_points.depth, prediction.depth)
    assert prediction.frames == 3
    assert prediction.world_from_camera.shape == (1, 3, 4, 4)


def test_a_batch_is_its_members(network):
    images = golden_images(6).unflatten(1, (2, 3))[0]
    with torch.inference_mode():
        together = network(images, OnePass("causal"))
        alone = network(images[1:], OnePass("causal"))
    assert_matches(together.depth[1:], alone.depth, 1e-5)
    assert_matches(together.pose_encoding[1:], alone.pose_encoding, 1e-5)


@pytest.mark.parametrize("mode", ["full", "causal"])
def test_who_notices_a_changed_frame(network, mode):
    images = golden_images(5)
    changed = images.clone()
    changed[:, 2] = 0.7 * changed[:, 2] + 0.1
    with torch.inference_mode():
        difference = (network(images, OnePass(mode)).depth - network(changed, OnePass(mode)).depth).abs()
    per_frame = difference.amax(dim=(0, 2, 3))
    assert (per_frame[2:] > 1e-3).all()
    assert (per_frame[:2] > 1e-3).all() if mode == "full" else (per_frame[:2] == 0).all()


@pytest.mark.parametrize(
    ("shape", "words"),
    [
        ((1, 2, 3, 70, 80), "80×70 pixels.*patch size 14.*prepare_images"),
        ((2, 3, 70, 84), "shape \\[2, 3, 70, 84\\]"),
        ((1, 2, 4, 70, 84), "batch, frames, 3"),
        ((1, 0, 3, 70, 84), "none 0"),
    ],
)
def test_images_of_a_wrong_shape_are_refused(network, shape, words):
    with pytest.raises(ValueError, match=words):
        network(torch.zeros(shape), OnePass())
