"""Who else says where our frame is: a frame has one parent, and with two, tf2 follows whoever spoke last."""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from geometry_msgs.msg import TransformStamped
from rclpy.callback_groups import CallbackGroup
from rclpy.node import Node
from rclpy.serialization import deserialize_message
from tf2_msgs.msg import TFMessage

from stac_ros.settings import FrameSettings
from stac_ros.topics import TF, qos_profile
from stac_ros.transforms import LATEST, STATIC_QOS, TransformBroadcaster, frame_name

LOOK_EVERY_S = 1.0

logger = logging.getLogger(__name__)


class _Unattended(CallbackGroup):
    """Executors pass over what belongs to it: messages wait until somebody takes them."""

    def can_execute(self, entity: Any) -> bool:
        return False

    def beginning_execution(self, entity: Any) -> bool:
        return False

    def ending_execution(self, entity: Any) -> None:
        raise AssertionError("nothing has begun")


@dataclass(frozen=True)
class _Link:
    """What another node says of a frame."""

    parent: str
    topic: str
    sender: str  # a node, as far as it is known


class OtherParents:
    """Finds whoever else gives a parent to a frame that this node places, on /tf_static or /tf.

    /tf may carry thousands of messages a second, far too many to be received one by one in Python. So its
    latest ones wait in the middleware and are looked through once a second, for the bytes of a name; a
    node that seldom speaks among many may escape several looks. One thread may call `check`.
    """

    def __init__(self, node: Node, broadcaster: TransformBroadcaster, settings: FrameSettings) -> None:
        self._node, self._broadcaster, self._settings = node, broadcaster, settings
        self._static: dict[str, _Link] = {}  # by child
        self._moving: dict[str, _Link] = {}
        self._warned_of: set[str] = set()
        self._next_look = 0.0  # on the monotonic clock
        node.create_subscription(TFMessage, "/tf_static", self._receive_static, STATIC_QOS)
        self._latest = node.create_subscription(
            TF.type,
            TF.name,
            lambda raw: None,
            qos_profile("sensor_data", LATEST),
            callback_group=_Unattended(),
            raw=True,
        )

    def check(self, child: str) -> None:
        """Warn, once for each frame, if another node places `child` too."""
        now = time.monotonic()
        if child in self._warned_of or now < self._next_look:
            return
        self._next_look = now + LOOK_EVERY_S
        self._look(child)
        link = self._link_of(child)
        if link is not None:
            self._warned_of.add(child)
            logger.warning(self._conflict(child, link))

    def _conflict(self, child: str, link: _Link) -> str:
        """What is wrong, and what to do."""
        own = self._settings.visual_odom or self._settings.map
        if child == self._settings.odom:
            return (
                f"{link.sender} sends {link.parent} → {child} on {link.topic}, this node {own} → {child}, "
                "and listeners follow whoever spoke last: let one of them localise. Stop it there (AMCL: "
                "tf_broadcast false; slam_toolbox: transform_publish_period 0), or here with "
                "frames.publish_tf to false"
            )
        if link.parent == own:
            return (
                f"{link.sender} sends {own} → {child} on {link.topic} as well, and listeners follow "
                "whoever spoke last: give each robot its own frames.map and frames.camera, or remap /tf"
            )
        root = [frame for frame in self._above(child) if frame != own][-1]
        return (
            f"{child} has the parent {link.parent} on {link.topic} (from {link.sender}); {own} → {child} is "
            "a second one, which cuts the camera out of that tree: set frames.odom to the odometry frame, "
            f"or where there is none to {root}, the root; where that is another robot's camera, give this "
            "one a name of its own in frames.camera"
        )

    def _link_of(self, child: str) -> _Link | None:
        return self._static.get(child) or self._moving.get(child)

    def _above(self, frame: str) -> list[str]:
        """The frame's parent, that one's parent, and so on, as far as they are known."""
        found: list[str] = []
        while (link := self._link_of(frame)) and link.parent not in found:
            frame = link.parent
            found.append(frame)
        return found

    def _look(self, child: str) -> None:
        """Learn the links above a frame from the latest messages."""
        messages = self._take_latest()
        known = -1
        while known < len(self._moving):  # a parent just found may have a parent of its own
            known = len(self._moving)
            names = [child, *self._above(child)]
            marks = [name.encode() + b"\0" for name in names]  # as names end in a serialised message
            for raw, info in messages:
                if any(mark in raw for mark in marks):
                    self._learn(deserialize_message(raw, TFMessage), names, info)

    def _learn(self, message: TFMessage, names: list[str], info: Mapping[str, Any]) -> None:
        for transform in message.transforms:
            child = frame_name(transform.child_frame_id)
            if child in names and child not in self._moving and not self._broadcaster.has_sent(transform):
                self._moving[child] = _Link(_parent(transform), TF.name, self._sender(info))

    def _take_latest(self) -> list[tuple[bytes, Mapping[str, Any]]]:
        taken, handle = [], self._latest.handle
        with handle:
            while (message := handle.take_message(TFMessage, True)) is not None:
                taken.append(message)
        return taken

    def _sender(self, info: Mapping[str, Any]) -> str:
        """The node that published a message, where the release of ROS tells so much."""
        identifier = (info.get("publisher_gid") or {}).get("data")
        for publisher in self._node.get_publishers_info_by_topic(TF.name):
            if bytes(publisher.endpoint_gid) == identifier:
                return f"{publisher.node_namespace.rstrip('/')}/{publisher.node_name}"
        return "another node"

    def _receive_static(self, message: TFMessage) -> None:
        self._static |= {
            frame_name(t.child_frame_id): _Link(_parent(t), "/tf_static", "another node")
            for t in message.transforms
        }


def _parent(transform: TransformStamped) -> str:
    return frame_name(transform.header.frame_id)
