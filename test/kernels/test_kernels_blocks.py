"""What stands between the products of a transformer block: the twice-rule, on awkward shapes and layouts."""

from __future__ import annotations

import pytest
import torch
from tiny import tiny_network

from stac_core.evaluation.gpu.measure import poisoned_memory
from stac_core.kernels import (
    attend_within_torch,
    attend_within_triton,
    few_rows_torch,
    gelu_torch,
    gelu_triton,
    to_heads_torch,
    to_heads_triton,
)
from stac_core.kernels.judge_blocks import judge_attend_within, judge_gelu, judge_to_heads, random_product
from stac_core.kernels.select import BlockKernels
from stac_core.network.by_hand import use_kernels
from stac_core.network.execution import WithoutPast
from stac_core.network.rope import rotary_table, rotate

TO_HEADS = {"torch": to_heads_torch.to_heads, "triton": to_heads_triton.to_heads}
ATTEND = {"torch": attend_within_torch.attend_within, "triton": attend_within_triton.attend_within}
GELU = {"torch": gelu_torch.gelu_, "triton": gelu_triton.gelu_}
DTYPES = (torch.bfloat16, torch.float16)
CPU = torch.device("cpu")
SHAPES = [  # B, T, heads, D
    (1, 1, 1, 4),
    (2, 97, 3, 24),
    (3, 7, 5, 64),
    (1, 105, 16, 64),
    (2, 33, 4, 16),
    (1, 65, 2, 128),
    (4, 31, 6, 48),
]


@pytest.fixture(params=TO_HEADS)
def to_heads(request):
    return TO_HEADS[request.param]


@pytest.fixture(params=ATTEND)
def attend_within(request):
    return ATTEND[request.param]


@pytest.fixture(params=GELU)
def gelu_(request):
    return GELU[request.param]


def random_heads(shape, dtype, seed=0):
    batch, tokens, heads, dim = shape
    g = torch.Generator().manual_seed(seed)
    return torch.randn(3, batch, heads, tokens, dim, generator=g).to(dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_heads_are_normed_and_rotated(to_heads, shape, dtype):
    product = random_product(shape, dtype, CPU)
    with poisoned_memory():
        verdicts = judge_to_heads(to_heads, product)
        q, k, v = to_heads(*product)
    assert all(verdict.passed for verdict in verdicts), verdicts
    batch, tokens, heads, dim = shape
    assert all(x.shape == (batch, heads, tokens, dim) and x.is_contiguous() for x in (q, k, v))
    assert torch.equal(v, product.qkv.unflatten(-1, (3, heads, dim))[:, :, 2].transpose(1, 2))


def test_heads_rotate_as_the_network_has_it(to_heads):
    product = random_product((2, 5 + 12, 3, 32), torch.float16, CPU)
    product = product._replace(rotary=rotary_table(3, 4, 5, 32, CPU))
    straight = torch.stack([torch.ones(17, 32), torch.zeros(17, 32)])
    turned, unturned = to_heads(*product), to_heads(*product._replace(rotary=straight))
    for x, y in zip(turned[:2], unturned[:2], strict=True):
        assert torch.allclose(x.float(), rotate(y.float(), product.rotary), atol=6e-3)
    assert torch.equal(turned[2], unturned[2])


@pytest.mark.parametrize("shape", [(0, 5, 2, 16), (2, 0, 2, 16)])
def test_of_no_tokens_there_are_no_heads(to_heads, shape):
    batch, tokens, heads, dim = shape
    assert all(
        x.shape == (batch, heads, tokens, dim) for x in to_heads(*random_product(shape, DTYPES[0], CPU))
    )


GOOD = random_product((2, 3, 2, 8), torch.float16, CPU)


@pytest.mark.parametrize(
    "changed, words",
    [
        ({"qkv": GOOD.qkv[0]}, r"qkv: expected \[B, T, 3 · 2 · D\], D a multiple of 4, got shape \[3, 48\]"),
        ({"heads": 3}, r"qkv: expected \[B, T, 3 · 3 · D\]"),
        ({"qkv": GOOD.qkv.float()}, "qkv: expected 16 bits per number, got torch.float32"),
        ({"qkv": GOOD.qkv.mT.contiguous().mT}, r"qkv: must be contiguous, got strides \(144, 1, 3\)"),
        ({"q_norm": GOOD.q_norm._replace(weight=torch.ones(4))}, r"q_norm.weight: expected shape \[8\]"),
        ({"heads": 0}, "heads = 0: expected at least 1"),
        (
            {"k_norm": GOOD.k_norm._replace(weight=torch.ones(16)[::2])},
            r"k_norm.weight: must be contiguous, got strides \(2,\)",
        ),
        ({"k_norm": GOOD.k_norm._replace(bias=torch.ones(8).half())}, "k_norm.bias: expected torch.float32"),
        ({"rotary": GOOD.rotary[:, :2]}, r"rotary: expected shape \[2, 3, 8\], got \[2, 2, 8\]"),
        ({"rotary": GOOD.rotary.mT.contiguous().mT}, "rotary: must be contiguous"),
        ({"rotary": GOOD.rotary.to("meta")}, "rotary: is on meta, qkv on cpu"),
    ],
)
def test_bad_products_are_named(to_heads, changed, words):
    with pytest.raises(ValueError, match=words):
        to_heads(*GOOD._replace(**changed))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [*SHAPES, (1, 300, 1, 64), (1, 64, 2, 64)], ids=str)
