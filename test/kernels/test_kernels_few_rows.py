"""Linear maps of few rows: the twice-rule, on awkward shapes and large offsets, and in a camera head."""

from __future__ import annotations

from unittest.mock import Mock

import pytest
import torch
from tiny import tiny_network

from stac_core.evaluation.gpu.measure import poisoned_memory
from stac_core.kernels import few_rows_torch, few_rows_triton
from stac_core.kernels.few_rows import FEW, Residual
from stac_core.kernels.judge_blocks import judge_few_rows, random_map
from stac_core.network.by_hand import use_few_rows
from stac_core.network.execution import WithoutPast, undo

FEW_ROWS = {"torch": few_rows_torch.few_rows, "triton": few_rows_triton.few_rows}
CPU = torch.device("cpu")
AROUND = ("", "norm", "gelu", "residual", "norm gelu", "norm gelu residual")


@pytest.fixture(params=FEW_ROWS)
def few_rows(request):
    return FEW_ROWS[request.param]


def check(few_rows, given):
    with poisoned_memory():
        verdict = judge_few_rows(few_rows, given)
        out = few_rows(*given)
    assert verdict.passed, verdict
    assert out.shape == (*given.x.shape[:-1], len(given.bias)) and out.is_contiguous()


@pytest.mark.parametrize("around", AROUND)
@pytest.mark.parametrize("width, outputs", [(1, 1), (37, 5), (384, 96), (513, 3), (2048, 8)])
def test_rows_are_multiplied(few_rows, width, outputs, around):
    check(few_rows, random_map(3, width, outputs, around, CPU))


@pytest.mark.parametrize("rows", range(1, FEW + 1))
def test_any_number_of_few_rows(few_rows, rows):
    check(few_rows, random_map(rows, 600, 6, "norm gelu residual", CPU))


def test_no_row_hears_of_another(few_rows):
    given = random_map(4, 600, 9, "norm gelu residual", CPU)
    alone = given._replace(x=given.x[2:3], residual=given.residual._replace(x=given.residual.x[2:3]))
    torch.testing.assert_close(few_rows(*given)[2:3], few_rows(*alone), atol=1e-6, rtol=1e-6)


def test_rows_have_any_number_of_axes(few_rows):
    given = random_map(6, 40, 7, "residual", CPU)
    residual = given.residual._replace(x=given.residual.x.view(2, 3, 7))
    out = few_rows(*given._replace(x=given.x.view(2, 3, 40), residual=residual))
    assert torch.equal(out.view(6, 7), few_rows(*given))
    assert few_rows(*given._replace(x=given.x[0], residual=None)).shape == (7,)


@pytest.mark.parametrize("offset", [0.0, 300.0])
def test_a_norm_of_rows_with_offsets(few_rows, offset):
    """What the mean has lost to rounding, a large weight would show."""
    given = random_map(2, 768, 9, "norm", CPU)
    check(few_rows, given._replace(x=given.x + offset, weight=30 * given.weight))


def test_a_norm_of_equal_numbers_is_its_bias(few_rows):
    given = random_map(2, 520, 9, "norm", CPU)._replace(x=torch.full((2, 520), 7.0))
    bias = given._replace(x=given.norm.bias[None], norm=None)
    torch.testing.assert_close(few_rows(*given), few_rows(*bias).expand(2, -1), atol=1e-5, rtol=0)


def test_a_norm_knows_its_eps(few_rows):
    given = random_map(2, 64, 9, "norm", CPU)
    given = given._replace(x=1e-3 * torch.randn(2, 64), norm=given.norm._replace(eps=1e-2))
    check(few_rows, given)


def test_without_outputs_nothing_is_multiplied(few_rows):
    assert few_rows(torch.ones(2, 3), torch.ones(0, 3), torch.ones(0)).shape == (2, 0)


GOOD = random_map(2, 8, 6, "norm gelu residual", CPU)
SIX = torch.ones(6)


@pytest.mark.parametrize(
    "changed, words",
    [
        ({"x": torch.ones(9, 8)}, r"x: expected \[..., K\] of 1 to 8 rows, got shape \[9, 8\]"),
        ({"x": torch.ones(0, 8)}, r"x: expected \[..., K\] of 1 to 8 rows, got shape \[0, 8\]"),
        ({"x": torch.ones(2, 0)}, r"x: expected \[..., K\] of 1 to 8 rows, got shape \[2, 0\]"),
        ({"x": GOOD.x.half()}, "x: expected torch.float32, got torch.float16"),
        ({"x": torch.ones(8, 2).mT}, r"x: must be contiguous, got strides \(1, 2\)"),
        ({"weight": SIX}, r"weight: expected \[N, K\], got shape \[6\]"),
        ({"weight": torch.ones(6, 7)}, r"weight: expected shape \[6, 8\], got \[6, 7\]"),
        ({"weight": torch.ones(8, 6).mT}, r"weight: must be contiguous, got strides \(1, 6\)"),
        ({"bias": SIX.to("meta")}, "bias: is on meta, x on cpu"),
        ({"norm": GOOD.norm._replace(weight=SIX)}, r"norm.weight: expected shape \[8\], got \[6\]"),
        ({"norm": GOOD.norm._replace(bias=torch.ones(8).double())}, "norm.bias: expected torch.float32"),
        ({"residual": Residual(torch.ones(1, 6), SIX)}, r"residual.x: expected shape \[2, 6\], got \[1, 6\]"),
        ({"residual": Residual(torch.ones(2, 6), SIX[:1])}, r"residual.gamma: expected shape \[6\], got"),
    ],
)
def test_bad_arguments_are_named(few_rows, changed, words):
    with pytest.raises(ValueError, match=words):
        few_rows(*GOOD._replace(**changed))


def poses(network, frames):
    tokens = torch.randn(1, frames, 2 * network.config.width, generator=torch.Generator().manual_seed(0))
    dtype = network.camera_head.empty_pose_tokens.dtype
    with torch.inference_mode():
        return torch.stack(network.camera_head(tokens.to(dtype), WithoutPast())).double()


def test_a_camera_head_of_few_frames():
    """The twice-rule, by the root mean square, of its first iteration."""
    exact, network = tiny_network().double(), tiny_network()
    exact.camera_head.iterations = network.camera_head.iterations = 1
    expected, plain = poses(exact, 3), poses(network, 3)
    use_few_rows(network, FEW_ROWS["triton"])
    errors = [float((x - expected).square().mean().sqrt()) for x in (poses(network, 3), plain)]
    assert 0 < errors[0] <= 2 * errors[1]


def test_one_kernel_for_each_product_of_few_rows():
    """More rows, and rows with gradients, go the way they went before; so do all once it is undone."""
    network, few_rows = tiny_network(), Mock(wraps=FEW_ROWS["torch"])
    expected = {frames: poses(network, frames) for frames in (2, FEW + 1)}
    use_few_rows(network, few_rows)
    products = network.config.camera_iterations * (1 + 4 * network.config.camera_blocks)
    assert torch.equal(poses(network, 2), expected[2]) and few_rows.call_count == products
    assert torch.equal(poses(network, FEW + 1), expected[FEW + 1]) and few_rows.call_count == products
    network.camera_head(torch.ones(1, 2, 2 * network.config.width), WithoutPast())[-1].sum().backward()
    assert few_rows.call_count == products
    undo(network)
    assert torch.equal(poses(network, 2), expected[2]) and few_rows.call_count == products
