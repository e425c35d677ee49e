"""Maps of a dense head by Triton: the twice-rule, at most twice the error that PyTorch makes in float32."""

from __future__ import annotations

import pytest
import torch
from tiny import tiny_network
from torch import nn

from stac_core.evaluation.gpu.measure import poisoned_memory
from stac_core.network.dense_head import DenseHead, uv_embedding
from stac_core.network.maps import Maps, TorchMaps
from stac_core.network.maps_triton import MOST_CHANNELS, TritonMaps

SIZES = [(1, 5, 6), (3, 1, 1), (2, 1, 7), (2, 9, 4)]  # frames, rows, columns
CHANNELS = [2, 16, 40, MOST_CHANNELS + 20]


@pytest.fixture(autouse=True)
def no_gradients():
    with torch.no_grad():
        yield


def within_twice(work, *tensors, modules=()):
    """work(maps, *tensors) by both implementations, against PyTorch in float64; `modules` are restored."""
    plain = work(TorchMaps(), *tensors)
    with poisoned_memory():
        found = work(TritonMaps(), *tensors)
    for module in modules:
        module.double()
    exact = work(TorchMaps(), *(x.double() for x in tensors))
    for module in modules:
        module.float()
    assert found.shape == plain.shape and found.dtype == torch.float32
    worst, allowed = ((x - exact).abs().max() for x in (found, plain))
    assert worst <= 2 * max(allowed, torch.finfo(torch.float32).eps * exact.abs().max())


def random(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def uv_of(frames, channels, rows, columns):
    return uv_embedding(rows, columns, channels, columns / rows, torch.device("cpu"))


@pytest.mark.parametrize("channels", CHANNELS)
@pytest.mark.parametrize("frames, rows, columns", SIZES)
def test_what_follows_a_convolution(frames, rows, columns, channels):
    x, *others = (random(frames, c, rows, columns, seed=c) for c in (3, channels, channels))
    for conv in (nn.Conv2d(3, channels, 3, padding=1), nn.Conv2d(3, channels, 1, bias=False)):
        for added in ((), others[:1], others):
            for rectify in (False, True):
                within_twice(
                    lambda maps, x, *added: maps.convolve(conv, x, *added, rectify=rectify),  # noqa: B023
                    x, *added, modules=[conv],
                )  # fmt: skip


@pytest.mark.parametrize("channels", CHANNELS[1:])
@pytest.mark.parametrize("frames, rows, columns", SIZES)
def test_cells_know_where_they_lie(frames, rows, columns, channels):
    conv, uv = nn.Conv2d(3, channels, 1), uv_of(frames, channels, rows, columns)
    x = random(frames, rows, columns, 3).permute(0, 3, 1, 2)
    within_twice(lambda maps, x: maps.convolve(conv, x, uv=uv), x, modules=[conv])


@pytest.mark.parametrize(
    "make", [lambda: nn.ConvTranspose2d(3, 20, 4, stride=4), lambda: nn.Conv2d(3, 20, 3, 2, 1)]
)
def test_convolutions_that_resize(make):
    conv = make()
    within_twice(lambda maps, x: maps.convolve(conv, x), random(2, 3, 5, 8), modules=[conv])


@pytest.mark.parametrize("channels", CHANNELS[1:])
@pytest.mark.parametrize("size", [(10, 12), (9, 7), (1, 1), (5, 6), (4, 3), (1, 31)])
def test_enlarged(size, channels):
    """Also to sizes that are smaller or the same."""
    conv, uv = nn.Conv2d(3, channels, 1), uv_of(2, channels, *size)
    for x in (random(2, 3, 5, 6), random(2, 3, 1, 1)):
        for of in (None, uv):
            within_twice(
                lambda maps, x: maps.enlarge(conv, maps.begin(conv, x), size, of),  # noqa: B023
                x, modules=[conv],
            )  # fmt: skip


@pytest.mark.parametrize("width", [128, 80])
def test_normalised(width):
    """Also what lies apart in memory and far from 0."""
    norm, tokens = nn.LayerNorm(width), random(3, 11, width) * 3 + 5
    norm.weight.copy_(random(width, seed=1)), norm.bias.copy_(random(width, seed=2))
    for some in (tokens, tokens[:, 4:], tokens[:, ::2], tokens.mT.contiguous().mT):
        within_twice(lambda maps, tokens: maps.normalise(norm, tokens), some, modules=[norm])


def test_nan_stays():
    conv = nn.Conv2d(1, 16, 1)
    x = torch.full((1, 1, 2, 2), torch.nan)
    assert TritonMaps().convolve(conv, x, rectify=True).isnan().all()


@pytest.fixture
def head() -> DenseHead:
    return tiny_network().requires_grad_(False).depth_head


@pytest.mark.parametrize("weights", [torch.contiguous_format, torch.channels_last])
def test_a_whole_head(head, weights):
    for frames, rows, columns in ((1, 5, 6), (3, 3, 7)):
        layers = [random(1, frames, rows * columns + 5, 128, seed=i) for i in range(4)]

        def values(maps: Maps, *layers):
            head.maps = maps
            return head(layers, 14 * rows, 14 * columns)[0]  # noqa: B023

        head.to(memory_format=weights)
        within_twice(values, *layers, modules=[head])


def test_gradients_are_those_of_pytorch(head):
    """Triton's maps have none, so they are not used where somebody wants them."""
    gradients = []
    for maps in (TorchMaps(), TritonMaps()):
        tokens = random(1, 1, 6 + 5, 128).requires_grad_()
        head.maps = maps
        with torch.enable_grad():
            head([tokens] * 4, 28, 42)[0].sum().backward()
        gradients.append(tokens.grad)
    assert gradients[0].any() and torch.equal(*gradients)
