"""The product that a block begins with comes with the end of the one before, and never for another input."""

from unittest.mock import Mock

import pytest
import torch
from network.test_network_execution import BY_HAND
from tiny import golden_images, tiny_network

from stac_core.network import by_hand
from stac_core.network.borders import FirstProduct, join
from stac_core.network.by_hand import use_kernels
from stac_core.network.execution import WithoutPast, undo


class Torn(WithoutPast):
    """A context that fails in a layer."""

    def attend(self, layer, q, k, v):
        if layer:
            raise MemoryError
        return super().attend(layer, q, k, v)


@pytest.fixture(autouse=True)
def no_gradients():
    with torch.inference_mode():
        yield


@pytest.fixture
def joined(monkeypatch):
    """A network whose blocks meet, and its pieces, which tell how often they are called."""
    pieces = {}

    def kept(piece, backend):
        return pieces.setdefault(piece.__name__, Mock(wraps=piece))

    monkeypatch.setattr(by_hand, "compiled", kept)
    network = tiny_network().set_precision(torch.bfloat16)
    use_kernels(network, BY_HAND)
    return network, pieces


def seen(network, images, context=None):
    prediction = network(images, context or WithoutPast())
    return torch.cat([prediction.pose_encoding.flatten(), prediction.depth.flatten()])


def test_every_border_is_one_piece(joined):
    network, pieces = joined
    plain, images = tiny_network().set_precision(torch.bfloat16), golden_images(8)
    for passes, part in enumerate(images.split((3, 1, 4), dim=1), 1):
        assert torch.equal(seen(network, part), seen(plain, part))
        borders = network.config.encoder_blocks - 1 + 2 * network.config.layers - 1
        calls = {name: piece.call_count for name, piece in pieces.items()}
        # the encoder and the layers begin with a product and end without one
        widened = borders + 2
        assert calls == {
            "product": 2 * passes,
            "narrow": 2 * passes,
            "join": borders * passes,
            "widen": widened * passes,
        }
    undo(network)
    assert torch.equal(seen(network, part), seen(plain, part))
    assert pieces["join"].call_count == borders * passes


def test_a_pass_that_failed_leaves_the_next_one_alone(joined):
    network, _ = joined
    plain, images = tiny_network().set_precision(torch.bfloat16), golden_images(8)
    with pytest.raises(MemoryError):
        seen(network, images[:, :2], Torn())
    for part in images.split(2, dim=1):
        assert torch.equal(seen(network, part), seen(plain, part))


def test_a_product_is_for_one_input_once():
    block, before = (tiny_network().aggregator.frame_blocks[0] for _ in range(2))
    product = Mock(wraps=lambda block, x: block.product(x))
    first = FirstProduct(block, product)
    x, hidden = (torch.randn(6, width) for width in (block.mlp.fc1.in_features, block.mlp.fc1.out_features))

    def ready():
        return first.after(before, join, x, hidden)

    y = ready()
    assert torch.equal(first(y.unflatten(0, (2, 3)).flatten(0, 1)), block.product(y))
    assert not product.called
    first(y)  # a second time
    assert product.call_count == 1
    for number, other in enumerate((ready().clone(), ready()[:1], ready().flip(0)), 2):
        assert torch.equal(first(other), block.product(other))
        assert product.call_count == number
