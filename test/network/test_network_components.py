"""Every part of the network against its own figures."""

import pytest
import torch
import torch.nn.functional as F
from tiny import assert_matches, golden, golden_images, tiny_network

from stac_core.cache.one_pass import OnePass, visible_frames
from stac_core.network.camera_head import activate_pose
from stac_core.network.dense_head import (
    confidence_activation,
    depth_activation,
    point_activation,
    uv_embedding,
)
from stac_core.network.image_encoder import resize_positions
from stac_core.network.rope import rotary_angles, rotary_table, rotate

TOLERANCE = 5e-6


@pytest.fixture(scope="module", autouse=True)
def no_gradients():
    with torch.inference_mode():
        yield


@pytest.fixture(scope="module")
def network():
    return tiny_network()


@pytest.mark.parametrize("size", ["70x84", "70x70", "42x98"])
def test_patch_encoder(network, size):
    encoder, data = network.aggregator.patch_embed, golden("comp_patch_embed")
    expected = {name.removeprefix(size + "."): v for name, v in data.items() if name.startswith(size)}
    image = expected["image_normalised"]
    tokens = encoder.embed(image)
    assert_matches(encoder.patch_embed(image), expected["conv_tokens"], TOLERANCE)
    positions = resize_positions(encoder.pos_embed, 5, image.shape[2] // 14, image.shape[3] // 14)
    assert_matches(positions, expected["pos_embed"], TOLERANCE)
    assert_matches(tokens, expected["tokens_in"], TOLERANCE)
    assert_matches(encoder.blocks[0](tokens), expected["after_block0"], TOLERANCE)
    assert_matches(encoder(image), expected["x_norm_patchtokens"], TOLERANCE)


def test_class_and_register_tokens_of_the_encoder(network):
    encoder, data = network.aggregator.patch_embed, golden("comp_patch_embed")
    x = encoder.embed(data["70x84.image_normalised"])
    for block in encoder.blocks:
        x = block(x)
    normed = encoder.norm(x)
    assert_matches(normed[:, 0], data["70x84.x_norm_clstoken"], TOLERANCE)
    assert_matches(normed[:, 1:5], data["70x84.x_norm_regtokens"], TOLERANCE)


@pytest.mark.parametrize("grid", [(28, 37), (21, 37), (37, 28), (16, 16), (36, 36), (40, 37)])
def test_position_embedding_at_full_size(grid):
    data = golden("comp_pos_embed_37")
    rows, columns = grid
    fitted = resize_positions(data["pos_embed_37x37"], 37, rows, columns)
    assert_matches(fitted, data[f"grid_{rows}x{columns}"], TOLERANCE)


@pytest.mark.parametrize(("case", "rows", "columns"), [("small", 5, 6), ("full", 28, 37)])
def test_rope(case, rows, columns):
    data = golden("comp_rope2d")
    x = data[f"{case}.x"]
    table = rotary_table(rows, columns, 5, x.shape[-1], x.device)
    assert torch.equal(table, rotary_angles(data[f"{case}.pos"][0], x.shape[-1]))
    assert_matches(rotate(x, table), data[f"{case}.y"], TOLERANCE)


class Recorder:
    """Full attention that keeps what it was asked."""

    def __call__(self, q, k, v):
        self.q, self.k, self.v = q, k, v
        return F.scaled_dot_product_attention(q, k, v)


def attention(block, x, attend, rotary=None):
    """The attention of a block without its norm, layer scale and residual."""
    attended = attend(*block.attn.project(x, rotary))
    return block.attn.proj(attended.transpose(1, 2).flatten(2))


def test_global_block(network):
    data, block, seen = golden("comp_attention_block"), network.aggregator.global_blocks[0], Recorder()
    rotary = rotary_angles(data["pos_one_frame"][0], 16).repeat(1, 3, 1)
    alone = attention(block, block.norm1(data["x"]), seen, rotary)
    assert_matches(alone, data["global.attn_only_full"], TOLERANCE)
    assert_matches(seen.q, data["global.q_roped"], TOLERANCE)
    assert_matches(seen.k, data["global.k_roped"], TOLERANCE)
    assert_matches(seen.v, data["global.v"], TOLERANCE)
    for mode in ("full", "causal"):
        context = OnePass(mode)
        context.begin(3, 35)
        out = block(data["x"], lambda q, k, v, c=context: c.attend(0, q, k, v), rotary)
        assert_matches(out, data[f"global.out_{mode}"], TOLERANCE, mode)


def test_normed_queries_and_keys(network):
    data, block, seen = golden("comp_attention_block"), network.aggregator.global_blocks[0], Recorder()
    attention(block, block.norm1(data["x"]), seen)
    assert_matches(seen.q, data["global.q_normed"], TOLERANCE)
    assert_matches(seen.k, data["global.k_normed"], TOLERANCE)
    assert_matches(block.attn.k_norm(data["global.k_raw"]), data["global.k_normed"], TOLERANCE)


def test_the_other_blocks(network):
    data = golden("comp_attention_block")
    rotary = rotary_angles(data["pos_one_frame"][0], 16)
    frames = data["x"].unflatten(1, (3, 35))[0]
    framewise = network.aggregator.frame_blocks[0](frames, rotary=rotary).flatten(0, 1)[None]
    assert_matches(framewise, data["frame.out"], TOLERANCE)
    vit = network.aggregator.patch_embed.blocks[1](data["vit.x"])
    assert_matches(vit, data["vit.out"], TOLERANCE)
    assert_matches(network.camera_head.trunk[0](data["trunk.x"]), data["trunk.out"], TOLERANCE)


def test_masks():
    data = golden("comp_attention_block")
    assert torch.equal(visible_frames("causal", 8, 5), data["causal_mask_8frames"])
    assert torch.equal(visible_frames("window", 8, 5), data["window_mask_8frames"])


def test_small_inputs_reveal_every_epsilon(network):
    data, aggregator, head = golden("comp_small_inputs"), network.aggregator, network.camera_head
    x64, x128, rotary = data["x64"], data["x128"], rotary_angles(data["pos"][0], 16)
    block, full = aggregator.global_blocks[2], F.scaled_dot_product_attention
    found = {
        "vit_block2": aggregator.patch_embed.blocks[2](x64),
        "vit_final_norm": aggregator.patch_embed.norm(x64),
        "global_block2": block(x64, rotary=rotary),
        "global_block2.attn": attention(block, x64, full, rotary),
        "frame_block5": aggregator.frame_blocks[5](x64, rotary=rotary),
        "trunk1": head.trunk[1](x128),
        "token_norm": head.token_norm(x128),
        "trunk_norm": head.trunk_norm(x128),
        "adaln_norm": head.adaln_norm(x128),
        "depth_head.norm": network.depth_head.norm(x128),
        "point_head.norm": network.point_head.norm(x128),
    }
    for name, value in found.items():
        assert_matches(value, data[name], TOLERANCE, name)
    assert set(found) | {"x64", "x128", "pos"} == set(data)


@pytest.mark.parametrize(
    ("case", "mode"),
    [("s3r_full", "full"), ("s3r_causal", "causal"), ("s3r_window", "window"), ("sv_causal", "causal")],
)
def test_camera_head(network, case, mode):
    data, context = golden("comp_camera_head"), OnePass(mode)
    context.begin(8, 35)
    for i, encoding in enumerate(network.camera_head(data["camera_tokens"], context)):
        assert_matches(encoding, data[f"{case}.iter{i}"], TOLERANCE, f"iteration {i}")


def test_first_modulation_of_the_camera_head(network):
    data, head = golden("comp_camera_head"), network.camera_head
    x = head.token_norm(data["camera_tokens"])
    empty = head.empty_pose_tokens.expand(1, 8, -1)
    shift, scale, gate = head.poseLN_modulation(head.embed_pose(empty)).chunk(3, dim=-1)
    found = {"token_norm": x, "shift": shift, "scale": scale, "gate": gate}
    found["trunk_in"] = head.modulate(x, empty)
    for name, value in found.items():
        assert_matches(value, data[f"iter0.{name}"], TOLERANCE, name)


def test_the_camera_head_refines_the_pose_before_its_activation():
    data, head, context = golden("comp_camera_head"), tiny_network().camera_head, OnePass("full")
    head.pose_branch.fc2.bias.copy_(data["fov_relu.fc2_bias"])
    context.begin(8, 35)
    for i, encoding in enumerate(head(data["camera_tokens"], context)):
        assert_matches(encoding, data[f"fov_relu.iter{i}"], TOLERANCE, f"iteration {i}")


def test_dense_heads(network):
    data = golden("comp_dpt_head")
    layers = [data[f"tokens_{layer}"] for layer in (1, 3, 4, 5)]
    depth, depth_confidence = network.depth_head(layers, 70, 84)
    assert_matches(depth, data["depth.depth"], TOLERANCE)
    assert_matches(depth_confidence, data["depth.depth_conf"], TOLERANCE)
    points, point_confidence = network.point_head(layers, 70, 84)
    assert_matches(points, data["point.world_points"], TOLERANCE)
    assert_matches(point_confidence, data["point.world_points_conf"], TOLERANCE)
    wide = [data[f"b.tokens_{layer}"] for layer in (1, 3, 4, 5)]
    depth, depth_confidence = network.depth_head(wide, 42, 98)
    assert_matches(depth, data["b.depth"], TOLERANCE)
    assert_matches(depth_confidence, data["b.depth_conf"], TOLERANCE)


def test_stages_of_the_dense_head():
    data, head, found = golden("comp_dpt_head"), tiny_network().depth_head, {}

    def keep(name):
        def hook(module, inputs, output):
            found.setdefault(name, output.clone())  # the head may overwrite it

        return hook

    head.norm.register_forward_hook(keep("norm_0"))  # the first of its four calls
    for level in range(4):
        head.projects[level].register_forward_hook(keep(f"project_{level}"))
        head.resize_layers[level].register_forward_hook(keep(f"resized_{level}"))
        for name in (f"layer{level + 1}_rn", f"refinenet{level + 1}"):
            getattr(head.scratch, name).register_forward_hook(keep(name))
    head.scratch.output_conv1.register_forward_hook(keep("output_conv1"))
    head.scratch.output_conv2.register_forward_hook(keep("raw_out"))
    head([data[f"tokens_{layer}"][:, :1] for layer in (1, 3, 4, 5)], 70, 84)
    for name, value in found.items():
        assert_matches(value, data[f"depth.{name}"], TOLERANCE, name)
    assert len(found) == 19


def test_slices_of_frames_change_nothing(network, monkeypatch):
    layers = network.aggregator(golden_images(5), OnePass()).layers
    whole, _ = network.point_head(layers, 70, 84)
    monkeypatch.setattr("stac_core.network.dense_head.PIXELS_AT_ONCE", 2 * 70 * 84)
    sliced, _ = network.point_head(layers, 70, 84)
    assert_matches(sliced, whole, 1e-6)


@pytest.mark.parametrize(
    "name", ["5x6_img70x84_c16", "10x12_img70x84_c8", "28x37_img392x518_c8", "21x37_img294x518_c8"]
)
def test_uv_embedding(name):
    cells, image, channels = name.split("_")
    rows, columns = map(int, cells.split("x"))
    height, width = map(int, image.removeprefix("img").split("x"))
    of_x, of_y = uv_embedding(rows, columns, int(channels[1:]), width / height, torch.device("cpu"))
    embedded = torch.cat([of_x.expand(-1, rows, -1), of_y.expand(-1, -1, columns)])
    expected = golden("comp_dpt_uv_embed")
    assert_matches(embedded.permute(1, 2, 0), expected[f"emb_{name}"], TOLERANCE)
    # The lowest frequency is 1: its sine is the sine of the coordinate itself.
    uv = expected[f"uv_{cells}_{image}"]
    assert_matches(embedded[0], uv[..., 0].sin(), TOLERANCE)
    assert_matches(embedded[int(channels[1:]) // 2], uv[..., 1].sin(), TOLERANCE)


def test_activations():
    data = golden("comp_activations")
    depth, point = data["depth.raw"].permute(0, 2, 3, 1), data["point.raw"].permute(0, 2, 3, 1)
    assert_matches(depth_activation(depth[..., :1]), data["depth.depth"], TOLERANCE)
    assert_matches(point_activation(point[..., :3]), data["point.xyz"], TOLERANCE)
    assert_matches(confidence_activation(depth[..., 1]), data["depth.conf"], TOLERANCE)
    assert_matches(confidence_activation(point[..., 3]), data["point.conf"], TOLERANCE)
    assert_matches(activate_pose(data["pose.raw"]), data["pose.activated"], TOLERANCE)
