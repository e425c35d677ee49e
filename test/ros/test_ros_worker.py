"""Mailbox and worker: order, bounds, counts, commands in their place, and a thread that lives on."""

from __future__ import annotations

import logging
import subprocess
import sys
import threading
import time
from collections import deque

import pytest
from hypothesis import given
from hypothesis import strategies as st

from stac_ros.inference_worker import InferenceWorker
from stac_ros.mailbox import Mailbox
from stac_ros.run_statistics import Statistics

LIMIT_S = 20.0


@given(
    size=st.integers(1, 4),
    steps=st.lists(st.sampled_from(["image", "command", 1, 2, 3, 4, 5]), max_size=40),
)
def test_the_mailbox_keeps_order_the_newest_images_and_every_command(size, steps):
    """Against a plain list; a number takes so many images."""
    mailbox, model = Mailbox(size), deque()
    for number, step in enumerate(steps):
        if step == "image":
            images = [item for item in model if item[0] == "image"]
            assert mailbox.put_image(number) == (len(images) == size)
            if len(images) == size:
                model.remove(images[0])
            model.append(("image", number))
        elif step == "command":
            mailbox.put_command(lambda number=number: number)
            model.append(("command", number))
        elif model:
            taken = mailbox.take(step)
            if isinstance(taken, tuple):
                assert ("command", taken[0]()) == model.popleft()
            else:
                assert 1 <= len(taken) <= step
                assert [("image", number) for number in taken] == [model.popleft() for _ in taken]
                stops = len(taken) == step or not model or model[0][0] == "command"
                assert stops, "more images could have been taken"
        assert len(mailbox) == sum(kind == "image" for kind, _ in model) <= size


def test_a_closed_mailbox_lets_nothing_through():
    mailbox = Mailbox(2)
    mailbox.put_image(1)
    waiting = mailbox.put_command(lambda: None)
    mailbox.close()
    late = mailbox.put_command(lambda: None)
    assert mailbox.take(4) is None and mailbox.put_image(2) and len(mailbox) == 0
    for future in (waiting, late):
        with pytest.raises(RuntimeError, match="shutting down"):
            future.result(LIMIT_S)


class Bench:
    """A worker whose `process` waits for the test's leave, and notes what it was given."""

    def __init__(self, chunk_size: int = 2, mailbox_size: int = 3, chunk_wait_s: float = 0.0) -> None:
        self.started, self.leave = threading.Semaphore(0), threading.Semaphore(0)
        self.chunks: list[list] = []
        self.statistics = Statistics()
        self.worker = InferenceWorker(self._process, chunk_size, mailbox_size, self.statistics, chunk_wait_s)
        self.worker.start()

    def _process(self, images) -> None:
        self.started.release()
        assert self.leave.acquire(timeout=LIMIT_S)
        if "bad" in images:
            raise RuntimeError("no use")
        self.chunks.append(list(images))


@pytest.fixture
def bench():
    bench = Bench()
    yield bench
    for _ in range(20):
        bench.leave.release()
    bench.worker.stop()


def test_images_pushed_out_by_newer_ones_are_counted(bench):
    bench.worker.offer(0)
    assert bench.started.acquire(timeout=LIMIT_S)  # busy with 0; the mailbox is empty
    for number in range(1, 7):
        bench.worker.offer(number)
    assert bench.worker.waiting == 3
    for _ in range(3):
        bench.leave.release()
    bench.worker.ask(lambda: None).result(LIMIT_S)
    counts = bench.statistics.snapshot()
    assert bench.chunks == [[0], [4, 5], [6]]
    assert counts.received == 7 and counts.dropped == {"mailbox full": 3}


def test_commands_act_between_the_images_they_came_between(bench):
    bench.worker.offer("before")
    assert bench.started.acquire(timeout=LIMIT_S)
    bench.worker.offer("also before")
    answer = bench.worker.ask(lambda: [list(chunk) for chunk in bench.chunks])
    bench.worker.offer("after")
    for _ in range(3):
        bench.leave.release()
    assert answer.result(LIMIT_S) == [["before"], ["also before"]]
    bench.worker.ask(lambda: None).result(LIMIT_S)
    assert bench.chunks[-1] == ["after"]


@pytest.mark.parametrize("pace", ["one by one", "at once"])
def test_a_patient_worker_takes_chunks_that_do_not_depend_on_when_images_come(pace):
    """A command ends a chunk, as does a flush."""
    bench = Bench(chunk_size=4, mailbox_size=20, chunk_wait_s=3600.0)
    for _ in range(20):
        bench.leave.release()
    for number in range(13):
        if number == 6:
            command = bench.worker.ask(lambda: sum(map(len, bench.chunks)))
        bench.worker.offer(number)
        if pace == "one by one":
            time.sleep(0.01)  # the worker has seen it, or nearly always
    bench.worker.flush()
    bench.worker.ask(lambda: None).result(LIMIT_S)
    bench.worker.stop()
    assert bench.chunks == [[0, 1, 2, 3], [4, 5], [6, 7, 8, 9], [10, 11, 12]]
    assert command.result(LIMIT_S) == 6 and bench.statistics.snapshot().dropped == {}


