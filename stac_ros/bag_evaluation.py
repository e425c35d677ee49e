"""Replay a bag to the mapping node and record its answer: `python -m stac_ros.bag_evaluation`.

The node runs in a process of its own; it and this one meet over DDS in a domain of their own. The
recording (rosbag2, mcap) holds every topic of the node, and on `/evaluation/image_sent` the stamp of
each image at the time it was sent; `stac-eval bag` judges it.
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
from stac_ros.open_source import open_source
from stac_ros.processes import POLL_S, Processes
from stac_ros.replay_node import ReplayNode
from stac_ros.restamp import header_stamp_ns
from stac_ros.settings import ReplaySettings
from stac_ros.sources import Item, Source
from stac_ros.topics import COMPRESSED_IMAGE, DIAGNOSTICS, OUTPUTS, POSE, Topic, qos_profile

logger = logging.getLogger("stac-eval bag")
IMAGE_SENT = "/evaluation/image_sent"
_START_LIMIT_S = 180.0  # a large model loads for long from a slow disk
_QUIET_S = 3.0  # without a message: the node has said all it had to say
_SETTLE_LIMIT_S = 30.0
_NODE = "mapping node"
_HEADER = "std_msgs/msg/Header"
_SECOND = 1_000_000_000


class Recorder(Node):
    """Writes every message of the mapping node as it came, with the time of its arrival."""

    def __init__(self, path: Path) -> None:
        super().__init__("stac_evaluation_recorder")
        self._store = get_typestore(Stores.ROS2_KILTED)
        self._writer = Writer(path, version=9, storage_plugin=StoragePlugin.MCAP)
        self._writer.open()
        self._writing = threading.Lock()  # answers arrive in one thread, images leave in another
        self._sent = self._writer.add_connection(IMAGE_SENT, _HEADER, typestore=self._store)
        self.images = 0
        self.heard_at = time.monotonic()  # the last message that came because of an image
        self._answered_at = 0.0  # the last pose, or the first image
        for topic in OUTPUTS:
            self._record(topic)

    def _record(self, topic: Topic) -> None:
        name = self.resolve_topic_name(outside_name(topic))
        package = topic.type.__module__.split(".")[0]
        kind = f"{package}/msg/{topic.type.__name__}"
        connection = self._writer.add_connection(name, kind, typestore=self._store)

        def write(raw: bytes) -> None:
            now = time.time_ns()
            with self._writing:
                self._writer.write(connection, now, raw)
            if topic is not DIAGNOSTICS:  # these never end
                self.heard_at = time.monotonic()
            if topic is POSE:
                self._answered_at = time.monotonic()

        self.create_subscription(topic.type, name, write, qos_profile(topic.profile, 100), raw=True)

    def image_sent(self, stamp_ns: int) -> None:
        """Note that an image leaves now."""
        types, now = self._store.types, time.time_ns()
        moment = types["builtin_interfaces/msg/Time"](*divmod(stamp_ns, _SECOND))
        message = self._store.serialize_cdr(types[_HEADER](moment, ""), _HEADER)
        with self._writing:
            self._writer.write(self._sent, now, message)
        self.images += 1
        self._answered_at = self._answered_at or time.monotonic()

    def silence_s(self) -> float:
        """How long the node has owed an answer."""
        return time.monotonic() - self._answered_at if self._answered_at else 0.0

    def close(self) -> None:
        """Finish the file; it cannot be read before."""
        self._writer.close()


class Player(ReplayNode):
    """Replays in a thread of its own and tells the recorder when each image leaves."""

    def __init__(self, source: Source, settings: ReplaySettings, recorder: Recorder) -> None:
        super().__init__(source, settings)
        self._recorder = recorder
        self._thread = threading.Thread(target=self._run)
        self.problem = ""

    @property
    def sends_compressed(self) -> bool:
        return self._source.image_topic == COMPRESSED_IMAGE.name

    def begin(self) -> None:
        self._thread.start()

    def is_playing(self) -> bool:
        return self._thread.is_alive()

    def end(self) -> None:
        """Stop wherever it is."""
        self.stop()
        if self._thread.ident is not None:
            self._thread.join()

    def _run(self) -> None:
        try:
            self.play()
        except (ValueError, OSError, RuntimeError) as error:
            self.problem = str(error)

    def _publish(self, item: Item) -> None:
        if item.topic == self._source.image_topic:
            self._recorder.image_sent(header_stamp_ns(item.payload))
        super()._publish(item)


class MappingProcess(Processes):
    """The node, started and ended as the package's starter does it."""

    def start_node(self, command: list[str]) -> None:
        self.start(_NODE, command)

    def has_ended(self) -> bool:
        process = self._running.get(_NODE)
        return process is None or process.poll() is not None


