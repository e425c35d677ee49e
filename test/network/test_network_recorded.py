"""Recorded passes give what the plain forward gives, though all their memory is overwritten meanwhile."""

import logging
import math
from contextlib import contextmanager, nullcontext
from itertools import pairwise
from types import SimpleNamespace

import pytest
import torch
from network.emulated_tape import EmulatedTape
from tiny import figures, golden_images, tiny_network
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from stac_core.cache.stream_cache import StreamCache
from stac_core.config import CacheConfig
from stac_core.geometry import decode_pose
from stac_core.kernels.select import select_kernels
from stac_core.network.execution import WithoutPast
from stac_core.network.recorded import CudaTape, RecordedForward

CHUNKS = (4, 4, 1, 4, 1, 1, 3, 4)
SETTINGS = {
    "stac": {"mode": "stac", "window_size": 4, "retrieve_after_merge": True},
    "coded": {"mode": "stac", "pinned_bits": 8, "window_bits": 8, "anchor_bits": 8, "retrieved_bits": 8},
    "query": {"mode": "stac", "retrieve_by": "query"},
    "window_kv": {"mode": "window_kv"},
    "xstream": {"mode": "xstream"},
    "causal": {"mode": "causal"},
}


@pytest.fixture(autouse=True)
def no_gradients():
    with torch.inference_mode():
        yield


class Spoiler:
    """A stream's memory whose questions do not outlive their answer."""

    def __init__(self, cache):
        self.cache = cache

    def __getattr__(self, name):
        return getattr(self.cache, name)

    def attend(self, layer, q, k, v):
        return self._spoil(self.cache.attend(layer, q, k, v), q, k, v)

    def attend_camera(self, iteration, layer, q, k, v):
        return self._spoil(self.cache.attend_camera(iteration, layer, q, k, v), q, k, v)

    def _spoil(self, answer, *question):
        for tensor in question:
            tensor.fill_(math.nan)
        return answer


def open_stream(network, **settings):
    cache = StreamCache(CacheConfig(**settings), network.config, select_kernels("torch", torch.device("cpu")))
    return Spoiler(cache)


def chunks(counts=CHUNKS):
    images = torch.cat([golden_images(8), golden_images(8).flip(-1), golden_images(8).flip(-2)], dim=1)
    return images[:, : sum(counts)].split(counts, dim=1)


def parts(prediction):
    return [part for part in vars(prediction).values() if isinstance(part, torch.Tensor)]


def same(found, expected):
    """Equal to the last bit: the same operations on the same shapes."""
    return all(torch.equal(a, b) for a, b in zip(parts(found), parts(expected), strict=True))


@pytest.mark.parametrize("mode", SETTINGS)
def test_a_stream_of_recorded_passes(mode):
    network, tape = tiny_network("shared" if mode == "xstream" else "per_iteration"), EmulatedTape()
    forward = RecordedForward(network, tape)
    ours, theirs = (open_stream(network, **SETTINGS[mode]) for _ in range(2))
    kept = []
    for images in chunks():
        found, expected = forward(images, ours), network(images, theirs)
        for stream in (ours, theirs):
            stream.settle()
        kept.append((found, expected))
    tape.poison()  # predictions are the caller's own
    assert all(same(found, expected) for found, expected in kept)
    assert [key[0][1] for key in forward.passes] == [4, 1, 3]
    # up to each layer and each of camera blocks × iterations, behind both, encoder and dense head
    assert tape.parts == 3 * (6 + 4 * 3 + 4)


def test_what_comes_next_may_be_begun_with():
    network, other, asked = tiny_network(), chunks((2,))[0].flip(-1), []
    forward = RecordedForward(network, EmulatedTape())
    ours, theirs = (open_stream(network, mode="stac") for _ in range(2))
    coming = [*chunks((2, 2, 2, 2, 1, 2, 2, 2, 2, 2)), None]
    for step, (images, following) in enumerate(pairwise(coming)):
        said = {5: other, 6: coming[7].clone()}.get(
            step, following
        )  # the first never comes, the second is a copy
        forward.foresee(lambda step=step, said=said: (asked.append(step), said)[1])
        assert same(forward(images, ours), network(images, theirs)), step
        ours.settle(), theirs.settle()
    assert asked == [2, 3, 5, 6, 7, 8, 9]  # not where a pass is not recorded yet


