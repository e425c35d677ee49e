"""Command: what the node costs apart from the model, on this computer, with a listener in another process.

    python -m stac_ros.benchmark

Six figures: an image merged into the voxel map; that map moved where a loop is closed; a cloud and a depth
image from arrays to the wire; images mapped next to a network that leaves the CPU alone; how long a node
takes until it listens; how long the image callback takes while the model is busy.
"""

from __future__ import annotations

import argparse
import itertools
import os
import re
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace

import numpy as np
import rclpy
import torch
from builtin_interfaces.msg import Time
from numpy.typing import NDArray
from rclpy.executors import MultiThreadedExecutor
from rclpy.node import Node
from sensor_msgs.msg import CompressedImage, Image
from std_msgs.msg import Header

from stac_core import ImageGeometry, Moves, Prediction
from stac_core.settings import add_flags, check_settings, read_flags, setting
from stac_ros import topics
from stac_ros.camera_info import CameraCalibration
from stac_ros.clouds import cloud_message
from stac_ros.domain import private_ros_environment
from stac_ros.fastdds import profile_environment
from stac_ros.images import encode_image
from stac_ros.map import VoxelMap
from stac_ros.mapped_frame import Points
from stac_ros.mapper import Mapper
from stac_ros.mapping_node import MappingNode
from stac_ros.mapping_worker import MappingWorker
from stac_ros.node_process import THREADS
from stac_ros.outputs import Outputs
from stac_ros.parameters import Parameters
from stac_ros.predictor import Predicted, View
from stac_ros.run_statistics import Statistics
from stac_ros.settings import MapSettings, PointSettings

SUBMAPS = 20  # of the map that is moved
_LISTENER = """
import rclpy
from stac_ros.topics import DEPTH, POINTS
from stac_ros.listen import subscribe
rclpy.init()
node = rclpy.create_node("listener")
for topic in (POINTS, DEPTH):
    subscribe(node, topic, lambda message: None)
rclpy.spin(node)
"""
_CAMERA = """
import sys, time
import numpy as np, rclpy
from std_msgs.msg import Header
from stac_ros.images import encode_image
from stac_ros.topics import IMAGE
height, width, rate = int(sys.argv[1]), int(sys.argv[2]), float(sys.argv[3])
rclpy.init()
node = rclpy.create_node("camera")
camera = node.create_publisher(IMAGE.type, IMAGE.name, IMAGE.qos())
pixels = np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)
while rclpy.ok():
    header = Header(stamp=node.get_clock().now().to_msg(), frame_id="camera")
    camera.publish(encode_image(pixels, "rgb8", header))
    time.sleep(1 / rate)
"""


@dataclass(frozen=True)
class BenchmarkSettings:
    """What is measured with."""

    points: int = setting(203_000, "points of the cloud: a network image of 518×392 pixels", minimum=1)
    voxels: int = setting(500_000, "voxels of the map that images are merged into", minimum=1000)
    width: int = setting(640, "width of camera and depth images", minimum=64, unit="px")
    height: int = setting(480, "height of camera and depth images", minimum=64, unit="px")
    repeats: int = setting(100, "images merged, and messages of each kind", minimum=1)
    rate: float = setting(30.0, "camera images while the model is busy", minimum=1.0, unit="Hz")
    seconds: float = setting(15.0, "how long the model is kept busy", minimum=1.0, unit="s")
    network_ms: float = setting(30.0, "a network on a GPU, per image", minimum=0.0, unit="ms")

    def __post_init__(self) -> None:
        check_settings(self)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    add_flags(parser, BenchmarkSettings)
    settings = read_flags(BenchmarkSettings, parser.parse_args())
    os.environ.update(private_ros_environment() | profile_environment())
    print(_map_table(settings))
    print(_publishing_table(settings))
    print(_overlap_table(settings))
    print(_start_table())
    print(_callback_table(settings))