def main() -> int:
    """0 = replayed and recorded to the end; 1 = something failed or a signal came, the rest is kept."""
    logging.basicConfig(level=logging.INFO, format="%(levelname)s %(name)s: %(message)s")
    arguments = _parse()
    environment = {**private_ros_environment(), **profile_environment(complete({}))}
    os.environ.update(environment)
    source = open_source(str(arguments.bag), arguments.topic, [], False, "")
    partial = arguments.recording.parent / ".part" / arguments.recording.name  # the file bears its name
    shutil.rmtree(partial.parent, ignore_errors=True)  # left by a run that was killed
    partial.parent.mkdir(parents=True)
    rclpy.init(signal_handler_options=SignalHandlerOptions.NO)
    recorder = Recorder(partial)
    settings = ReplaySettings(
        rate=arguments.rate, answer_limit=arguments.limit_s, wait_for_subscribers=_START_LIMIT_S
    )
    player = Player(source, settings, recorder)
    executor = SingleThreadedExecutor()
    executor.add_node(recorder)
    executor.add_node(player)
    listening = threading.Thread(target=executor.spin)
    listening.start()
    node = MappingProcess(environment)
    try:
        problem = _replay(node, player, recorder, arguments)
        player.end()
        status = node.end_all()  # it finishes its chunk, and the recorder still listens
    finally:
        executor.shutdown()
        listening.join()
        recorder.close()
        rclpy.try_shutdown()
        _put_in_place(partial, arguments.recording)
    logger.info("%d images were sent", recorder.images)
    if problem:
        logger.error("%s", problem)
    return int(bool(problem or status))


def _replay(node: MappingProcess, player: Player, recorder: Recorder, arguments: argparse.Namespace) -> str:
    """Play until the node has said all it had to say; returns what went wrong."""
    node.start_node(_node_command(arguments, player.sends_compressed))
    player.begin()
    while player.is_playing():
        if node.asked_to_end:
            return "interrupted"
        if node.has_ended():
            return "the mapping node ended; see its messages above"
        if recorder.silence_s() > arguments.limit_s:
            return f"the mapping node has not answered for {arguments.limit_s:g} s; see its messages above"
        time.sleep(POLL_S)
    end = time.monotonic() + _SETTLE_LIMIT_S
    while time.monotonic() < min(end, recorder.heard_at + _QUIET_S) and not node.has_ended():
        time.sleep(POLL_S)
    return player.problem


def _node_command(arguments: argparse.Namespace, compressed: bool) -> list[str]:
    command = [sys.executable, "-m", "stac_ros.mapping_node", "--ros-args"]
    input_parameters = [] if arguments.rate else ["input.image_qos:=reliable"]  # no image may get lost
    if compressed:
        input_parameters.append("input.compressed:=true")
    for parameter in input_parameters + arguments.params:
        command += ["-p", parameter]
    return command


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
    add("--limit_s", type=float, default=120.0, help="longest wait for one answer")
    add("--params", nargs="*", default=[], metavar="NAME:=VALUE", help="parameters of the node")
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
