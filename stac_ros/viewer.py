"""`stac-view`: the map, the camera and the figures of the mapping node, live in a web browser.

Serves on this computer only; from another one, use an SSH tunnel.
"""

from __future__ import annotations

import argparse
import logging

import rclpy
from rclpy.clock import Clock, ClockType
from rclpy.executors import SingleThreadedExecutor
from rclpy.node import Node
from rclpy.signals import SignalHandlerOptions

from stac_ros.arguments import VIEWER_PORT
from stac_ros.node_process import begin_ros, own_arguments, spin_until
from stac_ros.output_listener import OutputListener
from stac_ros.signals import asked_to_end
from stac_ros.viewer_scene import Scene

PERIOD_S = 0.2
MOST_POSES = 20_000  # shown, the newest: a viewer may stay open for days
logger = logging.getLogger("stac-view")


def port_number(text: str) -> int:
    """An argument's type; with any other number, the server's thread would fail and this one wait for it."""
    number = int(text)
    if not 0 < number < 1 << 16:
        raise argparse.ArgumentTypeError(f"{number} is no port: choose one from 1 to 65535")
    return number


def main() -> None:
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s %(name)s: %(message)s")
    logger.setLevel(logging.INFO)
    parser = argparse.ArgumentParser(
        prog="stac-view", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    told = f"the next free one if taken (default: {VIEWER_PORT})"
    parser.add_argument("--port", type=port_number, default=VIEWER_PORT, help=told)
    port = own_arguments(parser).port
    asked = asked_to_end()
    begin_ros("stac-view", SignalHandlerOptions.NO)
    node = Node("stac_view")
    listener, scene = OutputListener(node, most=MOST_POSES), Scene(port)

    def show() -> None:
        listener.correct_poses()
        scene.show(listener.seen)

    steady = Clock(clock_type=ClockType.STEADY_TIME)  # also while simulated time stands still
    node.create_timer(PERIOD_S, show, clock=steady)
    logger.info("open %s", scene.address)
    executor = SingleThreadedExecutor()
    executor.add_node(node)
    try:
        spin_until(executor, asked.is_set)
    finally:
        executor.shutdown()
        scene.close()
        node.destroy_node()
        rclpy.try_shutdown()


if __name__ == "__main__":
    main()