def _map_table(settings: BenchmarkSettings) -> str:
    """Merging of images whose points lie anywhere in a known map, in no order; moving of its submaps."""
    rng = np.random.default_rng(0)
    count = round(settings.points * (1 - PointSettings().confidence_percentile / 100))
    edge = int(np.ceil(np.cbrt(settings.voxels)))
    cells = rng.permutation(np.argwhere(np.ones((edge, edge, edge), bool))[: settings.voxels])
    voxel_map = VoxelMap(MapSettings().voxel_size, settings.voxels)

    def image(cells: NDArray[np.int64]) -> Points:
        """A point in each of the cells [N, 3]."""
        positions = (cells + rng.uniform(0.1, 0.9, cells.shape)) * voxel_map.voxel_size
        colours = rng.integers(0, 256, cells.shape, dtype=np.uint8)
        confidences = rng.uniform(1, 9, len(cells))
        return Points(positions.astype(np.float32), colours, confidences.astype(np.float32))

    def add(cells: NDArray[np.int64], points: Points) -> None:
        submaps = cells[:, 0] * SUBMAPS // edge  # side by side
        voxel_map.add(points.positions, points.colours, points.confidences, submaps.astype(np.int32))

    for start in range(0, len(cells), count):
        add(new := cells[start : start + count], image(new))
    images = itertools.cycle(
        [(again, image(again)) for again in (rng.choice(cells, count) for _ in range(8))]
    )
    merging = _durations_ms(lambda: add(*next(images)), settings.repeats)
    title = f"{count} points of an image into a map of {len(voxel_map)} voxels; all of these moved by a loop"
    there, back = (_shifted(sign * voxel_map.voxel_size) for sign in (1, -1))
    moves = itertools.cycle([there, back])
    moving = _durations_ms(lambda: voxel_map.move(next(moves)), settings.repeats)
    return f"{title}\n{_row('merging', merging)}\n{_row('moving', moving)}"


def _shifted(by: float) -> Moves:
    """Each submap a little farther than the one before."""
    still = Moves.none(SUBMAPS)
    return replace(still, translation=still.translation + by * np.arange(SUBMAPS)[:, None] / SUBMAPS)


def _publishing_table(settings: BenchmarkSettings) -> str:
    """Conversion and publishing of one cloud and one depth image."""
    rng = np.random.default_rng(0)
    positions = rng.normal(size=(settings.points, 3)).astype(np.float32)
    colours = rng.integers(0, 256, (settings.points, 3), dtype=np.uint8)
    depth = rng.uniform(1, 5, (settings.height, settings.width)).astype(np.float32)
    header = Header(frame_id="map")
    rclpy.init()
    node = Node(topics.NODE_NAME)
    clouds, depths = (node.create_publisher(t.type, t.name, t.qos()) for t in (topics.POINTS, topics.DEPTH))

    def publish() -> None:
        clouds.publish(cloud_message(header, positions, colours))
        depths.publish(encode_image(depth, "32FC1", header))

    title = f"{settings.points} points and a {settings.width}×{settings.height} depth image, arrays → wire"
    with child("-c", _LISTENER):
        _wait_until(lambda: clouds.get_subscription_count() and depths.get_subscription_count())
        durations = _durations_ms(publish, settings.repeats)
    node.destroy_node()
    rclpy.shutdown()
    return f"{title}\n{_row('conversion and publishing', durations)}"


