"""Why no images arrive: silence is the commonest fault, so it gets a cause and a cure."""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping

from rclpy.node import Node
from rclpy.qos import ReliabilityPolicy
from rclpy.subscription import Subscription
from rclpy.topic_endpoint_info import TopicEndpointInfo

from stac_ros.run_statistics import Snapshot
from stac_ros.topics import COMPRESSED_IMAGE, Topic, type_name

logger = logging.getLogger(__name__)


class Watchdog:
    """Complains about a topic that has been silent for too long, once per silence."""

    def __init__(
        self, node: Node, subscription: Subscription, silence_s: float, alternatives: Mapping[Topic, str]
    ) -> None:
        """alternatives: topics that a user may have meant instead → how to choose them."""
        self._node, self._subscription = node, subscription
        self._silence_s, self._alternatives = silence_s, alternatives
        self._since = time.monotonic()
        self._logged = False

    @property
    def topic(self) -> str:
        return self._subscription.topic_name

    @property
    def publishers(self) -> int:
        return self._node.count_publishers(self.topic)

    def complaint(self, counts: Snapshot) -> str:
        """What is wrong, and what to do; empty while images arrive."""
        silent_s = time.monotonic() - self._since if counts.age_s is None else counts.age_s
        if silent_s < self._silence_s:
            self._logged = False
            return ""
        text = f"no image on {self.topic} for more than {self._silence_s:g} s: {self._cause(counts)}"
        if not self._logged:
            logger.warning(text)
            self._logged = True
        return text

    def _cause(self, counts: Snapshot) -> str:
        infos = self._node.get_publishers_info_by_topic(self.topic)
        if counts.age_s is not None:
            return f"its publisher has {'stopped sending; check the camera' if infos else 'left'}"
        if not infos:
            for topic, cure in self._alternatives.items():
                name = self._node.resolve_topic_name(topic.name)
                if self._node.count_publishers(name):
                    return f"nobody publishes it, but {name} is published: {cure}"
            return "nobody publishes it; start the camera, or remap `image` (list topics: ros2 topic list)"
        wanted = type_name(self._subscription.msg_type)
        if all(info.topic_type != wanted for info in infos):
            return self._cause_of_type(infos[0], wanted)
        best_effort = [i for i in infos if i.qos_profile.reliability == ReliabilityPolicy.BEST_EFFORT]
        if best_effort and self._subscription.qos_profile.reliability == ReliabilityPolicy.RELIABLE:
            return (
                f"QoS mismatch, {best_effort[0].node_name} sends best effort and this node wants reliable; "
                "set input.image_qos to sensor_data"
            )
        return (
            f"{infos[0].node_name} publishes it, but nothing arrives: either its QoS does not match "
            "(try input.image_qos), or its images exceed Fast DDS's shared memory of 0.5 MB and are lost; "
            "start both ends with FASTDDS_DEFAULT_PROFILES_FILE naming config/fastdds.xml, or send "
            "compressed images. In a container the profile needs room in /dev/shm: run it with --shm-size=1g "
            "or --ipc=host"
        )

    def _cause_of_type(self, info: TopicEndpointInfo, wanted: str) -> str:
        text = f"{info.node_name} sends {info.topic_type} and this node wants {wanted}; "
        for topic, cure in self._alternatives.items():
            if info.topic_type == type_name(topic.type):
                text += f"{cure} and remap `{topic.name}` to it"
                if topic is COMPRESSED_IMAGE and self.topic.endswith("/compressed"):
                    text += " (launch, stac-ros: compressed:=true, and image_topic without /compressed)"
                return text
        return text + "choose a topic of images"
