"""Play a bag to the mapping node and record its answer: `python -m stac_ros.bag_evaluation`.

The node runs in a process of its own; player, node and recorder meet over DDS. The recording (rosbag2,
mcap) holds every topic of the node, and on `/evaluation/image_sent` the stamp of each image at the time
it was sent; `stac-eval bag` judges it.
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
from rclpy.signals import SignalHandlerOptions
from tqdm import tqdm

from stac_ros.answer_recorder import AnswerRecorder
from stac_ros.bag_source import BagSource
from stac_ros.domain import private_ros_environment
from stac_ros.fastdds import profile_environment
from stac_ros.players import OutsidePlayer, OwnPlayer
from stac_ros.processes import POLL_S, Processes
from stac_ros.replay_settings import START_LIMIT_S, ReplaySettings
from stac_ros.topics import COMPRESSED_IMAGE

logger = logging.getLogger("stac-eval bag")
INTERRUPTED = 130  # exit status: a signal came; what was recorded until then is kept
_QUIET_S = 3.0  # without a message: the node has said all it had to say
_SETTLE_LIMIT_S = 30.0
_NODE = "mapping node"


def main() -> int:
    """0 = played and recorded to the end; otherwise something failed or a signal came, the rest is kept."""
    logging.basicConfig(level=logging.INFO, format="%(levelname)s %(name)s: %(message)s")
    arguments = _parse()
    if _is_foreign(arguments.recording):
        logger.error("%s is no recording and stays: move it, or choose another folder", arguments.recording)
        return 1
    # Strangers are kept out, unless one of them is to play.
    environment = {} if arguments.outside_player else private_ros_environment()
    environment |= profile_environment()
    os.environ.update(environment)
    source = BagSource(arguments.bag, arguments.topic, [])
    partial = arguments.recording.parent / ".part" / arguments.recording.name  # the file bears its name
    shutil.rmtree(partial.parent, ignore_errors=True)  # left by a run that was killed
    try:
        partial.parent.mkdir(parents=True)
    except OSError as error:
        logger.error("%s cannot be written: %s", arguments.recording, error)
        return 1
    rclpy.init(signal_handler_options=SignalHandlerOptions.NO)
    recorder = AnswerRecorder(partial)
    player = _make_player(arguments, source, recorder)
    executor = SingleThreadedExecutor()
    executor.add_node(recorder)
    executor.add_node(player)
    listening = threading.Thread(target=executor.spin)
    listening.start()
    processes = Processes(environment)
    try:
        processes.start(_NODE, _node_command(arguments, source))
        problem = _play(processes, player, recorder, arguments.limit_s, source.image_count)
        player.end()
        status = processes.end_all()  # it finishes its chunk, and the recorder still listens
    finally:
        executor.shutdown()
        listening.join()
        recorder.close()
        rclpy.try_shutdown()
        _put_in_place(partial, arguments.recording)
    logger.info("%d images, %d poses", recorder.images, recorder.poses)
    if problem:
        logger.error("%s", problem)
        return INTERRUPTED if processes.asked_to_end else 1
    return int(bool(status))


def _make_player(
    arguments: argparse.Namespace, source: BagSource, recorder: AnswerRecorder
) -> OwnPlayer | OutsidePlayer:
    if arguments.outside_player:
        return OutsidePlayer(source, recorder)
    settings = ReplaySettings(
        rate=arguments.rate, answer_limit=arguments.limit_s, wait_for_subscribers=START_LIMIT_S
    )
    return OwnPlayer(source, settings, recorder)


def _play(
    processes: Processes,
    player: OwnPlayer | OutsidePlayer,
    recorder: AnswerRecorder,
    limit_s: float,
    images: int,
) -> str:
    """Until the node has said all it had to say; returns what went wrong."""
    player.begin()
    with tqdm(total=images, unit="image", desc="answered", disable=None) as bar:  # None: on a terminal only
        while player.is_playing():
            if processes.asked_to_end:
                return player.interrupted
            if not processes.is_running(_NODE):
                return "the mapping node ended; see its messages above"
            if recorder.failure:
                return recorder.failure
            if recorder.silence_s() > limit_s:
                return f"the mapping node has not answered for {limit_s:g} s; see its messages above"
            bar.update(recorder.poses - bar.n)
            time.sleep(POLL_S)
        end = time.monotonic() + _SETTLE_LIMIT_S
        while time.monotonic() < min(end, recorder.heard_at + _QUIET_S) and processes.is_running(_NODE):
            time.sleep(POLL_S)
        bar.update(recorder.poses - bar.n)
    return player.problem or recorder.failure


def _node_command(arguments: argparse.Namespace, source: BagSource) -> list[str]:
    command = [sys.executable, "-m", "stac_ros.mapping_node", "--ros-args"]
    parameters = []
    if not arguments.rate and not arguments.outside_player:
        # No image may get lost, nor what refines its pose.
        parameters += ["input.image_qos:=reliable", "input.camera_info_qos:=reliable"]
        # Chunks depend on the bag alone: before one goes out that is not full, the silence has ended all.
        parameters.append(f"worker.chunk_wait:={arguments.limit_s:.3f}")
    if source.image_topic == COMPRESSED_IMAGE.name:
        parameters.append("input.compressed:=true")
    for parameter in parameters + arguments.params:
        command += ["-p", parameter]
    if arguments.outside_player:  # which plays under the recorded names
        for ours in (source.image_topic, source.info_topic):
            command += ["-r", f"{ours}:={source.recorded_name(ours)}"] if ours else []
    return command


def _put_in_place(partial: Path, recording: Path) -> None:
    """The finished recording takes the place of an older one."""
    if _is_recording(recording):
        shutil.rmtree(recording)
    os.replace(partial, recording)
    partial.parent.rmdir()


def _is_recording(path: Path) -> bool:
    return (path / "metadata.yaml").is_file()


def _is_foreign(path: Path) -> bool:
    """Something that no recording may take the place of."""
    return path.is_file() or (path.is_dir() and any(path.iterdir()) and not _is_recording(path))


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m stac_ros.bag_evaluation", description=__doc__)
    add: Any = parser.add_argument
    add("bag", type=Path, help="rosbag2 to play")
    add("recording", type=Path, help="rosbag2 folder to write")
    add("--topic", default="", help="image topic; needed where the bag has several")
    add("--rate", type=float, default=0.0, help="0 = as fast as the node answers")
    add("--outside_player", action="store_true", help="somebody else plays; wait for the images")
    add("--limit_s", type=float, default=120.0, help="longest wait for one answer")
    add("--params", nargs="*", default=[], metavar="NAME:=VALUE", help="parameters of the node")
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
