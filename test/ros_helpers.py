"""Waiting for what other nodes do, with a limit instead of a guess."""

from __future__ import annotations

import multiprocessing
import os
import runpy
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import rclpy
from geometry_msgs.msg import TransformStamped
from rclpy.executors import SingleThreadedExecutor
from rclpy.node import Node
from rclpy.parameter import Parameter
from tf2_msgs.msg import TFMessage

from stac_ros.parameters import Parameters
from stac_ros.topics import qos_profile

PATIENCE_S = 30.0  # generous: two slow cores may be shared with other work


@contextmanager
def ros_nodes(*names: str, **options) -> Iterator[list[Node]]:
    """Nodes in a context of their own, torn down at the end."""
    context = rclpy.Context()
    rclpy.init(context=context)
    nodes = [Node(name, context=context, **options) for name in names]
    try:
        yield nodes
    finally:
        for node in nodes:
            node.destroy_node()
        rclpy.try_shutdown(context=context)


@contextmanager
def parameters_of(**given: Any) -> Iterator[tuple[Node, Parameters]]:
    """A node whose parameters were given as section__field=value, and its `Parameters`."""
    overrides = [Parameter(name.replace("__", "."), value=value) for name, value in given.items()]
    options = {"parameter_overrides": overrides, "automatically_declare_parameters_from_overrides": True}
    with ros_nodes("settings_holder", **options) as (node,):
        yield node, Parameters(node)


def spin_until(nodes: list[Node], done: Callable[[], object], what: str, patience_s: float = PATIENCE_S):
    """Spin the nodes until `done()` is true and return its value; AssertionError after the limit."""
    executor = SingleThreadedExecutor(context=nodes[0].context)
    for node in nodes:
        executor.add_node(node)
    limit = time.monotonic() + patience_s
    try:
        while not (value := done()):
            assert time.monotonic() < limit, f"waited {patience_s:g} s in vain for {what}"
            executor.spin_once(timeout_sec=0.05)
        return value
    finally:
        for node in nodes:
            executor.remove_node(node)
        executor.shutdown()


class StaticTransformBroadcaster:
    """Sends transforms that never change on /tf_static, also to those who come later.

    Every message replaces the last one for late subscribers, so each holds all transforms sent so far.
    """

    def __init__(self, node: Node) -> None:
        self._publisher = node.create_publisher(TFMessage, "/tf_static", qos_profile("latched", 1))
        self._by_child: dict[str, TransformStamped] = {}

    def send(self, transform: TransformStamped) -> None:
        self._by_child[transform.child_frame_id] = transform
        self._publisher.publish(TFMessage(transforms=list(self._by_child.values())))


LIBRARIES = ["torch", "cv2", "scipy.optimize", "matplotlib.pyplot", "rclpy", "rosidl_generator_py"]
WARM = multiprocessing.get_context("forkserver")
WARM.set_forkserver_preload(LIBRARIES)


class Child:
    """A command of this package as a process of its own; ended at the end, whatever happens.

    It comes of a process that has imported the libraries and nothing of this package, which spares three
    seconds for each.
    """

    def __init__(self, module: str, *arguments: object) -> None:
        self._log = tempfile.NamedTemporaryFile(prefix="stac_ros_test_child_")  # noqa: SIM115, gone with this object
        words = [module, *map(str, arguments)]
        self._process = WARM.Process(target=_run, args=(words, dict(os.environ), os.getcwd(), self._log.name))
        self._process.start()

    def __enter__(self) -> Child:
        return self

    def __exit__(self, *_) -> None:
        self._process.terminate()  # a killed process leaves its shared memory behind
        self._process.join(10)
        if self.running:
            self._process.kill()
            self._process.join()

    @property
    def output(self) -> str:
        """What it has said so far."""
        return Path(self._log.name).read_text(errors="replace")

    @property
    def running(self) -> bool:
        return self._process.is_alive()

    @property
    def pid(self) -> int:
        return self._process.pid

    def signal(self, number: int) -> None:
        os.kill(self.pid, number)

    def wait(self, patience_s: float = 60.0) -> int:
        """The exit status."""
        self._process.join(patience_s)
        assert not self.running, f"still running after {patience_s:g} s; it said:\n{self.output}"
        return self._process.exitcode


def _run(words: list[str], environment: dict[str, str], folder: str, log: str) -> None:
    """What `python -m` does."""
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(folder)
    descriptor = os.open(log, os.O_WRONLY | os.O_APPEND)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    sys.argv = words
    runpy.run_module(words[0], run_name="__main__", alter_sys=True)