def test_tokens_see_each_other(attend_within, shape, dtype):
    q, k, v = random_heads(shape, dtype)
    with poisoned_memory():
        verdicts = [judge_attend_within(attend_within, q * sharp, k, v) for sharp in (1, 30)]
        out = attend_within(q, k, v)
    assert all(verdict.passed for verdict in verdicts), verdicts
    assert out.shape == q.shape and out.dtype == dtype
    assert out.transpose(1, 2).is_contiguous()


def test_heads_are_read_wherever_they_lie(attend_within):
    """Views of a product, whose heads lie between tokens; one head or frame for all; gaps."""
    batch, tokens, heads, dim = 2, 70, 3, 16
    g = torch.Generator().manual_seed(1)
    product = torch.randn(batch, tokens, 3, heads, dim, generator=g).half()
    views = product.permute(2, 0, 3, 1, 4)
    wide = random_heads((batch, 2 * tokens, heads, 40), torch.float16)[..., ::2, 8 : 8 + dim]
    for q, k, v in (
        views,
        wide,
        (views[0], wide[1], views[2]),
        (views[0], views[1][:, :1].expand_as(views[1]), views[2][:1].expand_as(views[2])),
    ):
        verdict = judge_attend_within(attend_within, q, k, v)
        assert verdict.passed, verdict


@pytest.mark.parametrize("shape", [(0, 5, 2, 16), (2, 0, 2, 16)])
def test_without_tokens_nothing_is_seen(attend_within, shape):
    q, k, v = random_heads(shape, torch.float16)
    assert attend_within(q, k, v).shape == q.shape


X = torch.zeros(2, 3, 5, 16, dtype=torch.float16)


@pytest.mark.parametrize(
    "q, k, v, words",
    [
        (X[0], X, X, r"q: expected \[B, heads, T, D\], got shape \[3, 5, 16\]"),
        (X.float(), X, X, "q: expected 16 bits per number, got torch.float32"),
        (X, X[:, :, :4], X, r"k: expected shape \[2, 3, 5, 16\], got \[2, 3, 4, 16\]"),
        (X, X, X.bfloat16(), "v: expected torch.float16, got torch.bfloat16"),
        (X, X, X.to("meta"), "v: is on meta, q on cpu"),
        (X, X.mT.contiguous().mT, X, r"k: rows must be contiguous, got strides \(240, 80, 1, 5\)"),
    ],
)
def test_bad_heads_are_named(attend_within, q, k, v, words):
    with pytest.raises(ValueError, match=words):
        attend_within(q, k, v)


def test_heads_too_wide_for_a_tile_are_refused():
    x = torch.zeros(1, 1, 2, 256, dtype=torch.float16)
    with pytest.raises(ValueError, match="q: head width 256 is more than the 128"):
        ATTEND["triton"](x, x, x)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(1,), (3, 5, 7), (2, 9, 256), (1, 2048), (0, 4)], ids=str)
def test_activated_where_it_lies(gelu_, shape, dtype):
    x = (4 * torch.randn(shape, generator=torch.Generator().manual_seed(0))).to(dtype)
    verdict = judge_gelu(gelu_, x)
    assert verdict.passed, verdict
    assert gelu_(x) is x and (x.numel() == 0 or x.min() >= -0.18)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_number_is_activated(dtype):
    """All 65536 of them; PyTorch's own answers NaN to some large ones, on a CPU."""
    x = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(dtype)
    got, exact = GELU["triton"](x.clone()).double(), torch.nn.functional.gelu(x.double())
    allowed = torch.finfo(dtype).eps * exact.abs() + 6e-8
    assert bool(((got - exact).abs() <= allowed)[x.isfinite()].all())
    assert bool(got[x.isnan()].isnan().all()) and got[x == torch.inf].item() == torch.inf


@pytest.mark.parametrize(
    "x, words",
    [
        (torch.zeros(3), "x: expected 16 bits per number, got torch.float32"),
        (torch.zeros(3, 4).half().mT, r"x: must be contiguous, got strides \(1, 4\)"),
    ],
)
def test_what_cannot_be_activated_is_named(gelu_, x, words):
    with pytest.raises(ValueError, match=words):
        gelu_(x)


def poses_and_depth(network, images):
    with torch.inference_mode():
        prediction = network(images.to(network.aggregator.camera_token.dtype), WithoutPast())
    return torch.cat([prediction.pose_encoding.flatten(), prediction.depth.flatten()]).double()


def test_a_network_of_such_blocks():
    """The twice-rule, by the root mean square."""
    images = torch.rand(1, 2, 3, 28, 42, generator=torch.Generator().manual_seed(0))
    exact, network = (
        poses_and_depth(tiny_network().double(), images),
        tiny_network().set_precision(torch.float16),
    )
    plain = poses_and_depth(network, images)
    by_hand = BlockKernels(TO_HEADS["triton"], ATTEND["triton"], GELU["triton"], few_rows_torch.few_rows)
    use_kernels(network, by_hand, "eager")
    errors = [float((x - exact).square().mean().sqrt()) for x in (poses_and_depth(network, images), plain)]
    assert 0 < errors[0] <= 2 * errors[1]
