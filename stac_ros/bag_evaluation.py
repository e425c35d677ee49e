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
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import rclpy
from rclpy.executors import SingleThreadedExecutor
from rclpy.node import Node
from rosbags.rosbag2 import StoragePlugin, Writer
from rosbags.typesys import Stores, get_typestore

from stac_ros.domain import private_ros_environment
from stac_ros.listen import outside_name
from stac_ros.restamp import header_stamp_ns
from stac_ros.share import share_file
from stac_ros.topics import COMPRESSED_IMAGE, DIAGNOSTICS, IMAGE, OUTPUTS, POSE, Topic, qos_profile

logger = logging.getLogger("stac-eval bag")
ARRIVALS = "/evaluation/image_received"
_START_LIMIT_S = 180.0  # a large model loads for long from a slow disk
_QUIET_S = 3.0  # without a message: the node has said all it had to say
_SETTLE_LIMIT_S = 30.0
_EXIT_LIMIT_S = 60.0
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


def main() -> int:
    logging.basicConfig(level=logging.INFO, format="%(levelname)s %(name)s: %(message)s")
    arguments = _parse()
    os.environ.update(private_ros_environment())
    os.environ.setdefault("FASTDDS_DEFAULT_PROFILES_FILE", str(share_file("config/fastdds.xml")))
    partial = arguments.recording.with_name(arguments.recording.name + ".part")
    shutil.rmtree(partial, ignore_errors=True)  # left by a run that was killed
    partial.parent.mkdir(parents=True, exist_ok=True)
    rclpy.init()
    recorder = Recorder(partial)
    try:
        replay_and_record(recorder, arguments)
        return 0
    except (RuntimeError, KeyboardInterrupt) as error:
        logger.error("%s", error or "interrupted")
        return 1
    finally:
        recorder.close()
        _put_in_place(partial, arguments.recording)
        recorder.destroy_node()
        rclpy.try_shutdown()


def replay_and_record(recorder: Recorder, arguments: argparse.Namespace) -> None:
    """Run node and player until all is answered. Raises RuntimeError naming the process that failed."""
    executor = SingleThreadedExecutor()
    executor.add_node(recorder)
    node = subprocess.Popen(_node_command(arguments))
    player: subprocess.Popen[bytes] | None = None

    def wait(until: Callable[[], object], limit_s: float, what: str) -> None:
        end = time.monotonic() + limit_s
        while not until():
            if node.poll() is not None:
                raise RuntimeError(f"the mapping node ended with status {node.returncode}")
            if time.monotonic() > end:
                raise RuntimeError(f"{what} within {limit_s:g} s")
            executor.spin_once(timeout_sec=0.1)

    try:
        pose = recorder.resolve_topic_name(outside_name(POSE))
        wait(lambda: recorder.count_publishers(pose), _START_LIMIT_S, "the mapping node did not start")
        player = subprocess.Popen(_player_command(arguments))
        wait(lambda: player.poll() is not None, float("inf"), "")
        if player.returncode:
            raise RuntimeError(f"the player ended with status {player.returncode}")
        end = time.monotonic() + _SETTLE_LIMIT_S
        wait(lambda: time.monotonic() > min(end, recorder.heard_at + _QUIET_S), float("inf"), "")
    finally:
        for process in (player, node):
            if process is not None:
                _end(process, executor)
        logger.info("%d images were sent", recorder.images)


def _node_command(arguments: argparse.Namespace) -> list[str]:
    command = [sys.executable, "-m", "stac_ros.mapping_node", "--ros-args"]
    for parameter in arguments.params:
        command += ["-p", parameter]
    return command


def _player_command(arguments: argparse.Namespace) -> list[str]:
    command = [sys.executable, "-m", "stac_ros.replay", str(arguments.bag), "--topic", arguments.topic]
    command += ["--rate", str(arguments.rate), "--answer-limit", str(arguments.limit_s)]
    return [*command, "--wait-for-subscribers", "60"]


def _end(process: subprocess.Popen[bytes], executor: SingleThreadedExecutor) -> None:
    """Ask a process to end and listen on meanwhile: the node finishes its chunk first."""
    if process.poll() is None:
        process.send_signal(signal.SIGINT)
    end = time.monotonic() + _EXIT_LIMIT_S
    while process.poll() is None and time.monotonic() < end:
        executor.spin_once(timeout_sec=0.1)
    if process.poll() is None:
        logger.error("process %d does not end when asked; killing it", process.pid)
        process.kill()
        process.wait()


def _put_in_place(partial: Path, recording: Path) -> None:
    """The finished recording takes the place of an older one."""
    if (recording / "metadata.yaml").is_file():
        shutil.rmtree(recording)
    os.replace(partial, recording)


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
