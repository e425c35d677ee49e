"""Subscribe to the mapping node from outside of it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from rclpy.node import Node
from rclpy.subscription import Subscription

from stac_ros.topics import NODE_NAME, Service, Topic


def outside_name(item: Topic | Service) -> str:
    """The name that others in the node's namespace know: `~` is private to the node."""
    return item.name.replace("~", NODE_NAME, 1)


def subscribe(
    node: Node, topic: Topic, callback: Callable[[Any], None], depth: int = 0, raw: bool = False
) -> Subscription:
    """Listen to one topic of the mapping node with its own QoS, keeping `depth` messages (0 = as sent).

    raw: the callback is given the bytes as they came.
    """
    qos = topic.qos()
    qos.depth = depth or qos.depth
    return node.create_subscription(topic.type, outside_name(topic), callback, qos, raw=raw)
