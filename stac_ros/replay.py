"""`stac-replay`: publish a recording as if its camera were here.

SOURCE is a rosbag2, a video, a folder of images, a dataset that the evaluation knows, a synthetic world
(`world:SEED`) or a camera of this computer (`camera:0`).
Services: ~/pause (SetBool) and ~/restart (Trigger).
"""

from __future__ import annotations

import argparse
import logging
import sys
import threading

import rclpy
from rclpy.executors import SingleThreadedExecutor
from rclpy.signals import SignalHandlerOptions
from rclpy.task import Future

from stac_core.settings import add_flags, read_flags
from stac_ros.node_process import begin_ros, own_arguments, spin_until
from stac_ros.open_source import open_source
from stac_ros.replay_node import ReplayNode
from stac_ros.replay_settings import ReplaySettings
from stac_ros.signals import asked_to_end


def main() -> None:
    logging.basicConfig(level=logging.INFO, format="%(levelname)s: %(message)s")
    parser = argparse.ArgumentParser(
        prog="stac-replay", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("source", help="rosbag2, video, folder of images, dataset, world:SEED or camera:0")
    add_flags(parser, ReplaySettings)
    arguments = own_arguments(parser)
    try:
        settings = read_flags(ReplaySettings, arguments)
        more_topics = [topic for topic in settings.more_topics.split(",") if topic]
        source = open_source(
            arguments.source,
            settings.topic,
            more_topics,
            settings.compressed,
            settings.frame_id,
            settings.calibration,
        )
    except (ValueError, OSError) as error:
        sys.exit(f"stac-replay: {error}")
    asked = asked_to_end()  # handlers of rclpy would end ROS while it waits, which fails
    begin_ros("stac-replay", SignalHandlerOptions.NO)
    node = ReplayNode(source, settings)
    try:
        _play_while_spinning(node, asked)
    except (ValueError, OSError) as error:
        sys.exit(f"stac-replay: {error}")
    finally:
        node.destroy_node()
        rclpy.try_shutdown()


def _play_while_spinning(node: ReplayNode, asked: threading.Event) -> None:
    """Play in a thread while this one answers services; raises what playing raised."""
    finished: Future[None] = Future()

    def play() -> None:
        try:
            node.play()
            finished.set_result(None)
        except Exception as error:
            finished.set_exception(error)

    player = threading.Thread(target=play)
    player.start()
    executor = SingleThreadedExecutor()
    executor.add_node(node)
    try:
        spin_until(executor, lambda: finished.done() or asked.is_set())
    finally:
        node.stop()
        player.join()
        executor.shutdown()  # left to the interpreter, it may complain that ROS has ended before it
    finished.result()


if __name__ == "__main__":
    main()
