"""A mapping node in a process of its own, and the other side of its topics and services."""

from __future__ import annotations

import time
from collections import defaultdict
from pathlib import Path
from typing import Any

import numpy as np
from diagnostic_msgs.msg import DiagnosticArray
from rclpy.node import Node
from rclpy.qos import QoSProfile
from ros_helpers import PATIENCE_S, Child, spin_until
from sensor_msgs.msg import Image
from std_msgs.msg import Header
from tiny import synthetic_frames

from stac_ros import topics
from stac_ros.images import encode_image
from stac_ros.listen import outside_name
from stac_ros.stamps import stamp_message, stamp_nanoseconds
from stac_ros.topics import Service, Topic

START_S = 120.0  # to load PyTorch and a network, next to all else that a computer may be doing
HEIGHT, WIDTH = 48, 64
NOBODYS = "~nobody_at_all/maps"  # a folder
FAST = {"image.size": 56, "model.device": "cpu"}  # a step of the smallest network takes a tenth of a second


class NodeProcess(Child):
    """`stac_node` in a namespace, with parameters section.field → value."""

    def __init__(self, namespace: str, parameters: dict[str, Any]) -> None:
        self.namespace = namespace
        words = ["--ros-args", "-r", f"__ns:=/{namespace}"]
        for name, value in (FAST | parameters).items():
            words += ["-p", f"{name}:={str(value).lower() if isinstance(value, bool) else value}"]
        super().__init__("stac_ros.mapping_node", *words)


class Observer:
    """Talks to one `NodeProcess`: sends images, keeps every answer, calls services."""

    def __init__(self, node: Node, under_test: NodeProcess, image: Topic, qos: QoSProfile) -> None:
        self.node, self.under_test = node, under_test
        self.received: dict[Topic, list[Any]] = defaultdict(list)
        self._camera = node.create_publisher(image.type, self.name(image), qos)
        for topic in topics.OUTPUTS:
            self._listen(topic)
        self._clients = {s: node.create_client(s.type, self.name(s)) for s in topics.SERVICES}

    def name(self, item: Topic | Service) -> str:
        """The full name of a topic or service of the node under test."""
        return str(Path("/", self.under_test.namespace) / outside_name(item))

    def wait_until_ready(self) -> None:
        def ready() -> bool:
            assert self.under_test.running, f"the node ended:\n{self.under_test.output}"
            heard = all(self.node.count_publishers(self.name(topic)) for topic in topics.OUTPUTS)
            served = all(client.service_is_ready() for client in self._clients.values())
            return heard and served and self._camera.get_subscription_count() > 0

        spin_until([self.node], ready, "the node's topics and services", START_S)
        self.fresh_diagnostics()

    def publish(self, message: Any) -> None:
        self._camera.publish(message)

    def map_images(self, *messages: Any) -> None:
        """Send images one by one, each when the one before has been mapped."""
        for message in messages:
            stamp = message.header.stamp
            self.publish(message)
            self.wait(topics.POSE, lambda pose, stamp=stamp: pose.header.stamp == stamp)

    def wait(self, topic: Topic, wanted=lambda message: True) -> Any:  # type: ignore[no-untyped-def]
        """The first message of a topic received since `forget` that is the one wanted."""

        def found() -> Any:
            return next((message for message in self.received[topic] if wanted(message)), None)

        return self.spin_until(found, f"a message on {topic.name}")

    def forget(self) -> None:
        self.received.clear()

    def call(self, service: Service, **fields: Any) -> Any:
        future = self._clients[service].call_async(service.type.Request(**fields))
        self.spin_until(future.done, f"the answer of {service.name}")
        return future.result()

    def restart(self) -> None:
        """A fresh stream with an empty map, and nothing received."""
        assert self.call(topics.PAUSE, data=False).success and self.call(topics.RESET).success
        self.forget()

    def fresh_diagnostics(self) -> dict[str, dict[str, str]]:
        """The values of each part, from a report made from now on."""
        self.received[topics.DIAGNOSTICS].clear()
        for _ in range(2):  # the first one may have been under way
            message = self.wait(topics.DIAGNOSTICS, self._of_node)
            self.received[topics.DIAGNOSTICS].remove(message)
        return {
            status.name.rpartition(": ")[2]: {pair.key: pair.value for pair in status.values}
            | {"level": status.level, "message": status.message}
            for status in message.status
        }

    def diagnostics_when(self, wanted, act=lambda: None) -> dict[str, dict[str, str]]:  # type: ignore[no-untyped-def]
        """The first fresh report that is the one wanted; before each, `act`."""
        limit = time.monotonic() + PATIENCE_S
        while True:
            act()
            found = self.fresh_diagnostics()
            if wanted(found):
                return found
            assert time.monotonic() < limit, (
                f"diagnostics stay {found}; the node's log:\n{self.under_test.output}"
            )

    def spin_until(self, done, what: str, patience_s: float = PATIENCE_S) -> Any:  # type: ignore[no-untyped-def]
        try:
            return spin_until([self.node], done, what, patience_s)
        except AssertionError as error:
            raise AssertionError(f"{error}; the node's log:\n{self.under_test.output}") from None

    def _of_node(self, message: DiagnosticArray) -> bool:
        return message.status[0].name.startswith(f"{self.under_test.namespace}/")

    def _listen(self, topic: Topic) -> None:
        qos = topic.qos()
        qos.depth = max(qos.depth, 50)  # this process may be slower than the node

        def keep(message: Any) -> None:
            self.received[topic].append(message)

        self.node.create_subscription(topic.type, self.name(topic), keep, qos)


def images(
    count: int,
    first_stamp_s: float = 100,
    height: int = HEIGHT,
    width: int = WIDTH,
    frame: str = "camera",
    period_s: float = 1,
) -> list[Image]:
    """rgb8 messages of a textured plane that slides past."""
    return [
        encode_image(pixels, "rgb8", header(first_stamp_s + period_s * index, frame))
        for index, pixels in enumerate(synthetic_frames(count, height, width))
    ]


def header(stamp_s: float, frame: str = "camera") -> Header:
    return Header(stamp=stamp_message(round(stamp_s * 1e9)), frame_id=frame)


def stamps_s(messages: list[Any]) -> list[float]:
    return [stamp_nanoseconds(message.header.stamp) / 1e9 for message in messages]


def matrix_of(pose: Any) -> np.ndarray:
    """geometry_msgs/Pose as a rigid 4×4 matrix, by plain formulas."""
    x, y, z, w = (getattr(pose.orientation, axis) for axis in "xyzw")
    matrix = np.eye(4)
    matrix[:3, :3] = [
        [1 - 2 * (y * y + z * z), 2 * (x * y - z * w), 2 * (x * z + y * w)],
        [2 * (x * y + z * w), 1 - 2 * (x * x + z * z), 2 * (y * z - x * w)],
        [2 * (x * z - y * w), 2 * (y * z + x * w), 1 - 2 * (x * x + y * y)],
    ]
    matrix[:3, 3] = pose.position.x, pose.position.y, pose.position.z
    return matrix
