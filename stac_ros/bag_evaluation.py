"""Replay a bag to the mapping node and record its answer: `python -m stac_ros.bag_evaluation`.

Node, player and recorder are three processes that meet over DDS in a domain of their own. The
recording (rosbag2, mcap) holds every topic of the node, and one header per image on
`/evaluation/image_received` at the time of its arrival; `stac-eval bag` judges it.
"""

from __future__ import annotations

import argparse
import logging
import os
import shutil
import sys
import threading
import time
from pathlib import Path
from typing import Any

import rclpy
from rclpy.executors import SingleThreadedExecutor
from rclpy.node import Node
from rclpy.signals import SignalHandlerOptions
from rosbags.rosbag2 import StoragePlugin, Writer
from rosbags.typesys import Stores, get_typestore

from stac_ros.arguments import complete, profile_environment
from stac_ros.domain import private_ros_environment
from stac_ros.listen import outside_name
from stac_ros.processes import POLL_S, Processes
from stac_ros.restamp import header_stamp_ns
from stac_ros.topics import COMPRESSED_IMAGE, DIAGNOSTICS, IMAGE, OUTPUTS, POSE, Topic, qos_profile

logger = logging.getLogger("stac-eval bag")
ARRIVALS = "/evaluation/image_received"
_START_LIMIT_S = 180.0  # a large model loads for long from a slow disk
_QUIET_S = 3.0  # without a message: the node has said all it had to say
_SETTLE_LIMIT_S = 30.0
NODE, PLAYER = "mapping node", "player"
_HEADER = "std_msgs/msg/Header"
_SECOND = 1_000_000_000


class Recorder(Node):
    """Writes every message of the mapping node as it came, with the time of its arrival."""

    def __init__(self, path: Path) -> None:
        super().__init__("stac_evaluation_recorder")
        self._store = get_typestore(Stores.ROS2_KILTED)
        self._writer = Writer(path, version=9, storage_plugin=StoragePlugin.MCAP)
        self._writer.open()
        self._arrivals = self._writer.add_connection(ARRIVALS, _HEADER, typestore=self._store)
        self.heard_at = time.monotonic()  # the last message that came because of an image
        self.images = 0
        for topic in OUTPUTS:
            self._record(topic)
        for camera in (IMAGE, COMPRESSED_IMAGE):
            qos = qos_profile(camera.profile, 100)
            self.create_subscription(camera.type, camera.name, self._on_image, qos, raw=True)

    def _record(self, topic: Topic) -> None:
        name = self.resolve_topic_name(outside_name(topic))
        package = topic.type.__module__.split(".")[0]
        kind = f"{package}/msg/{topic.type.__name__}"
        connection = self._writer.add_connection(name, kind, typestore=self._store)

        def write(raw: bytes) -> None:
            self._writer.write(connection, time.time_ns(), raw)
            if topic is not DIAGNOSTICS:  # these never end
                self.heard_at = time.monotonic()

        self.create_subscription(topic.type, name, write, qos_profile(topic.profile, 100), raw=True)

    def _on_image(self, raw: bytes) -> None:
        """Of the image only the stamp is kept."""
        now, stamp = time.time_ns(), header_stamp_ns(raw)
        types = self._store.types
        moment = types["builtin_interfaces/msg/Time"](stamp // _SECOND, stamp % _SECOND)
        message = self._store.serialize_cdr(types[_HEADER](moment, ""), _HEADER)
        self._writer.write(self._arrivals, now, message)
        self.images += 1
        self.heard_at = time.monotonic()

    def close(self) -> None:
        """Finish the file; it cannot be read before."""
        self._writer.close()


class NodeAndPlayer(Processes):
    """The processes of one replay."""

    def has_ended(self, name: str) -> bool:
        process = self._running.get(name)
        return process is None or process.poll() is not None


def main() -> int:
    """0 = replayed and recorded to the end; 1 = a process failed or was told to stop, the rest is kept."""
    logging.basicConfig(level=logging.INFO, format="%(levelname)s %(name)s: %(message)s")
    arguments = _parse()
    environment = {**private_ros_environment(), **profile_environment(complete({}))}
    os.environ.update(environment)
    partial = (
        arguments.recording.parent / ".part" / arguments.recording.name
    )  # the file inside bears its name
    shutil.rmtree(partial.parent, ignore_errors=True)  # left by a run that was killed
    partial.parent.mkdir(parents=True)
    rclpy.init(signal_handler_options=SignalHandlerOptions.NO)
    recorder = Recorder(partial)
    executor = SingleThreadedExecutor()
    executor.add_node(recorder)
    listening = threading.Thread(target=executor.spin)
    listening.start()
    processes = NodeAndPlayer(environment)
    try:
        status = _play(recorder, processes, arguments)
        return processes.end_all() or status  # the node finishes its chunk; the recorder still listens
    finally:
        executor.shutdown()
        listening.join()
        recorder.close()
        rclpy.try_shutdown()
        _put_in_place(partial, arguments.recording)


def _play(recorder: Recorder, processes: NodeAndPlayer, arguments: argparse.Namespace) -> int:
    """Run node and player until the node has answered; the status of what failed, or 0."""
    processes.start(NODE, _node_command(arguments))
    pose = recorder.resolve_topic_name(outside_name(POSE))
    end = time.monotonic() + _START_LIMIT_S
    while not recorder.count_publishers(pose):
        if processes.asked_to_end or processes.has_ended(NODE) or time.monotonic() > end:
            logger.error("the mapping node did not start; see its messages above")
            return 1
        time.sleep(POLL_S)
    processes.start(PLAYER, _player_command(arguments))
    status = processes.wait(PLAYER)
    end = time.monotonic() + _SETTLE_LIMIT_S
    while time.monotonic() < min(end, recorder.heard_at + _QUIET_S) and not processes.asked_to_end:
        time.sleep(POLL_S)
    logger.info("%d images were sent", recorder.images)
    return status or int(processes.asked_to_end)


def _node_command(arguments: argparse.Namespace) -> list[str]:
    command = [sys.executable, "-m", "stac_ros.mapping_node", "--ros-args"]
    for parameter in arguments.params:
        command += ["-p", parameter]
    return command


def _player_command(arguments: argparse.Namespace) -> list[str]:
    command = [sys.executable, "-m", "stac_ros.replay", str(arguments.bag), "--topic", arguments.topic]
    command += ["--rate", str(arguments.rate), "--answer-limit", str(arguments.limit_s)]
    return [*command, "--wait-for-subscribers", "60"]


def _put_in_place(partial: Path, recording: Path) -> None:
    """The finished recording takes the place of an older one."""
    if (recording / "metadata.yaml").is_file():
        shutil.rmtree(recording)
    os.replace(partial, recording)
    partial.parent.rmdir()


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m stac_ros.bag_evaluation", description=__doc__)
    add: Any = parser.add_argument
    add("bag", type=Path, help="rosbag2 to replay")
    add("recording", type=Path, help="rosbag2 folder to write")
    add("--topic", default="", help="image topic; needed where the bag has several")
    add("--rate", type=float, default=0.0, help="0 = as fast as the node answers")
    add("--limit_s", type=float, default=600.0, help="longest wait for one answer")
    add("--params", nargs="*", default=[], metavar="NAME:=VALUE", help="parameters of the node")
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