def test_what_was_begun_with_is_lost_to_another_pass():
    """Its memory is that of all passes."""
    network = tiny_network()
    forward = RecordedForward(network, EmulatedTape())
    ours, theirs = (open_stream(network, mode="stac") for _ in range(2))
    coming = chunks((2, 2, 1, 2, 1, 2))
    for step, images in enumerate(coming):
        if step == 3:
            forward.foresee(lambda: coming[5])  # and not that another one comes first
        assert same(forward(images, ours), network(images, theirs)), step
        ours.settle(), theirs.settle()


def test_a_stream_catches_up_once_its_pass_and_the_next_images_are_under_way():
    """And what it does begins after all that was launched before the pass."""
    noted = []

    class Noting(EmulatedTape):
        def end(self):
            replay = super().end()
            return lambda: (noted.append("part"), replay())

        def aside(self):
            noted.append("aside")
            return super().aside()

    class Late(WithoutPast):
        def plan(self):
            return None

        def lend(self, attention):
            raise AssertionError("without a plan")

        def catch_up(self):
            noted.append("catch up")

    forward, context = RecordedForward(tiny_network(), Noting()), Late()
    for images, following in pairwise(chunks((2, 2, 2, 2))):
        noted.clear()
        forward.foresee(lambda following=following: following)
        forward(images, context)
    # encoded beforehand; each layer, the camera head and the dense head ask or end a part; the next images
    parts_of_a_pass = forward.passes[images.shape, False, None]._tape.parts - 1
    assert noted == ["aside", *["part"] * (parts_of_a_pass + 1), "catch up"]


@pytest.mark.parametrize("failing", [False, True])
def test_what_goes_aside_begins_after_what_was_before_and_is_waited_for(monkeypatch, failing):
    """The calls that order CUDA streams, where there is no GPU to order anything."""
    noted = []

    class Stream:
        def __init__(self, device, priority=0):
            self.device, self.priority = device, priority

        def record_event(self):
            noted.append("event")
            return "event"

        def wait_event(self, event):
            noted.append((self, "after", event))

        def wait_stream(self, other):
            noted.append((self, "after", other))

    main = Stream(None)

    @contextmanager
    def on(stream):
        noted.append(stream)
        yield

    fakes = {
        "Stream": Stream,
        "current_stream": lambda device: main,
        "stream": on,
        "graph_pool_handle": object,
    }
    for name, fake in fakes.items():
        monkeypatch.setattr(torch.cuda, name, fake)
    tape = CudaTape(torch.device("cpu"))
    aside = tape.aside()
    noted.append("pass")
    with pytest.raises(MemoryError) if failing else nullcontext(), aside:
        noted.append("work")
        if failing:
            raise MemoryError
    other = tape._aside
    assert noted == ["event", "pass", (other, "after", "event"), other, "work", (main, "after", other)]
    assert [stream.priority for stream in tape._streams] == [
        -1,
        0,
    ] and other.priority == 0  # lower comes first


@pytest.mark.parametrize("notices", ["at once", "at the end"])
def test_a_recording_that_breaks_leaves_the_allocator_as_it_was(monkeypatch, notices):
    """As PyTorch 2.11 has it: where a recording cannot be ended, its pool stays under way."""
    under_way = set()

    class Graph:
        def capture_begin(self, pool, capture_error_mode):
            under_way.add(pool)

        def capture_end(self):
            raise RuntimeError("operation failed due to a previous error during capture")

    def end(device, pool):
        if pool not in under_way:
            raise RuntimeError("endAllocatePool: not currently recording to mempool_id")
        under_way.remove(pool)

    fakes = {
        "Stream": lambda device, priority=0: SimpleNamespace(device=device, device_index=0),
        "graph_pool_handle": object,
        "synchronize": lambda device: None,
        "current_stream": lambda device: None,
        "set_stream": lambda stream: None,
        "CUDAGraph": Graph,
    }
    for name, fake in fakes.items():
        monkeypatch.setattr(torch.cuda, name, fake)
    monkeypatch.setattr(torch._C, "_cuda_endAllocateToPool", end)
    tape = CudaTape(torch.device("cuda"))
    pools = tape._pools
    with pytest.raises(RuntimeError), tape.recording():
        tape.begin(beside=True)
        if notices == "at once":
            raise RuntimeError("operation not permitted when stream is capturing")
        tape.end()
    assert not under_way and not set(pools) & set(tape._pools)


def test_points_are_another_recording():
    network = tiny_network()
    forward = RecordedForward(network, EmulatedTape())
    ours, theirs = (open_stream(network, mode="window_kv") for _ in range(2))
    for images, points in zip(chunks((2,) * 6), (True, False, True, True, False, True), strict=True):
        assert same(forward(images, ours, points), network(images, theirs, points))
        ours.settle(), theirs.settle()
    assert len(forward.passes) == 2


