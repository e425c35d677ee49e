"""A node as a process: serve callbacks until a signal comes, then let the node finish what it has begun."""

from __future__ import annotations

import argparse
import logging
import sys
import threading
from collections.abc import Callable

import rclpy
from rclpy.exceptions import NameValidationException
from rclpy.executors import Executor, ExternalShutdownException, MultiThreadedExecutor
from rclpy.logging import get_logger
from rclpy.node import Node
from rclpy.signals import SignalHandlerOptions
from rclpy.utilities import remove_ros_args

from stac_ros.signals import asked_to_end

THREADS = 4  # images; services, which may wait for the worker; timers; transforms and parameters
# A RuntimeError is what PyTorch and ROS itself raise for a device, a file or an argument that does not work.
REFUSALS = (ValueError, OSError, ImportError, RuntimeError, NameValidationException)

logger = logging.getLogger(__name__)


def own_arguments(parser: argparse.ArgumentParser, args: list[str] | None = None) -> argparse.Namespace:
    """The arguments of a command, without those of ROS; of these, bad ones end the process with one line.

    args: those of `main`, None = this process's own.
    """
    try:
        words = remove_ros_args(sys.argv)[1:] if args is None else remove_ros_args(args)
    except RuntimeError as error:
        sys.exit(f"{parser.prog}: {error}")
    return parser.parse_args(words)


def begin_ros(command: str, signals: SignalHandlerOptions | None = None) -> None:
    """Initialise ROS with the arguments of this process; what it refuses ends the process with one line."""
    try:
        rclpy.init(args=sys.argv, signal_handler_options=signals)
    except RuntimeError as error:
        sys.exit(f"{command}: {error}")


def spin_until(executor: Executor, done: Callable[[], bool]) -> None:
    """Serve callbacks on this thread. Handlers of signals run in between, ten times a second."""
    while not done():
        executor.spin_once(timeout_sec=0.1)


class ClosingNode(Node):
    """A node with work of its own, which `close` finishes."""

    def close(self) -> None:
        raise NotImplementedError


def run_node(make: Callable[[], ClosingNode], name: str, args: list[str] | None) -> int:
    """Make the node and serve it; the exit status. What the node refuses ends in one message.

    rclpy's own signal handlers would close the context first, and the last results could not be sent.
    """
    try:
        try:
            rclpy.init(args=args, signal_handler_options=SignalHandlerOptions.NO)
            node = make()
        except REFUSALS as error:
            get_logger(name).fatal(f"cannot start: {error}")
            return 1
        try:
            return _serve(node)
        finally:
            node.destroy_node()
    except KeyboardInterrupt:
        return 130
    finally:
        rclpy.try_shutdown()


def _serve(node: ClosingNode) -> int:
    """Until a signal asks to end."""
    stopped = asked_to_end()
    failures: list[str] = []
    executor = MultiThreadedExecutor(THREADS)
    executor.add_node(node)
    spinning = threading.Thread(target=_spin, args=(executor, stopped, failures), name="callbacks")
    spinning.start()
    stopped.wait()
    logger.info("stopping: the chunk at hand is finished first")
    try:
        node.close()
    finally:
        executor.shutdown()
        spinning.join()
    return 1 if failures else 0


def _spin(executor: MultiThreadedExecutor, stopped: threading.Event, failures: list[str]) -> None:
    """Serve callbacks until shut down; whatever ends this also ends the node."""
    try:
        executor.spin()
    except ExternalShutdownException:
        pass
    except Exception as error:
        logger.exception("a callback failed")
        failures.append(repr(error))
    finally:
        stopped.set()
