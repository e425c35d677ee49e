"""Compiled blocks: the same results within rounding, and no compilation after the start."""

import logging
from dataclasses import astuple, replace
from unittest.mock import Mock

import pytest
import torch
from network.emulated_tape import EmulatedTape
from tiny import golden_images, synthetic_frames, tiny_network

from stac_core.cache.stream_cache import StreamCache
from stac_core.checkpoint import load_network
from stac_core.config import CacheConfig, Config, KernelConfig, ModelConfig
from stac_core.first_use import warm_up
from stac_core.kernels import attend_within_torch, few_rows_torch, gelu_torch, to_heads_torch
from stac_core.kernels.attend import Attended
from stac_core.kernels.few_rows import FEW
from stac_core.kernels.select import BlockKernels, select_kernels
from stac_core.network import execution
from stac_core.network.by_hand import use_kernels
from stac_core.network.execution import choose_execution, compile_blocks, prepare, probe, undo
from stac_core.network.maps import TorchMaps
from stac_core.session import StreamSession

CHUNKS = (4, 4, 4, 1, 1, 2)  # with one-frame tails


class Counting:
    """A compiler that leaves the code as it is and counts what it is given."""

    def __init__(self):
        self.compiled = 0

    def __call__(self, graph, inputs):
        self.compiled += 1
        return graph.forward


@torch.inference_mode()
def stream(network, images=None, counts=CHUNKS, attend=None):
    """All predictions of a stream in `stac` mode, as one row of numbers per frame."""
    kernels = select_kernels("torch", "cpu")
    kernels = replace(kernels, attend=attend) if attend else kernels
    images = golden_images(8).repeat(1, 2, 1, 1, 1) if images is None else images
    cache = StreamCache(CacheConfig(mode="stac"), network.config, kernels)
    rows = []
    for part in images.split(counts, dim=1):
        prediction = network(part, cache)
        cache.settle()
        rows.append(torch.cat([t[0].flatten(1) for t in (prediction.pose_encoding, prediction.depth)], 1))
    return torch.cat(rows)


def error(found, expected):
    """Root mean square."""
    return float((found - expected).square().mean().sqrt())


@pytest.fixture
def fresh_compiler():
    torch.compiler.reset()
    yield
    torch.compiler.reset()


def test_after_the_start_nothing_is_compiled(fresh_compiler):
    network, compiler = tiny_network(), Counting()
    expected = stream(network)
    compile_blocks(network, compiler)
    probe(network)
    at_start = compiler.compiled
    assert 0 < at_start <= 16  # both pieces of four kinds of block, with one frame and with several
    assert torch.equal(stream(network), expected)
    smaller = golden_images(8).repeat(1, 2, 1, 1, 1)[..., 14:, :]
    stream(network, smaller, (1, 4, 3, 4, 4))
    assert compiler.compiled == at_start


BY_HAND = BlockKernels(
    to_heads_torch.to_heads, attend_within_torch.attend_within, gelu_torch.gelu_, few_rows_torch.few_rows
)


def test_kernels_take_the_place_of_pieces_in_16_bits(fresh_compiler):
    """Of every block but in the camera head, where one hears of few rows; other sizes compile nothing."""
    network, compiler = tiny_network().set_precision(torch.bfloat16), Counting()
    expected = stream(network)
    by_hand = BlockKernels(*(Mock(wraps=kernel) for kernel in astuple(BY_HAND)))
    compile_blocks(network, compiler)
    use_kernels(network, by_hand, compiler)
    probe(network)
    at_start, passes, config = compiler.compiled, len(CHUNKS), network.config
    assert at_start <= 9  # of one frame and of several the same, but for the norm of the encoder
    for kernel in vars(by_hand).values():
        kernel.reset_mock()
    assert torch.equal(stream(network), expected)
    assert by_hand.to_heads.call_count == 2 * config.layers * passes
    assert by_hand.attend_within.call_count == (config.encoder_blocks + config.layers) * passes
    assert by_hand.gelu_.call_count == (config.encoder_blocks + 2 * config.layers) * passes
    assert by_hand.few_rows.call_count == config.camera_iterations * (1 + 4 * config.camera_blocks) * passes
    stream(network, golden_images(8).repeat(1, 2, 1, 1, 1)[..., 14:, :], (1, 4, 3, 4, 4))
    with torch.inference_mode():
        network(golden_images(1).repeat(1, FEW + 3, 1, 1, 1), execution.WithoutPast())
    assert compiler.compiled == at_start
    undo(network)
    called = by_hand.gelu_.call_count
    assert torch.equal(stream(network), expected) and by_hand.gelu_.call_count == called


