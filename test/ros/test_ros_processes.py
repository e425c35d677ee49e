"""Processes that live and die together, tried on small programs."""

from __future__ import annotations

import os
import signal
import sys
import threading
import time

import pytest
from ros_helpers import PATIENCE_S, Child

from stac_ros import starter
from stac_ros.arguments import complete
from stac_ros.processes import Processes

FOR_EVER = [sys.executable, "-c", "import time\nwhile True: time.sleep(1)"]
DEAF = """
import pathlib, signal, sys, time
signal.signal(signal.SIGTERM, signal.SIG_IGN)
pathlib.Path(sys.argv[1]).touch()
while True: time.sleep(1)
"""


def ends_with(status: int) -> list[str]:
    return [sys.executable, "-c", f"raise SystemExit({status})"]


ENDING = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


@pytest.fixture
def handlers():
    """Those of signals, as they were before."""
    kept = {number: signal.getsignal(number) for number in ENDING}
    yield
    for number, handler in kept.items():
        signal.signal(number, handler)


@pytest.fixture
def processes(handlers):
    made = Processes(environment={}, patience_s=20.0)
    yield made
    made.end_all()


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


@pytest.mark.parametrize("viewer", ["true", "false"])
def test_what_is_started_ends_with_the_mapping_node(handlers, monkeypatch, viewer):
    """As in the launch file; else a replay would go on for nobody, and a viewer never end."""
    programs = {"stac_node": ends_with(0), "stac-replay": FOR_EVER, "stac-view": FOR_EVER}
    monkeypatch.setattr(starter, "command", lambda child, values: programs[child.executable])
    values = complete({"source": "world:5", "viewer": viewer})
    rescue = threading.Timer(PATIENCE_S, os.kill, (os.getpid(), signal.SIGINT))
    rescue.start()
    begun = time.monotonic()
    assert starter.run(values, {}) == 0
    rescue.cancel()
    assert time.monotonic() < begun + PATIENCE_S


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


def test_a_process_that_does_not_listen_is_killed(handlers, tmp_path):
    processes, deaf = Processes(environment={}, patience_s=0.5), tmp_path / "deaf"
    processes.start("deaf", [sys.executable, "-c", DEAF, str(deaf)])
    limit = time.monotonic() + PATIENCE_S
    while not deaf.exists():
        assert time.monotonic() < limit
        time.sleep(0.01)
    assert processes.end("deaf") == -signal.SIGKILL


def test_the_environment_reaches_the_processes(processes):
    processes = Processes(environment={"STAC_TEST_WORD": "heard"})
    processes.start(
        "job", [sys.executable, "-c", "import os, sys; sys.exit(os.environ['STAC_TEST_WORD'] != 'heard')"]
    )
    assert processes.wait("job") == 0


@pytest.mark.parametrize(
    ("module", "words"),
    [
        ("replay", ["world:5,frames=2,height=28,width=42"]),
        ("recorder", ["out"]),
        ("viewer", []),
    ],
)
def test_bad_arguments_of_ros_end_with_one_line(tmp_path, monkeypatch, module, words):
    monkeypatch.chdir(tmp_path)
    with Child(f"stac_ros.{module}", *words, "--ros-args", "-r", "image:=a@b") as child:
        assert child.wait() == 1
    assert "image:=a@b" in child.output and "Traceback" not in child.output
    monkeypatch.setenv("ROS_DOMAIN_ID", "home")
    with Child(f"stac_ros.{module}", *words) as child:
        assert child.wait() == 1
    assert "ROS_DOMAIN_ID" in child.output and "Traceback" not in child.output
    assert not list(tmp_path.iterdir())
