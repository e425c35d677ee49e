"""What a pass of the full-size network needs besides weights and cache, without a machine that has it."""

import pytest
import torch
from network.live_bytes import LiveBytes

from stac_core.config import NETWORKS
from stac_core.network.causal_vggt import CausalVGGT
from stac_core.network.execution import WithoutPast

MIB = 2**20
HEIGHT, WIDTH, TOKENS = 392, 518, 28 * 37 + 5


@pytest.fixture(scope="module")
def network():
    with torch.device("meta"):
        network = CausalVGGT(NETWORKS["stream3r"]).set_precision(torch.bfloat16)
    return network.to("meta").requires_grad_(False)


@torch.inference_mode()
def head_bytes(network, frames):
    layers = [torch.empty(1, frames, TOKENS, 2048, device="meta") for _ in range(4)]
    network.depth_head(layers, HEIGHT, WIDTH)  # builds the tables
    with LiveBytes() as live:
        network.depth_head(layers, HEIGHT, WIDTH)
    return live.most


def test_a_dense_head_in_float32(network):
    """Per frame less than twice the 99 MiB of 128 channels at full resolution."""
    full_resolution = 128 * HEIGHT * WIDTH * 4
    one, four = head_bytes(network, 1), head_bytes(network, 4)
    print(f"dense head, {WIDTH}×{HEIGHT}: {one / MIB:.0f} MiB for one frame, {four / MIB:.0f} MiB for four")
    assert one < 2 * full_resolution and four < 4.2 * one


def test_slices_bound_a_dense_head(network):
    """Five frames at a time at this size, however many there are."""
    five, forty = head_bytes(network, 5), head_bytes(network, 40)
    answer = 40 * HEIGHT * WIDTH * 2 * 4
    print(f"{five / MIB:.0f} MiB for five frames, {forty / MIB:.0f} MiB for forty")
    assert forty < five + 6 * answer


def test_the_tokens_of_a_chunk(network):
    images = torch.empty(1, 4, 3, HEIGHT, WIDTH, device="meta")
    with torch.inference_mode():
        network.aggregator(images, WithoutPast())
        with LiveBytes() as live:
            network.aggregator(images, WithoutPast())
    kept = 4 * 4 * TOKENS * 2048 * 4  # what the dense heads read
    print(f"aggregator, four frames: {live.most / MIB:.0f} MiB, {kept / MIB:.0f} of it for the dense heads")
    assert live.most < 3 * kept