def test_two_streams_share_recordings_and_a_reset_begins_anew():
    network = tiny_network()
    forward = RecordedForward(network, EmulatedTape())
    ours, theirs = ([open_stream(network, mode="stac") for _ in range(2)] for _ in range(2))
    for step, images in enumerate(chunks((2,) * 12)):
        stream = step % 2
        if step == 8:
            ours[0].reset(), theirs[0].reset()
        assert same(forward(images, ours[stream]), network(images, theirs[stream])), step
        ours[stream].settle(), theirs[stream].settle()
    assert len(forward.passes) == 1


def test_only_the_latest_image_size_stays_recorded():
    network = tiny_network()
    forward = RecordedForward(network, EmulatedTape())
    for images in (*chunks((2, 2, 2)), *(part[..., 14:, :] for part in chunks((2, 2, 1)))):
        stream, plain = open_stream(network, mode="causal"), open_stream(network, mode="causal")
        for _ in range(3):
            assert same(forward(images, stream), network(images, plain))
            stream.settle(), plain.settle()
    assert {key[0][-2:] for key in forward.passes} == {(56, 84)} and len(forward.passes) == 2


def test_a_replay_that_fails_midway_leaves_the_stream_as_it_was():
    network = tiny_network()
    forward = RecordedForward(network, EmulatedTape())
    ours, theirs = (open_stream(network, mode="stac") for _ in range(2))
    for step, images in enumerate(chunks((2,) * 6)):
        if step == 4:
            attend, calls = ours.cache.attend, iter(range(3))
            ours.cache.attend = lambda *a, attend=attend, calls=calls: (next(calls) and None) or attend(*a)
            with pytest.raises(StopIteration):
                forward(images, ours)
            del ours.cache.attend
        assert same(forward(images, ours), network(images, theirs))
        ours.settle(), theirs.settle()


class Frozen(EmulatedTape):
    """Replays nothing: what was recorded stays the answer, whatever is asked."""

    def end(self):
        super().end()
        return lambda: None


def test_a_replay_is_held_against_the_pass_itself():
    network, first, second = tiny_network(), golden_images(2), golden_images(4)[:, 2:]
    for tape, honest in ((EmulatedTape(), True), (Frozen(), False)):
        forward = RecordedForward(network, tape)
        forward(first, WithoutPast())
        if honest:
            forward.check(second, WithoutPast())
        else:
            with pytest.raises(RuntimeError, match="a replayed pass differs from the pass itself by"):
                forward.check(second, WithoutPast())


def test_what_cannot_be_recorded_runs_as_it_is(caplog):
    class Torn(EmulatedTape):
        def end(self):
            raise RuntimeError("operation not permitted when stream is capturing")

    network = tiny_network()
    forward = RecordedForward(network, Torn())
    ours, theirs = (open_stream(network, mode="stac") for _ in range(2))
    with caplog.at_level(logging.WARNING):
        for images in chunks((2,) * 4):
            assert same(forward(images, ours), network(images, theirs))
            ours.settle(), theirs.settle()
    assert [r.message for r in caplog.records] == [
        "passes over 2 frames of 84×70 stay unrecorded: operation not permitted when stream is capturing"
    ]


class NoTensorFromNumbers(TorchFunctionMode):
    """Numbers of the host become a tensor by a copy that waits for the device."""

    def __torch_function__(self, function, types, arguments=(), named=None):
        assert function not in (torch.tensor, torch.as_tensor, torch.Tensor.new_tensor), function
        return function(*arguments, **(named or {}))


class NoHostMemory(TorchDispatchMode):
    """Refuses operations that bring host memory to the device."""

    def __torch_dispatch__(self, function, types, arguments=(), named=None):
        tensors = [leaf for leaf in tree_leaves((arguments, named)) if isinstance(leaf, torch.Tensor)]
        strangers = [tensor for tensor in tensors if tensor.device.type == "cpu"]
        assert not strangers, f"{function} reads host memory {[list(t.shape) for t in strangers]}"
        return function(*arguments, **(named or {}))


def test_a_pass_neither_waits_for_the_device_nor_reads_host_memory():
    """On tensors without contents any look at a value is an error."""
    network = tiny_network().to("meta")
    images, context = torch.empty(1, 3, 3, 70, 84, device="meta"), WithoutPast()
    figures(network, images, context)  # builds the tables
    with NoTensorFromNumbers(), NoHostMemory():
        decode_pose(figures(network, images, context)["pose_enc"], 70, 84)
