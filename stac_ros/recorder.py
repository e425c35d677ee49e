"""`stac-record FOLDER`: keep what the mapping node says, in files.

Records until it is told to end (Ctrl-C, SIGTERM). Depth images are written as they come, everything
else at the end: map.ply, trajectory.tum, depth/<stamp>.png (16 bit, thousandths of the unit of length,
0 = invalid), diagnostics.json and report.png. An older recording in the folder is replaced once a frame
has been mapped.
"""

from __future__ import annotations

import argparse
import json
import logging
import re
import signal
import sys
import time
from pathlib import Path

import cv2
import numpy as np
import rclpy
from rclpy.executors import SingleThreadedExecutor
from rclpy.node import Node
from rclpy.signals import SignalHandlerOptions
from rclpy.utilities import remove_ros_args
from sensor_msgs.msg import Image

from stac_core.files import write_whole
from stac_core.ply import write_ply
from stac_ros.images import decode_depth
from stac_ros.listen import subscribe
from stac_ros.report import write_report
from stac_ros.topics import DEPTH, RECORDER_NAME
from stac_ros.trajectory import Trajectory
from stac_ros.transforms import stamp_nanoseconds
from stac_ros.watch import LEVELS, Seen, Watch

QUIET_S = 1.0  # without a message: none is on its way any more
LIMIT_S = 15.0  # of waiting, once asked to end, for that quiet and for the newest map
_DEPTH_NAME = re.compile(r"\d+\.\d{9}\.png")
logger = logging.getLogger("stac-record")


class Recorder(Node):
    """Collects in memory, but for depth images, until `write`."""

    def __init__(self, folder: Path) -> None:
        super().__init__(RECORDER_NAME)
        self._folder = folder
        folder.mkdir(parents=True, exist_ok=True)
        self._begun = False
        subscribe(self, DEPTH, self._on_depth, 100)
        self.watch = Watch(self)

    @property
    def complete(self) -> bool:
        """All that was said has been heard, and the map holds the newest frame."""
        seen = self.watch.seen
        quiet = time.monotonic() - self.watch.heard_at > QUIET_S
        return quiet and (not seen.stamps_ns or seen.map_stamp_ns >= seen.stamps_ns[-1])

    def write(self) -> None:
        """Write the files, if there was anything to record. OSError naming the one that cannot be written."""
        seen = self.watch.seen
        if not seen.stamps_ns:
            return
        self._begin()
        trajectory = Trajectory(max_poses=len(seen.stamps_ns) + 1)
        for stamp_ns, pose in zip(seen.stamps_ns, seen.map_from_camera, strict=True):
            trajectory.add(stamp_ns, pose)
        write_ply(self._folder / "map.ply", seen.map_positions, seen.map_colours)
        write_whole(self._folder / "trajectory.tum", trajectory.tum())
        health = {part: vars(health) for part, health in seen.health.items()}
        memory = [vars(sample) for sample in seen.memory]
        told = json.dumps({"last": health, "memory": memory}, indent=2)
        write_whole(self._folder / "diagnostics.json", told)
        write_report(self._folder / "report.png", seen)

    def _begin(self) -> None:
        """Replace an older recording, but only once there is something to put in its place."""
        if not self._begun:
            _make_empty(self._folder / "depth")
        self._begun = True

    def _on_depth(self, message: Image) -> None:
        self._begin()
        depth = decode_depth(message)
        counted = np.clip(np.nan_to_num(depth) * 1000.0, 0, 65535).astype(np.uint16)
        stamp_ns = stamp_nanoseconds(message.header.stamp)
        name = f"{stamp_ns // 10**9}.{stamp_ns % 10**9:09d}.png"
        write_whole(self._folder / "depth" / name, cv2.imencode(".png", counted)[1].tobytes())


def main() -> None:
    logging.basicConfig(level=logging.INFO, format="%(levelname)s %(name)s: %(message)s")
    parser = argparse.ArgumentParser(
        prog="stac-record", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path, help="made if missing")
    folder = parser.parse_args(remove_ros_args(sys.argv)[1:]).folder
    asked_to_end: list[int] = []
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda number, frame: asked_to_end.append(number))
    # ROS must go on after a signal, for the last messages: signals are handled here.
    rclpy.init(args=sys.argv, signal_handler_options=SignalHandlerOptions.NO)
    try:
        recorder = Recorder(folder)
        executor = SingleThreadedExecutor()
        executor.add_node(recorder)
        while not asked_to_end:
            executor.spin_once(timeout_sec=0.1)
        end = time.monotonic() + LIMIT_S
        while not recorder.complete and time.monotonic() < end:
            executor.spin_once(timeout_sec=0.1)
        executor.shutdown()
        recorder.write()
    except OSError as error:
        sys.exit(f"stac-record: {error}")
    finally:
        rclpy.try_shutdown()
    print(summary(recorder.watch.seen, folder))


def summary(seen: Seen, folder: Path) -> str:
    """The last diagnostics as a table, and where the files are."""
    lines = [] if seen.health else ["No diagnostics were heard."]
    for part, health in seen.health.items():
        lines.append(f"{part}: {LEVELS[health.level]}, {health.message}")
        width = max(map(len, health.values), default=0)
        lines += [f"    {key:<{width}}  {value}" for key, value in health.values.items()]
    if not seen.stamps_ns:
        return "\n".join([*lines, f"No frame was mapped: nothing was written, {folder}/ is as it was."])
    files = "map.ply, trajectory.tum, depth/, diagnostics.json, report.png"
    lines.append(
        f"{len(seen.stamps_ns)} frames and {len(seen.map_positions)} map points in {folder}/: {files}"
    )
    return "\n".join(lines)


def _make_empty(folder: Path) -> None:
    """Make the folder, and remove what an older recording left there."""
    folder.mkdir(parents=True, exist_ok=True)
    for file in folder.iterdir():
        if _DEPTH_NAME.fullmatch(file.name):
            file.unlink()


if __name__ == "__main__":
    main()