def _overlap_table(settings: BenchmarkSettings) -> str:
    """Chunks of 4 images of 518×392 through the node's two stages; in place of the network, a pause."""
    rclpy.init()
    node = Node(topics.NODE_NAME)
    parameters, statistics = Parameters(node), Statistics()
    outputs = Outputs(node, parameters, CameraCalibration())
    chunks = [_predicted(number) for number in range(-(-settings.repeats // 4))]

    def images_per_second(receiver: Mapper | MappingWorker) -> float:
        started = time.perf_counter()
        for chunk in chunks:
            time.sleep(4e-3 * settings.network_ms)
            receiver.add(chunk)
            receiver.done_with(chunk.views[-1].header)
        if isinstance(receiver, MappingWorker):
            receiver.stop()
        return 4 * len(chunks) / (time.perf_counter() - started)

    with child("-c", _LISTENER):
        _wait_until(lambda: all(map(outputs.has_subscribers, (topics.POINTS, topics.DEPTH))))
        series = images_per_second(Mapper(parameters, statistics, outputs))
        overlapped = images_per_second(MappingWorker(Mapper(parameters, statistics, outputs), statistics))
    node.destroy_node()
    rclpy.shutdown()
    title = f"images mapped and published next to a network that takes {settings.network_ms:g} ms for each"
    rates = f"{series:.1f} images/s one after the other, {overlapped:.1f} at the same time"
    return f"{title}\n  {rates}: {overlapped / series:.2f} times as many"


def _predicted(number: int) -> Predicted:
    """A chunk that sees a wavy wall, from a millimetre further to the right each time."""
    random = torch.Generator().manual_seed(number)
    height, width = 392, 518
    noise, confidence = torch.rand(2, 4, height, width, generator=random)
    depth = 2.5 + 0.5 * torch.linspace(-9, 9, width).sin() + 0.01 * noise
    poses = torch.eye(4).repeat(4, 1, 1)
    poses[:, 0, 3] = 0.001 * number
    intrinsics = torch.tensor([[450.0, 0, width / 2], [0, 450, height / 2], [0, 0, 1]]).expand(4, 3, 3)
    header = Header(stamp=Time(sec=1 + number), frame_id="camera")
    return Predicted(
        [View(header, np.zeros((480, 640, 3), np.uint8), None)] * 4,
        Prediction(torch.zeros(4, 9), poses, intrinsics, depth, 1 + 9 * confidence),
        ImageGeometry((480, 640), (height, width), (width / 640, height / 480), (0.0, 0.0)),
    )


class _TimedNode(MappingNode):
    """The node, with a stopwatch around its image callback."""

    def __init__(self) -> None:
        self.durations_ms: list[float] = []
        super().__init__()

    def on_image(self, message: Image | CompressedImage) -> None:
        started = time.perf_counter()
        super().on_image(message)
        self.durations_ms.append(1e3 * (time.perf_counter() - started))


def _callback_table(settings: BenchmarkSettings) -> str:
    """Images arrive at the camera's rate; the model has more to do than it can."""
    rclpy.init()
    node = _TimedNode()
    executor = MultiThreadedExecutor(THREADS)
    executor.add_node(node)
    spinning = threading.Thread(target=executor.spin)
    spinning.start()
    with child("-c", _CAMERA, *map(str, (settings.height, settings.width, settings.rate))):
        _wait_until(lambda: node.statistics.snapshot().mapped)
        node.durations_ms.clear()
        before = node.statistics.snapshot()
        time.sleep(settings.seconds)
        durations, counts = list(node.durations_ms), node.statistics.snapshot()
    node.close()
    executor.shutdown()
    spinning.join()
    node.destroy_node()
    rclpy.shutdown()
    images, mapped = counts.received - before.received, counts.mapped - before.mapped
    seconds, step_ms = settings.seconds, float(np.mean(counts.steps_ms))
    title = f"image callback while the model is busy: {images / seconds:.1f} images/s received, "
    return f"{title}{mapped / seconds:.1f} mapped, steps of {step_ms:.0f} ms\n{_row('callback', durations)}"


def _start_table() -> str:
    """From starting the process until a camera finds its subscriber."""
    rclpy.init()
    node = Node("camera")
    camera = node.create_publisher(topics.IMAGE.type, topics.IMAGE.name, topics.IMAGE.qos())
    started = time.monotonic()
    with child("-m", "stac_ros.mapping_node") as process:
        _wait_until(camera.get_subscription_count)
        seconds = time.monotonic() - started
        process.terminate()
        log = process.communicate()[1]
    node.destroy_node()
    rclpy.shutdown()
    found = re.search(r"network ready in ([0-9.]+) s", log)
    loading = float(found[1]) if found else float("nan")
    return (
        f"node start to first subscription: {seconds:.1f} s, of which the network and its weights "
        f"{loading:.1f} s"
    )


@contextmanager
def child(*arguments: str) -> Iterator[subprocess.Popen[str]]:
    """A Python process that ends with the block."""
    command = [sys.executable, *arguments]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    try:
        yield process
    finally:
        process.kill()
        process.wait()


def _durations_ms(action: Callable[[], None], repeats: int) -> list[float]:
    """Of each call, with pauses that let listeners keep up; a first call, not counted, is to warm up."""
    durations_ms: list[float] = []
    for _ in range(repeats + 1):
        started = time.perf_counter()
        action()
        durations_ms.append(1e3 * (time.perf_counter() - started))
        time.sleep(0.02)
    return durations_ms[1:]


def _row(name: str, durations_ms: list[float]) -> str:
    median, p95, most = np.percentile(durations_ms, (50, 95, 100))
    return f"  {name:<30} median {median:8.3f} ms   p95 {p95:8.3f} ms   max {most:8.3f} ms"


def _wait_until(done: Callable[[], object]) -> None:
    """TimeoutError after two minutes."""
    limit = time.monotonic() + 120
    while not done():
        if time.monotonic() > limit:
            raise TimeoutError("the other process was not found: is multicast on loopback allowed?")
        time.sleep(0.005)


if __name__ == "__main__":
    main()