def test_in_32_bits_no_kernel_takes_the_place_of_a_piece_but_of_few_rows(fresh_compiler):
    network, refuse = tiny_network(), Mock(side_effect=AssertionError)
    expected = stream(network)
    use_kernels(network, BlockKernels(refuse, refuse, refuse, few_rows_torch.few_rows), Counting())
    assert torch.equal(stream(network), expected)


def test_kernels_of_blocks_are_those_of_the_setting(recording, monkeypatch):
    used = Mock()
    monkeypatch.setattr(execution, "use_kernels", used)
    prepare(tiny_network(), "auto", KernelConfig("torch"))
    used.assert_not_called()
    chosen = replace(select_kernels("torch", "cpu"), blocks=BY_HAND)
    monkeypatch.setattr(execution, "select_kernels", Mock(return_value=chosen))
    network = tiny_network()
    prepare(network, "auto", KernelConfig("triton"))
    assert execution.select_kernels.call_args.args[0] == "triton"
    used.assert_called_once_with(network, BY_HAND)


def attend_exactly(q, segments, mass=False, subsample=1.0):
    """The contract in float64."""
    keys, values = (torch.cat([getattr(s, name) for s in segments], 1) for name in ("keys", "values"))
    bias = [torch.zeros(s.keys.shape[:2]) if s.bias is None else s.bias for s in segments]
    logits = q @ keys.mT / q.shape[-1] ** 0.5 + torch.cat(bias, 1)[:, None]
    weights = logits.softmax(-1)
    key_mass = list(weights.sum(1).split([s.length for s in segments], 1))
    return Attended(weights @ values, logits.logsumexp(-1), key_mass if mass else None)


def test_a_stream_says_in_float32_what_it_says_in_float64():
    images = golden_images(8).repeat(1, 2, 1, 1, 1)
    exact = stream(tiny_network().double(), images.double(), attend=attend_exactly)
    assert 0 < error(stream(tiny_network()), exact) < 1e-4


@pytest.mark.slow
@pytest.mark.parametrize(
    "dtype, by_hand", [(torch.float32, None), (torch.bfloat16, None), (torch.bfloat16, BY_HAND)]
)
def test_compiled_by_the_real_compiler(fresh_compiler, monkeypatch, dtype, by_hand):
    """The twice-rule: at most twice the error that the same stream makes without compiling."""
    chosen = replace(select_kernels("torch", "cpu"), blocks=by_hand)
    monkeypatch.setattr(execution, "select_kernels", lambda backend, device: chosen)
    images = golden_images(8).repeat(1, 2, 1, 1, 1)
    exact = stream(tiny_network().double(), images.double(), attend=attend_exactly)
    network = tiny_network().set_precision(dtype)
    plain = error(stream(network), exact)
    assert prepare(network, "compiled") == "compiled"
    compiled = error(stream(network), exact)
    print(f"{dtype}: plain {plain:.2e}, compiled {compiled:.2e}")
    assert 0 < compiled <= 2 * plain
    undo(network)
    assert error(stream(network), exact) == plain


def test_the_choice():
    cpu, gpu = torch.device("cpu"), torch.device("cuda")
    assert [choose_execution("auto", device) for device in (cpu, gpu)] == ["eager", "recorded"]
    assert choose_execution("compiled", cpu) == "compiled"
    with pytest.raises(ValueError, match=r"'recorded' needs a GPU, this is 'cpu'; use compiled or eager"):
        load_network(ModelConfig(device="cpu", execution="recorded"))
    assert load_network(ModelConfig(device="cpu")).execution == "eager"
    with pytest.raises(ValueError, match="execution"):
        Config(model=ModelConfig(execution="fast"))


