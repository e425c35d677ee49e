"""A node as a process: serve callbacks until a signal comes, then let the node finish what it has begun."""

from __future__ import annotations

import logging
import signal
import threading
from collections.abc import Callable

import rclpy
from rclpy.executors import ExternalShutdownException, MultiThreadedExecutor
from rclpy.node import Node
from rclpy.signals import SignalHandlerOptions

THREADS = 4  # images; services, which may wait for the worker; timers; transforms and parameters

logger = logging.getLogger(__name__)


class ClosingNode(Node):
    """A node with work of its own, which `close` finishes."""

    def close(self) -> None:
        raise NotImplementedError


def run_node(make: Callable[[], ClosingNode], name: str, args: list[str] | None) -> int:
    """Make the node and serve it; the exit status. What the node refuses ends in one message.

    rclpy's own signal handlers would close the context first, and the last results could not be sent.
    """
    rclpy.init(args=args, signal_handler_options=SignalHandlerOptions.NO)
    try:
        node = make()
        try:
            return _serve(node)
        finally:
            node.destroy_node()
    except (ValueError, OSError, ImportError) as error:
        rclpy.logging.get_logger(name).fatal(f"cannot start: {error}")
        return 1
    except KeyboardInterrupt:
        return 130
    finally:
        rclpy.try_shutdown()


def _serve(node: ClosingNode) -> int:
    """Until SIGINT or SIGTERM; a second signal ends the process at once."""
    stopped = threading.Event()
    failures: list[str] = []

    def stop(number: int, _: object) -> None:
        signal.signal(number, signal.SIG_DFL)
        stopped.set()

    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, stop)
    executor = MultiThreadedExecutor(THREADS)
    executor.add_node(node)
    spinning = threading.Thread(target=_spin, args=(executor, stopped, failures), name="callbacks")
    spinning.start()
    stopped.wait()
    logger.info("stopping: the chunk at hand is finished first")
    node.close()
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