def test_patience_ends_after_the_newest_image():
    bench = Bench(chunk_size=4, chunk_wait_s=0.3)
    bench.leave.release()
    bench.worker.offer(0)
    time.sleep(0.1)
    offered = time.monotonic()
    bench.worker.offer(1)
    assert bench.started.acquire(timeout=LIMIT_S)
    waited = time.monotonic() - offered
    bench.worker.stop()
    assert waited >= 0.3 and bench.chunks == [[0, 1]]


def test_a_mailbox_too_small_for_a_chunk_holds_one_all_the_same():
    bench = Bench(chunk_size=5, mailbox_size=2, chunk_wait_s=3600.0)
    bench.leave.release()
    for number in range(5):
        bench.worker.offer(number)
    assert bench.started.acquire(timeout=LIMIT_S)
    bench.worker.stop()
    assert bench.worker.room == 5 and bench.chunks == [[0, 1, 2, 3, 4]]
    assert bench.statistics.snapshot().dropped == {}


def test_what_fails_is_counted_and_the_worker_lives_on(bench, caplog):
    bench.leave.release()
    bench.leave.release()
    bench.worker.offer("bad")
    with pytest.raises(ZeroDivisionError):
        bench.worker.ask(lambda: 1 / 0).result(LIMIT_S)
    bench.worker.offer("good")
    assert bench.worker.ask(lambda: "alive").result(LIMIT_S) == "alive"
    counts = bench.statistics.snapshot()
    assert bench.chunks == [["good"]] and counts.dropped == {"internal": 1}
    assert "no use" in counts.last_error and "no use" in caplog.text


def test_stopping_finishes_the_chunk_at_hand_and_no_other():
    bench = Bench(chunk_size=1)
    bench.worker.offer("at hand")
    assert bench.started.acquire(timeout=LIMIT_S)
    bench.worker.offer("waiting")
    command = bench.worker.ask(lambda: None)
    stopping = threading.Thread(target=bench.worker.stop)
    stopping.start()
    with pytest.raises(RuntimeError, match="shutting down"):
        command.result(LIMIT_S)
    assert bench.chunks == []
    bench.leave.release()
    stopping.join(LIMIT_S)
    assert not stopping.is_alive() and bench.chunks == [["at hand"]]


def test_an_error_is_logged_once_and_counted_always(caplog):
    caplog.set_level(logging.ERROR)
    statistics = Statistics()
    for size in (1, 2, 3):
        statistics.error("bad image (size)", f"{size} bytes", 1)
    statistics.error("inference", "no", 2, lost_by="network")
    counts = statistics.snapshot()
    assert counts.dropped == {"bad image (size)": 3, "inference": 2}
    assert counts.failing and counts.failed == 1 and counts.last_error == "inference: no"
    assert [record.getMessage().split(" (counted")[0] for record in caplog.records] == [
        "bad image (size): 1 bytes",
        "inference: no",
    ]
    statistics.predicted(0.25)
    statistics.mapped(4, 0.125)
    statistics.log_again()
    statistics.error("bad image (size)", "4 bytes", 1)
    counts = statistics.snapshot()
    assert not counts.failing and counts.failed == 1 and counts.mapped == 4
    assert counts.steps_ms == [250.0] and counts.mapping_ms == [125.0] and counts.chunks == {4: 1}
    assert len(caplog.records) == 3


def test_a_chunk_that_failed_is_not_made_good_by_an_earlier_one_still_being_mapped():
    statistics = Statistics()
    statistics.error("inference", "no", 2, lost_by="network")
    statistics.mapped(4, 0.1)
    assert statistics.snapshot().failing
    statistics.predicted(0.1)
    assert not statistics.snapshot().failing
    statistics.error("internal", "no", 2, lost_by="map")
    statistics.predicted(0.1)
    assert statistics.snapshot().failing
    statistics.mapped(2, 0.1)
    assert not statistics.snapshot().failing


def test_the_rate_falls_when_images_cease(monkeypatch):
    now = [100.0]
    monkeypatch.setattr("stac_ros.run_statistics.time.monotonic", lambda: now[0])
    statistics = Statistics()
    assert statistics.snapshot().rate_hz == 0 and statistics.snapshot().age_s is None
    for _ in range(11):
        statistics.arrived()
        now[0] += 0.1
    counts = statistics.snapshot()
    assert counts.rate_hz == pytest.approx(10.0) and counts.age_s == pytest.approx(0.1)
    now[0] += 8.9
    assert statistics.snapshot().rate_hz == pytest.approx(1.0, rel=0.05)


def test_a_process_that_is_interrupted_before_it_could_stop_its_worker_ends():
    lines = (
        "from stac_ros.inference_worker import InferenceWorker",
        "from stac_ros.run_statistics import Statistics",
        "InferenceWorker(print, 1, 1, Statistics()).start()",
        "raise KeyboardInterrupt",
    )
    ended = subprocess.run([sys.executable, "-c", "\n".join(lines)], timeout=LIMIT_S, capture_output=True)
    assert b"KeyboardInterrupt" in ended.stderr