def test_without_a_compiler(monkeypatch, caplog):
    """Asked for, it is an error; by itself the network falls back, and says so."""

    def torn(network):
        block = network.aggregator.global_blocks[0]
        block.before = None  # half done
        raise OSError("no C compiler found\nmore")

    monkeypatch.setattr(execution, "compile_blocks", torn)
    network = tiny_network()
    expected = stream(network)
    reason = r"compiled execution does not work here \(no C compiler found\)"
    with pytest.raises(RuntimeError, match=rf"model.execution = 'compiled': {reason}; use eager"):
        prepare(network, "compiled")
    assert torch.equal(stream(network), expected)
    monkeypatch.setattr(execution, "choose_execution", lambda setting, device: "compiled")
    with caplog.at_level(logging.WARNING):
        assert prepare(network, "auto") == "eager"
    assert "compiled execution does not work here (no C compiler found)" in caplog.text
    assert torch.equal(stream(network), expected)


def test_fused_heads_are_undone():
    network = tiny_network()
    execution.fuse_heads(network)
    fused = [type(head.maps).__name__ for head in (network.depth_head, network.point_head)]
    undo(network)
    assert fused == ["TritonMaps"] * 2
    assert all(isinstance(head.maps, TorchMaps) for head in (network.depth_head, network.point_head))


@pytest.fixture
def recording(monkeypatch):
    """As on a GPU, but for the compiler."""
    monkeypatch.setattr(execution, "choose_execution", lambda setting, device: "recorded")
    monkeypatch.setattr(execution, "compile_blocks", lambda network: None)
    monkeypatch.setattr(execution, "CudaTape", lambda device: EmulatedTape())


def test_a_recorded_session(recording):
    config, frames = Config(cache=CacheConfig(mode="stac", chunk_size=2)), synthetic_frames(9)
    plain, network = StreamSession(tiny_network(), config), tiny_network()
    assert prepare(network, "auto") == "recorded"
    recorded = StreamSession(network, config)
    warm_up(network, config)
    assert len(network.forward.passes) == 2  # the probe's own are gone
    for first in range(0, 9, 2):
        ours, theirs = (session.step(frames[first : first + 2]) for session in (recorded, plain))
        assert torch.equal(ours.depth, theirs.depth) and torch.equal(ours.pose_encoding, theirs.pose_encoding)
    undo(network)
    assert "forward" not in vars(network)


def test_a_warm_up_records_although_noise_would_not_begin_a_stream(recording):
    network = tiny_network()
    prepare(network, "auto")
    warm_up(network, Config(cache=CacheConfig(chunk_size=2, first_confidence=1e9)))
    assert sorted(shape[1] for shape, *_ in network.forward.passes) == [1, 2]


def test_where_nothing_can_be_recorded(recording, monkeypatch, caplog):
    monkeypatch.setattr(EmulatedTape, "end", Mock(side_effect=RuntimeError("not while capturing")))
    network = tiny_network()
    with pytest.raises(RuntimeError, match=r"recorded execution does not work here \(not while capturing\)"):
        prepare(network, "recorded")
    assert prepare(network, "auto") == "eager" and "forward" not in vars(network)


def test_a_warm_session_begins_like_a_cold_one():
    frames = synthetic_frames(9)
    config, network = Config(cache=CacheConfig(mode="stac", chunk_size=2)), tiny_network()
    cold = StreamSession(tiny_network(), config)
    warm_up(network, config)
    warm = StreamSession(network, config)
    for first in range(0, 9, 2):
        ours, theirs = (session.step(frames[first : first + 2]) for session in (warm, cold))
        assert torch.equal(ours.depth, theirs.depth) and torch.equal(ours.pose_encoding, theirs.pose_encoding)
    offline = Config(cache=CacheConfig(mode="full"))
    warm_up(network, offline)
    assert StreamSession(network, offline).step(frames).frames == 9
