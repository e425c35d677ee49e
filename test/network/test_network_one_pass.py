"""Attention of a single call: the grouping equals a token mask, on any mask, forwards and backwards."""

import tracemalloc

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import assert_matches, golden_images, tiny_network
from torch.utils._python_dispatch import TorchDispatchMode

from stac_core.cache.one_pass import OnePass, visible_frames


@st.composite
def masks(draw):
    frames = draw(st.integers(1, 6))
    rows = st.lists(st.booleans(), min_size=frames, max_size=frames)
    visible = torch.tensor([draw(rows) for _ in range(frames)])
    return visible | torch.eye(frames, dtype=torch.bool)


@settings(max_examples=40, deadline=None)
@given(masks(), st.integers(1, 3))
def test_equals_a_mask_over_tokens(visible, tokens):
    frames = len(visible)
    q, k, v = torch.randn(3, 2, 2, frames * tokens, 4, generator=torch.Generator().manual_seed(0))
    context = OnePass(visible=visible)
    context.begin(frames, tokens)
    mask = visible.repeat_interleave(tokens, 0).repeat_interleave(tokens, 1)
    expected = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
    assert_matches(context.attend(0, q, k, v), expected, 1e-6)
    if tokens == 1:
        assert_matches(context.attend_camera(0, 0, q, k, v), expected, 1e-6)


class Largest(TorchDispatchMode):
    """How many elements the largest tensor has that is made meanwhile."""

    elements = 0

    def __torch_dispatch__(self, function, types, arguments=(), named=None):
        out = function(*arguments, **(named or {}))
        self.elements = max([self.elements, *(t.numel() for t in (out,) if isinstance(t, torch.Tensor))])
        return out


def test_where_all_see_all_nothing_grows_with_pairs_of_frames():
    frames = 2000
    q, k, v = torch.randn(3, 1, 1, frames, 4, generator=torch.Generator().manual_seed(0))
    context = OnePass("full")
    tracemalloc.start()
    with Largest() as largest:
        context.begin(frames, 1)
    _, most = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert largest.elements <= frames and most < 100 * frames
    expected = F.scaled_dot_product_attention(q, k, v)
    assert_matches(context.attend(0, q, k, v), expected, 1e-6)
    assert_matches(context.attend_camera(0, 0, q, k, v), expected, 1e-6)


def test_chunks_as_a_mask():
    chunk = torch.arange(5) // 2
    context = OnePass(visible=chunk[None] <= chunk[:, None])
    images, network = golden_images(5), tiny_network()
    changed = images.clone()
    changed[:, 3] = 0.5
    with torch.inference_mode():
        difference = (network(images, context).depth - network(changed, context).depth).abs()
    assert (difference.amax(dim=(0, 2, 3)) > 0).tolist() == [False, False, True, True, True]


def test_window_keeps_the_first_frame():
    visible = visible_frames("window", 8, 3)
    assert visible[7].nonzero().flatten().tolist() == [0, 5, 6, 7]


def test_gradients_reach_every_weight_that_inference_reads():
    network = tiny_network()
    prediction = network(golden_images(3)[..., :56, :], OnePass("window", window=2), points=True)
    prediction.map(lambda t: t.square().sum()).pose_encoding.backward(retain_graph=True)
    (prediction.depth.sum() + prediction.depth_confidence.sum()).backward(retain_graph=True)
    (prediction.points.sum() + prediction.point_confidence.sum()).backward()
    silent = [
        name for name, weight in network.named_parameters() if weight.grad is None or not weight.grad.any()
    ]
    assert silent == ["aggregator.patch_embed.mask_token"]


def test_training_after_inference_meets_no_stale_tables():
    network = tiny_network()
    with torch.inference_mode():
        network(golden_images(1)[..., :42, :56], OnePass())
    network(golden_images(1)[..., :42, :56], OnePass()).depth.sum().backward()


def test_bad_arguments():
    with pytest.raises(ValueError, match="mode = 'sideways': choose one of full, causal, window"):
        OnePass("sideways")
    with pytest.raises(ValueError, match="see itself"):
        OnePass(visible=torch.zeros(2, 2, dtype=torch.bool))
    with pytest.raises(ValueError, match="visible has shape \\[2, 2\\], the call has 3 frames"):
        OnePass(visible=torch.ones(2, 2, dtype=torch.bool)).begin(3, 5)
