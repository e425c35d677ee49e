"""Processes that live and die together, tried on small programs."""

from __future__ import annotations

import os
import signal
import sys
import threading

import pytest

from stac_ros.processes import Processes

FOR_EVER = [sys.executable, "-c", "import time\nwhile True: time.sleep(1)"]
DEAF = [
    sys.executable,
    "-c",
    "import signal, time\nsignal.signal(signal.SIGTERM, signal.SIG_IGN)\nprint('deaf', flush=True)\n"
    "while True: time.sleep(1)",
]


def ends_with(status: int) -> list[str]:
    return [sys.executable, "-c", f"raise SystemExit({status})"]


ENDING = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


@pytest.fixture
def processes():
    kept = {number: signal.getsignal(number) for number in ENDING}
    made = Processes(environment={}, patience_s=20.0)
    yield made
    made.end_all()
    for number, handler in kept.items():
        signal.signal(number, handler)


def test_the_awaited_one_ends_well_and_the_rest_is_ended(processes):
    processes.start("server", FOR_EVER)
    processes.start("job", ends_with(0))
    assert processes.wait("job") == 0
    assert processes.end_all() == 0


def test_any_failure_ends_the_wait_with_its_status(processes):
    processes.start("job", FOR_EVER)
    processes.start("server", ends_with(3))
    assert processes.wait("job") == 3


def test_another_that_ends_well_is_no_reason_to_stop(processes):
    processes.start("helper", ends_with(0))
    processes.start("job", [sys.executable, "-c", "import time; time.sleep(0.5)"])
    assert processes.wait("job") == 0
    assert processes.end("helper") == 0


@pytest.mark.parametrize("number", ENDING)
def test_a_signal_ends_the_wait(processes, number):
    processes.start("server", FOR_EVER)
    threading.Timer(0.2, os.kill, (os.getpid(), number)).start()
    assert processes.wait("server") == 0
    assert processes.asked_to_end


def test_who_is_to_outlive_the_terminal_does(processes):
    """As under nohup."""
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    Processes(environment={})
    assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN


def test_a_process_that_does_not_listen_is_killed():
    kept = {number: signal.getsignal(number) for number in ENDING}
    processes = Processes(environment={}, patience_s=0.5)
    processes.start("deaf", [*DEAF])
    try:
        assert processes.end("deaf") in (0, -signal.SIGKILL)  # 0: told to end before it could become deaf
    finally:
        for number, handler in kept.items():
            signal.signal(number, handler)


def test_the_environment_reaches_the_processes(processes):
    processes = Processes(environment={"STAC_TEST_WORD": "heard"})
    processes.start(
        "job", [sys.executable, "-c", "import os, sys; sys.exit(os.environ['STAC_TEST_WORD'] != 'heard')"]
    )
    assert processes.wait("job") == 0
