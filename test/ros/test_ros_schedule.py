"""Schedule and progress of a replay: order and interruption, never exact times."""

from __future__ import annotations

import threading
import time

import pytest

from stac_ros.progress import Progress
from stac_ros.schedule import Schedule

SECOND = 1_000_000_000


def in_thread(function, *arguments):
    results: list = []
    thread = threading.Thread(target=lambda: results.append(function(*arguments)))
    thread.start()
    return thread, results


def test_nothing_is_due_early_and_rate_scales_time():
    schedule = Schedule(rate=4.0)
    schedule.start(100 * SECOND)
    begin = time.monotonic()
    assert schedule.wait_until(100 * SECOND + SECOND // 5)
    assert time.monotonic() - begin >= 0.05
    assert schedule.now_ns() >= 100 * SECOND + SECOND // 5


def test_rate_zero_never_waits_and_follows_what_was_sent():
    schedule = Schedule(rate=0.0)
    schedule.start(0)
    assert schedule.wait_until(3600 * SECOND)
    assert schedule.now_ns() == 3600 * SECOND


@pytest.mark.parametrize("rate", [0.0, 1000.0])
def test_pause_holds_the_clock_and_resuming_goes_on(rate):
    schedule = Schedule(rate)
    schedule.start(5 * SECOND)
    schedule.pause(True)
    held = schedule.now_ns()
    thread, results = in_thread(schedule.wait_until, 6 * SECOND)
    thread.join(0.05)
    assert thread.is_alive() and schedule.now_ns() == held
    schedule.pause(False)
    thread.join(10)
    assert results == [True]


@pytest.mark.parametrize("end", ["interrupt", "stop"])
def test_a_wait_can_be_ended_from_outside(end):
    schedule = Schedule(rate=1.0)
    schedule.start(0)
    thread, results = in_thread(schedule.wait_until, 3600 * SECOND)
    getattr(schedule, end)()
    thread.join(10)
    assert results == [False]
    schedule.start(0)
    assert schedule.wait_until(0) is (end == "interrupt")


def test_wall_time_of_a_recorded_moment():
    schedule = Schedule(rate=2.0)
    schedule.start(10 * SECOND)
    gap = schedule.wall_of_ns(12 * SECOND) - schedule.wall_of_ns(10 * SECOND)
    assert gap == pytest.approx(SECOND, abs=SECOND / 4)  # two recorded seconds at twice the speed


@pytest.mark.parametrize("rate", [0.0, 1e3])
def test_one_recorded_moment_has_one_wall_time(rate):
    schedule = Schedule(rate)
    schedule.start(10 * SECOND)
    walls = []
    for recorded in (10, 10, 11, 11):
        assert schedule.wait_until(recorded * SECOND)
        walls.append(schedule.wall_of_ns(recorded * SECOND))
    assert walls[0] == walls[1] < walls[2] == walls[3]


def test_an_answer_also_answers_what_was_dropped_before_it():
    progress = Progress(interrupted=lambda: False)
    for stamp in (10, 20, 20, 30):
        progress.sent(stamp)
    assert progress.wait_for_room(5, limit_s=0.0) and not progress.wait_for_room(4, limit_s=0.01)
    progress.answered(25)  # never sent: another source's image
    assert not progress.wait_for_room(4, limit_s=0.01)
    progress.answered(20)  # both that bear it
    assert progress.wait_for_room(2, limit_s=0.0) and not progress.wait_for_room(1, limit_s=0.01)
    assert not progress.wait_for_all(limit_s=0.01)
    progress.answered(30)
    assert progress.wait_for_all(limit_s=0.0)


def test_a_lost_image_can_be_given_up_and_waiting_can_be_stopped():
    stopped = threading.Event()
    progress = Progress(interrupted=stopped.is_set)
    progress.sent(1)
    assert not progress.wait_for_room(1, limit_s=0.01)
    progress.forget_oldest()
    assert progress.wait_for_room(1, limit_s=0.01)
    progress.sent(2)
    thread, results = in_thread(progress.wait_for_all, 3600.0)
    stopped.set()
    progress.wake()
    thread.join(10)
    assert results == [True]
