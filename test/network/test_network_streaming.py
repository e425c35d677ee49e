"""What the network hands to a stream's memory, frame by frame, against the golden caches."""

from functools import partial

import pytest
import torch
from tiny import TOKENS, assert_matches, figures, golden, golden_images, tiny_network

from stac_core.cache.stream_cache import StreamCache
from stac_core.config import CacheConfig
from stac_core.geometry import decode_pose, invert_pose
from stac_core.kernels.select import select_kernels
from stac_core.network.rope import rotary_table, rotate

TOLERANCE = 2e-5


@pytest.fixture(autouse=True)
def no_gradients():
    with torch.inference_mode():
        yield


def open_stream(network, **settings):
    return StreamCache(CacheConfig(**settings), network.config, select_kernels("torch", torch.device("cpu")))


class Witness:
    """A stream's memory that also writes down every key and value, in the order of their arrival."""

    def __init__(self, cache):
        self.cache, self.seen = cache, {}

    def __getattr__(self, name):
        return getattr(self.cache, name)

    def _keep(self, key, k, v):
        self.seen.setdefault(key, []).append((k, v))

    def attend(self, layer, q, k, v):
        self._keep(("agg", layer), k, v)
        return self.cache.attend(layer, q, k, v)

    def attend_camera(self, iteration, layer, q, k, v):
        self._keep(("cam", iteration, layer), k, v)
        self._keep(("cam", layer), k, v)
        return self.cache.attend_camera(iteration, layer, q, k, v)

    def handed(self, *key):
        """Keys and values [1, heads, tokens, D] of all calls."""
        keys, values = zip(*self.seen[key], strict=True)
        return torch.cat(keys, dim=2), torch.cat(values, dim=2)


def stream(camera_cache, chunks, **settings):
    network = tiny_network(camera_cache)
    witness = Witness(open_stream(network, **settings))
    parts = []
    for images in golden_images(sum(chunks)).split(chunks, dim=1):
        parts.append(figures(network, images, witness))
        witness.settle()
    return witness, {name: torch.cat([part[name] for part in parts], dim=1) for name in parts[0]}


def check_poses(found, expected):
    world_from_camera, intrinsics = decode_pose(found["pose_enc"], 70, 84)
    assert_matches(invert_pose(world_from_camera)[..., :3, :], expected["extrinsic"], TOLERANCE)
    assert_matches(intrinsics, expected["intrinsic"], 1e-4)


def test_keys_and_values_of_a_causal_stream():
    witness, found = stream("per_iteration", [1] * 5, mode="causal")
    expected = golden("s3r_stream_causal")
    check_poses(found, expected)
    for layer in (0, 3, 5):
        k, v = witness.handed("agg", layer)
        assert_matches(k, expected[f"agg_k_{layer}"], TOLERANCE)
        assert_matches(v, expected[f"agg_v_{layer}"], TOLERANCE)
    for iteration in range(4):
        for layer in range(3):
            k, v = witness.handed("cam", iteration, layer)
            assert_matches(k, expected[f"cam_k_it{iteration}_l{layer}"], TOLERANCE)
            assert_matches(v, expected[f"cam_v_it{iteration}_l{layer}"], TOLERANCE)


def test_keys_and_values_of_chunks():
    witness, _ = stream("per_iteration", [2, 2, 1], mode="causal")
    expected = golden("s3r_stream_chunked")
    k, v = witness.handed("agg", 5)
    assert_matches(k, expected["agg_k_5"], TOLERANCE)
    assert_matches(v, expected["agg_v_5"], TOLERANCE)


def test_keys_and_values_that_stay_in_the_window():
    witness, found = stream("per_iteration", [1] * 8, mode="window_kv", window_size=5, chunk_size=1)
    expected = golden("s3r_stream_window")
    check_poses(found, expected)
    kept = [0, 3, 4, 5, 6, 7]  # the anchor and the last five
    for value, name in zip(witness.handed("agg", 5), ("agg_k_5", "agg_v_5"), strict=True):
        frames = value.unflatten(2, (8, TOKENS))[:, :, kept].flatten(2, 3)
        assert_matches(frames, expected[name], TOLERANCE)
    for value, name in zip(witness.handed("cam", 3, 2), ("cam_k_it3_l2", "cam_v_it3_l2"), strict=True):
        assert_matches(value[:, :, kept], expected[name], TOLERANCE)
    entries = [min(frame + 1, 6) for frame in range(8)]
    assert expected["cam_cache_tokens_after_frame"].tolist() == entries


def test_keys_and_values_of_streamvggt():
    witness, found = stream("shared", [1] * 5, mode="causal")
    expected = golden("sv_stream")
    check_poses(found, expected)
    table = rotary_table(5, 6, 5, 16, torch.device("cpu"))
    for layer in (0, 3, 5):
        k, v = witness.handed("agg", layer)
        norm = tiny_network().aggregator.global_blocks[layer].attn.k_norm
        stored = rotate(norm(expected[f"agg_kraw_{layer}"]), table)
        assert_matches(k, stored.flatten(2, 3), TOLERANCE)
        assert_matches(v, expected[f"agg_v_{layer}"].flatten(2, 3), TOLERANCE)
    for layer in range(3):
        k, v = witness.handed("cam", layer)
        assert_matches(k, expected[f"cam_k_l{layer}"].squeeze(3), TOLERANCE)
        assert_matches(v, expected[f"cam_v_l{layer}"].squeeze(3), TOLERANCE)


@pytest.mark.parametrize(("camera_cache", "case"), [("per_iteration", "s3r_stream"), ("shared", "sv_stream")])
def test_camera_head_alone(camera_cache, case):
    data, network = golden("comp_camera_head"), tiny_network(camera_cache)
    cache, parts = open_stream(network, mode="causal"), []
    for token in data["camera_tokens"].split(1, dim=1):
        cache.begin(1, 0)  # no aggregator: no tokens but the camera's
        parts.append(network.camera_head(token, cache))
        cache.settle()
    for i, encodings in enumerate(zip(*parts, strict=True)):
        assert_matches(torch.cat(encodings, dim=1), data[f"{case}.iter{i}"], 5e-6, f"iteration {i}")


def test_global_block_alone():
    data, network = golden("comp_attention_block"), tiny_network()
    cache, parts = open_stream(network, mode="causal"), []
    table = rotary_table(5, 6, 5, 16, torch.device("cpu"))
    for frame in data["x"].split(TOKENS, dim=1):
        cache.begin(1, TOKENS)
        outs = [
            network.aggregator.global_blocks[0](frame, partial(cache.attend, layer), table)
            for layer in range(network.config.layers)  # one block in the place of all layers
        ]
        cache.settle()
        parts.append(outs[0])
    assert_matches(torch.cat(parts, dim=1), data["global.out_stream"], 5e-6)
