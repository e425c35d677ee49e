"""Waiting for what other nodes do, with a limit instead of a guess."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import rclpy
from rclpy.executors import SingleThreadedExecutor
from rclpy.node import Node

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
