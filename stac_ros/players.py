"""Who plays the bag of an evaluation: this process, or whatever else its user likes to play with."""

from __future__ import annotations

import logging
import threading
import time

from rclpy.node import Node

from stac_ros.answer_recorder import AnswerRecorder
from stac_ros.bag_source import BagSource
from stac_ros.replay_node import ReplayNode
from stac_ros.replay_settings import START_LIMIT_S, ReplaySettings
from stac_ros.restamp import header_stamp_ns
from stac_ros.sources import Item
from stac_ros.topics import NODE_NAME, qos_profile

_DISCOVERY_S = 5  # until all listeners and a new player have found each other; what is played before is lost
_END_OF_PLAYING_S = 10.0  # without an image, where nobody tells the end
logger = logging.getLogger("stac-eval bag")


class OwnPlayer(ReplayNode):
    """Replays in a thread of its own and tells the recorder when each image leaves."""

    interrupted = "interrupted before the end of the bag"

    def __init__(self, source: BagSource, settings: ReplaySettings, recorder: AnswerRecorder) -> None:
        super().__init__(source, settings)
        self._recorder = recorder
        self._thread = threading.Thread(target=self._run)
        self.problem = ""

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


class OutsidePlayer(Node):
    """Somebody else, such as `ros2 bag play`: says when to begin and hears the images pass."""

    interrupted = ""  # so its user says that the playing is over

    def __init__(self, source: BagSource, recorder: AnswerRecorder) -> None:
        super().__init__("stac_evaluation_listener")
        self._recorder = recorder
        self._command = f"ros2 bag play --delay {_DISCOVERY_S} {source.path}"
        self._heard_at = self._ready_at = 0.0
        self._topic = source.recorded_name(source.image_topic)
        kind = source.types[source.image_topic]
        self.create_subscription(kind, self._topic, self._on_image, qos_profile("sensor_data", 100), raw=True)

    @property
    def problem(self) -> str:
        if self._heard_at:
            return ""
        return f"no image came on {self._topic}; is it played under this name, in the same ROS_DOMAIN_ID?"

    def begin(self) -> None:
        self.create_timer(0.1, self._tell_when_ready)

    def is_playing(self) -> bool:
        now = time.monotonic()
        if self._heard_at:
            return now - self._heard_at < _END_OF_PLAYING_S
        return not self._ready_at or now - self._ready_at < START_LIMIT_S  # so long may a user take, too

    def end(self) -> None:
        """Nothing here holds it."""

    def _tell_when_ready(self) -> None:
        listeners = [info.node_name for info in self.get_subscriptions_info_by_topic(self._topic)]
        if not self._ready_at and NODE_NAME in listeners:
            self._ready_at = time.monotonic()
            logger.info("the node hears %s: play now, for example  %s", self._topic, self._command)
            logger.info("%g s without an image, or Ctrl-C, end the recording", _END_OF_PLAYING_S)

    def _on_image(self, raw: bytes) -> None:
        self._recorder.image_sent(header_stamp_ns(raw))
        self._heard_at = time.monotonic()
