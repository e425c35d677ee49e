"""Half precision: as near to float32 as the golden figures allow, and the same as autocast."""

import pytest
import torch
from tiny import figures, golden, golden_images, tiny_network

from stac_core.cache.one_pass import OnePass
from stac_core.network.causal_vggt import CausalVGGT

ALLOWED = {"agg": 0.1, "pose": 0.03, "depth": 0.02, "world": 0.05}  # of bfloat16; float16 has 8× finer steps


@pytest.mark.parametrize(("dtype", "share"), [(torch.bfloat16, 1.0), (torch.float16, 1 / 8)])
def test_error_of_the_half_precisions(dtype, share):
    network = tiny_network().set_precision(dtype)
    found, expected = figures(network, golden_images(5), OnePass("causal")), golden("s3r_causal")
    for name, value in found.items():
        if name not in expected:
            continue
        assert value.dtype == torch.float32, name
        limit = share * ALLOWED[name.split("_")[0]]
        assert (value - expected[name]).abs().max() <= limit, name


def test_only_the_matrices_of_the_aggregator_change():
    network = tiny_network().set_precision(torch.bfloat16)
    halved = {name for name, weight in network.named_parameters() if weight.dtype == torch.bfloat16}
    assert all(name.startswith("aggregator.") for name in halved)
    assert not any(part in name for name in halved for part in ("norm", "gamma", "token", "pos_embed"))
    assert "aggregator.patch_embed.patch_embed.proj.weight" in halved


def test_equals_autocast_over_float32_weights():
    images = golden_images(3)
    with torch.inference_mode():
        with torch.autocast("cpu", torch.bfloat16):
            autocast = tiny_network()(images, OnePass("causal"), points=True)
        stored = tiny_network().set_precision(torch.bfloat16)(images, OnePass("causal"), points=True)
    assert torch.equal(autocast.depth, stored.depth)
    assert torch.equal(autocast.points, stored.points)
    assert torch.equal(autocast.pose_encoding, stored.pose_encoding)


def test_what_crosses_frames_has_one_dtype():
    """A cache meets keys and values in the dtype of the attention product, never a mixture."""
    seen = set()

    class Witness(OnePass):
        def attend(self, layer, q, k, v):
            seen.add((q.dtype, k.dtype, v.dtype))
            return super().attend(layer, q, k, v)

    network: CausalVGGT = tiny_network().set_precision(torch.bfloat16)
    with torch.inference_mode():
        network(golden_images(2), Witness("causal"))
    assert seen == {(torch.bfloat16,) * 3}
