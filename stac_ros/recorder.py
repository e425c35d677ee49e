"""`stac-record FOLDER`: keep what the mapping node says, in files.

Records until it is told to end (Ctrl-C, SIGTERM, SIGHUP). Depth images are written as they come, everything
else at the end: map.ply, trajectory.tum, depth/<stamp>.png (16 bit, thousandths of the unit of length,
0 = invalid), diagnostics.json and report.png. An older recording in the folder is replaced once a frame
has been mapped.
"""

from __future__ import annotations

import argparse
import json
import logging
import re
import sys
import threading
import time
from pathlib import Path

import cv2
import numpy as np
import rclpy
from rclpy.executors import SingleThreadedExecutor
from rclpy.node import Node
from rclpy.signals import SignalHandlerOptions
from sensor_msgs.msg import Image

from stac_core.files import write_lines, write_whole
from stac_core.ply import write_ply
from stac_core.stamps import stamp_text
from stac_ros.images import decode_depth
from stac_ros.node_process import begin_ros, own_arguments, spin_until
from stac_ros.output_listener import LEVELS, OutputListener, Seen
from stac_ros.report import write_report
from stac_ros.signals import when_asked_to_end
from stac_ros.stamps import stamp_nanoseconds
from stac_ros.topics import RECORDER_NAME
from stac_ros.trajectory import pose_rows, tum_lines

QUIET_S = 1.0  # without a message: none is on its way any more
REST_S = 2.0  # of waiting, once asked to end, for that quiet
LIMIT_S = 4.0  # of waiting in all, for the newest map and path too; `ros2 launch` kills after ten seconds
_DEPTH_NAME = re.compile(r"\d+\.\d{9}\.png")
logger = logging.getLogger("stac-record")


class Recorder(Node):
    """Collects in memory, but for depth images, until `write`."""

    def __init__(self, folder: Path) -> None:
        super().__init__(RECORDER_NAME)
        self._folder = folder
        folder.mkdir(parents=True, exist_ok=True)
        self._begun = False
        self.listener = OutputListener(self, self._on_depth)

    @property
    def quiet(self) -> bool:
        """All that was said has been heard."""
        return time.monotonic() - self.listener.heard_at > QUIET_S

    @property
    def complete(self) -> bool:
        """Map and path hold the newest frame."""
        seen = self.listener.seen
        return not seen.stamps_ns or min(seen.map_stamp_ns, seen.path_stamp_ns) >= seen.stamps_ns[-1]

    def write(self) -> bool:
        """Write the files; false if there was nothing to record. OSError naming what cannot be written."""
        self.listener.correct_poses()
        seen = self.listener.seen
        if not (self._begun or seen.stamps_ns):
            return False
        self._begin()
        _remove_depth(self._folder / "depth", kept={_depth_name(stamp_ns) for stamp_ns in seen.stamps_ns})
        write_ply(self._folder / "map.ply", seen.map_positions, seen.map_colours)
        lines = tum_lines(seen.stamps_ns, pose_rows(seen.map_from_camera))
        write_lines(self._folder / "trajectory.tum", lines)
        health = {part: vars(health) for part, health in seen.health.items()}
        memory = [vars(sample) for sample in seen.memory]
        told = json.dumps({"last": health, "memory": memory}, indent=2)
        write_whole(self._folder / "diagnostics.json", told)
        write_report(self._folder / "report.png", seen)
        return True

    def _begin(self) -> None:
        """Replace an older recording, but only once there is something to put in its place."""
        if not self._begun:
            (self._folder / "depth").mkdir(parents=True, exist_ok=True)
            _remove_depth(self._folder / "depth", kept=set())
        self._begun = True

    def _on_depth(self, message: Image) -> None:
        self._begin()
        depth = decode_depth(message)
        counted = np.clip(np.nan_to_num(depth) * 1000.0, 0, 65535).astype(np.uint16)
        name = _depth_name(stamp_nanoseconds(message.header.stamp))
        write_whole(self._folder / "depth" / name, cv2.imencode(".png", counted)[1].tobytes())


def main() -> None:
    logging.basicConfig(level=logging.INFO, format="%(levelname)s %(name)s: %(message)s")
    parser = argparse.ArgumentParser(
        prog="stac-record", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path, help="made if missing")
    folder = own_arguments(parser).folder
    asked_to_end = threading.Event()
    when_asked_to_end(lambda number: asked_to_end.set())
    # ROS must go on after a signal, for the last messages: signals are handled here.
    begin_ros("stac-record", SignalHandlerOptions.NO)
    try:
        recorder = Recorder(folder)
        executor = SingleThreadedExecutor()
        executor.add_node(recorder)
        spin_until(executor, asked_to_end.is_set)
        _hear_the_rest(recorder, executor)
        executor.shutdown()
        written = recorder.write()
    except OSError as error:
        sys.exit(f"stac-record: {error}")
    finally:
        rclpy.try_shutdown()
    print(summary(recorder.listener.seen, folder, written))


def _hear_the_rest(recorder: Recorder, executor: SingleThreadedExecutor) -> None:
    """First what is on its way; then, of a camera that goes on, only map and path of the last frame."""
    asked_at = time.monotonic()
    if not (recorder.quiet and recorder.complete):
        logger.info("asked to end: waiting for map and path of the last frame, up to %g s", LIMIT_S)
    spin_until(executor, lambda: recorder.quiet or time.monotonic() > asked_at + REST_S)
    recorder.listener.listen_only_to_the_whole()
    spin_until(executor, lambda: recorder.complete or time.monotonic() > asked_at + LIMIT_S)
    if not recorder.complete:
        logger.warning(
            "map or path of the last frame did not come: map.ply, or what a closed loop has moved of the "
            "trajectory, is older than the trajectory's end"
        )


def summary(seen: Seen, folder: Path, written: bool) -> str:
    """The last diagnostics as a table, and where the files are."""
    lines = [] if seen.health else ["No diagnostics were heard."]
    for part, health in seen.health.items():
        lines.append(f"{part}: {LEVELS[health.level]}, {health.message}")
        width = max(map(len, health.values), default=0)
        lines += [f"    {key:<{width}}  {value}" for key, value in health.values.items()]
    if not written:
        return "\n".join([*lines, f"No frame was mapped: nothing was written, {folder}/ is as it was."])
    files = "map.ply, trajectory.tum, depth/, diagnostics.json, report.png"
    lines.append(
        f"{len(seen.stamps_ns)} frames and {len(seen.map_positions)} map points in {folder}/: {files}"
    )
    return "\n".join(lines)


def _depth_name(stamp_ns: int) -> str:
    return f"{stamp_text(stamp_ns)}.png"


def _remove_depth(folder: Path, kept: set[str]) -> None:
    """Remove the depth images of older recordings and of streams that were reset, but no other file."""
    for file in folder.iterdir():
        if _DEPTH_NAME.fullmatch(file.name) and file.name not in kept:
            file.unlink()


if __name__ == "__main__":
    main()
