"""The node's two threads: a chunk is mapped while the network works on the next, and nothing else changes."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import numpy as np
import pytest
import rclpy
from node_helpers import images
from sensor_msgs.msg import Image
from std_srvs.srv import Trigger

from stac_core import StreamSession, load_network
from stac_ros.mapper import Mapper
from stac_ros.mapping_node import MappingNode
from stac_ros.outputs import Outputs
from stac_ros.predictor import Predictor
from stac_ros.stamps import stamp_nanoseconds

pytestmark = pytest.mark.usefixtures("loggers")

LIMIT_S = 30.0  # after which something has failed; nothing here is timed
ARGUMENTS = ["model.device:=cpu", "image.size:=56", "input.image_qos:=reliable", "publish.map_period:=1000.0"]


class Gate:
    """A place in the work of a thread, where the test sees it come and may hold it up."""

    def __init__(self) -> None:
        self._came, self._open = threading.Semaphore(0), threading.Event()
        self._open.set()
        self.passed = 0

    def close(self) -> None:
        self._open.clear()

    def open(self) -> None:
        self._open.set()

    def pass_through(self) -> None:
        self.passed += 1
        self._came.release()
        assert self._open.wait(LIMIT_S), "nobody let this thread go on"

    def wait_for_one(self) -> None:
        assert self._came.acquire(timeout=LIMIT_S), "nobody came"


@pytest.fixture
def network(monkeypatch) -> Iterator[Gate]:
    """Before each pass."""
    gate, step = Gate(), StreamSession.step

    def gated(session, *given, **named):
        gate.pass_through()
        return step(session, *given, **named)

    monkeypatch.setattr(StreamSession, "step", gated)
    yield gate
    gate.open()  # whatever has failed, the node can end


@pytest.fixture
def publishing(monkeypatch) -> Iterator[Gate]:
    """Before each image is published, which is the last that is done with it."""
    gate, publish = Gate(), Outputs.publish

    def gated(outputs, frame, points):
        gate.pass_through()
        publish(outputs, frame, points)

    monkeypatch.setattr(Outputs, "publish", gated)
    yield gate
    gate.open()


@contextmanager
def node_in_this_process(*parameters: str):
    """Its callbacks are called by the test."""
    rclpy.init(args=["--ros-args", *(word for each in (*ARGUMENTS, *parameters) for word in ("-p", each))])
    try:
        node = MappingNode()
        node.done = []  # stamps, in seconds
        tell = node.outputs.done_with
        node.outputs.done_with = lambda newest: (node.done.append(newest.stamp.sec), tell(newest))
        try:
            yield node
        finally:
            node.close()
            node.destroy_node()
    finally:
        rclpy.shutdown()


@pytest.fixture
def node(tmp_path):
    """One image is a chunk, so that a test knows what is where."""
    given = "cache.chunk_size:=1", "worker.mailbox_size:=3", f"map.directory:={tmp_path}"
    with node_in_this_process(*given) as node:
        yield node


def send(node: MappingNode, sent: list[Image]) -> None:
    for image in sent:
        node.on_image(image)


def finish(node: MappingNode) -> None:
    """Wait until all that was sent is mapped."""
    node.inference.ask(lambda: node.mapping.ask(lambda: None)).result(LIMIT_S).result(LIMIT_S)


def mapped_s(node: MappingNode) -> list[float]:
    return [float(line.split()[0]) for line in node.mapper.trajectory.tum()]


def wait_until(done) -> None:
    limit = time.monotonic() + LIMIT_S
    while not done():
        assert time.monotonic() < limit
        time.sleep(0.005)


def test_a_chunk_is_mapped_while_the_network_works_on_the_next(node, network, publishing):
    """Each waits in the midst of its work for the other to be in the midst of its own."""
    first, second = images(2)
    publishing.close()
    send(node, [first])
    network.wait_for_one()
    publishing.wait_for_one()  # the first image is mapped, all but published
    network.close()
    send(node, [second])
    network.wait_for_one()  # and the network has begun with the second one
    publishing.open()
    wait_until(lambda: node.done == [100])  # the first is published while the network works
    assert len(mapped_s(node)) == 1 and node.statistics.snapshot().mapped == 1
    network.open()
    finish(node)
    assert mapped_s(node) == node.done == [100, 101]


def test_a_map_that_is_slower_holds_the_network_up_and_images_are_dropped_in_the_mailbox(
    node, network, publishing
):
    """One chunk is being mapped, one waits for it, and the newest images wait for the network."""
    publishing.close()
    sent = images(8)
    for image in sent[:2]:
        send(node, [image])
        network.wait_for_one()
    publishing.wait_for_one()
    wait_until(lambda: len(node.statistics.snapshot().steps_ms) == 2)
    send(node, sent[2:])
    time.sleep(0.2)  # enough for a network that nothing held up to begin with a third
    assert network.passed == 2 and publishing.passed == 1 and node.inference.waiting == 3
    assert node.statistics.snapshot().dropped == {"mailbox full": 3} and node.done == []
    publishing.open()
    finish(node)
    counts = node.statistics.snapshot()
    assert mapped_s(node) == node.done == [100, 101, 105, 106, 107]
    assert counts.received == 8 and counts.mapped == 5 and counts.dropped == {"mailbox full": 3}


def test_commands_act_between_the_images_that_they_came_between_on_both_threads(
    node, publishing, tmp_path, monkeypatch
):
    asked = threading.Semaphore(0)
    ask = node.inference.ask

    def told_ask(action):
        answer = ask(action)
        asked.release()
        return answer

    monkeypatch.setattr(node.inference, "ask", told_ask)
    publishing.close()
    sent = images(3)
    with ThreadPoolExecutor() as callers:
        send(node, sent[:1])
        publishing.wait_for_one()
        answers = []
        for callback, image in ((node.on_save_map, sent[1]), (node.on_reset, sent[2])):
            answers.append(callers.submit(callback, Trigger.Request(), Trigger.Response()))
            assert asked.acquire(timeout=LIMIT_S)
            send(node, [image])
        assert not any(answer.done() for answer in answers), "what came before is not mapped yet"
        publishing.open()
        saved, reset = (answer.result(LIMIT_S) for answer in answers)
    finish(node)
    assert saved.success and reset.success
    (tum,) = tmp_path.glob("*/trajectory.tum")
    assert [float(line.split()[0]) for line in tum.read_text().splitlines()] == [100]
    assert mapped_s(node) == [102] and node.done == [100, 101, 102]
    assert node.predictor.session_stats.cache.frames_seen == 1


def test_the_whole_map_is_published_while_the_network_works(node, network, monkeypatch):
    published = threading.Event()
    monkeypatch.setattr(node.outputs, "whole_is_due", lambda: True)
    monkeypatch.setattr(node.outputs, "publish_whole", lambda *_: published.set())
    network.close()
    send(node, images(1))
    network.wait_for_one()
    node.on_map_timer()
    assert published.wait(LIMIT_S)
    network.open()


def test_a_chunk_that_cannot_be_mapped_is_counted_and_holds_nothing_up(node, monkeypatch):
    publish = Outputs.publish

    def fail_at_times(outputs, frame, points):
        if frame.header.stamp.sec in (101, 102, 104):
            raise MemoryError("no room")
        publish(outputs, frame, points)

    monkeypatch.setattr(Outputs, "publish", fail_at_times)
    for image in images(5):
        send(node, [image])
        finish(node)
        failing = image.header.stamp.sec in (101, 102, 104)
        assert node.statistics.snapshot().failing == failing
    counts = node.statistics.snapshot()
    assert node.done == [100, 101, 102, 103, 104]
    assert counts.mapped == 2 and counts.failed == 3 and counts.dropped == {"internal": 3}
    assert "no room" in counts.last_error


def test_an_order_that_fails_is_told_though_nobody_waits_for_it(node):
    def fail() -> None:
        raise ValueError("no such cloud")

    done = []
    node.mapping.order(fail)
    node.mapping.order(lambda: done.append(True))
    finish(node)
    counts = node.statistics.snapshot()
    assert done and "no such cloud" in counts.last_error and counts.dropped == {}, "no image was lost"


def test_closing_maps_what_the_network_has_seen_and_then_says_the_whole_map(
    node, network, publishing, monkeypatch
):
    said = []

    def say(voxel_map, grid) -> None:
        said.append((len(voxel_map), mapped_s(node), list(node.done)))

    monkeypatch.setattr(node.outputs, "publish_whole", say)
    publishing.close()
    for image in images(3):
        send(node, [image])
        if image.header.stamp.sec < 102:  # the third one waits in the mailbox
            network.wait_for_one()
    closing = threading.Thread(target=node.close)
    closing.start()
    wait_until(lambda: not node.inference.waiting)
    node.on_map_timer()
    publishing.open()
    closing.join(LIMIT_S)
    assert not closing.is_alive()
    ((points, poses, done),) = said
    assert points > 0 and poses == done == [100, 101]
    monkeypatch.setattr(node.outputs, "whole_is_due", lambda: True)
    node.on_map_timer()  # a timer may come late
    answer = node.on_reset(Trigger.Request(), Trigger.Response())
    assert not answer.success and "shutting down" in answer.message
    assert len(said) == 1 and mapped_s(node) == [100, 101]


class Notes:
    """An output that keeps what it is told, and passes nothing on."""

    def __init__(self) -> None:
        self.told: list = []

    def publish(self, frame, points) -> None:
        positions = points.positions.tobytes()
        self.told.append((stamp_nanoseconds(frame.header.stamp), frame.map_from_camera.tobytes(), positions))

    def begin_stream(self, keep: bool) -> None:
        self.told.append(keep)

    def move(self, moves) -> None:
        self.told.append(moves.scale.tolist())

    def done_with(self, newest) -> None:
        self.told.append(newest)


def test_two_threads_map_what_one_does_to_the_last_bit(monkeypatch):
    """Also where a stream ends within a chunk, or all of a chunk is left out."""
    sent = [*images(6), *images(6, 50), *images(4, 56)]
    for image in sent[12:16]:
        image.encoding = "unheard of"
    sent += images(5, 70)
    with node_in_this_process("cache.chunk_size:=4", "worker.chunk_wait:=3600.0") as node:
        notes = Notes()
        mapper = Mapper(node.parameters, node.statistics, notes)
        core = node.parameters.core
        session = StreamSession(load_network(core.model).network, core)
        in_series = Predictor(session, node.parameters, node.statistics, mapper)
        for first in range(0, len(sent), 4):
            in_series.process(sent[first : first + 4])

        heard = Notes()
        for name in ("publish", "begin_stream", "move", "done_with"):
            monkeypatch.setattr(node.outputs, name, getattr(heard, name))
        for image in sent:
            node.on_image(image)
            wait_until(lambda: node.inference.waiting < 4)
        finish(node)
        assert heard.told == notes.told and False in heard.told
        assert [newest for newest in heard.told if hasattr(newest, "stamp")] == [
            image.header for image in [*sent[3::4], sent[-1]]
        ]
        assert list(node.mapper.trajectory.tum()) == list(mapper.trajectory.tum())
        for ours, theirs in zip(node.mapper.map.points(), mapper.map.points(), strict=True):
            assert np.array_equal(ours, theirs) and len(ours)
