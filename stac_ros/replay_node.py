"""The node behind `stac-replay`: publishes a source on a schedule."""

from __future__ import annotations

import sys
import time
from typing import Any

from rclpy.clock import Clock as RclpyClock
from rclpy.clock import ClockType
from rclpy.duration import Duration
from rclpy.node import Node
from rclpy.parameter_client import AsyncParameterClient
from rclpy.publisher import Publisher
from rclpy.qos import HistoryPolicy, QoSProfile, ReliabilityPolicy
from rclpy.topic_endpoint_info import TopicEndpointInfo
from rosgraph_msgs.msg import Clock
from std_msgs.msg import Header
from std_srvs.srv import SetBool, Trigger

from stac_ros.listen import outside_name, subscribe
from stac_ros.mailbox import mailbox_room
from stac_ros.progress import Progress
from stac_ros.replay_settings import ReplaySettings
from stac_ros.restamp import header_stamp_ns, restamp
from stac_ros.schedule import Schedule
from stac_ros.sources import STATIC_TOPICS, Item, Source
from stac_ros.stamps import SECOND, stamp_message, stamp_nanoseconds
from stac_ros.topics import COMPRESSED_IMAGE, END_OF_INPUT, IMAGE, NODE_NAME, PROGRESS, qos_profile

SETTLE_S = 1.0  # this side knows of a match before the other side does
LAST_ANSWER_S = 10.0  # at a rate, for the answer to the last image, which may have been lost on its way


class ReplayNode(Node):
    """Publishes a source on a schedule."""

    def __init__(self, source: Source, settings: ReplaySettings, **options: Any) -> None:
        super().__init__("stac_replay", **options)
        self._source, self._settings = source, settings
        self._schedule = Schedule(settings.rate)
        remembered = 1 if settings.rate else None  # at a rate, only the end waits for an answer
        self._progress = Progress(lambda: self._schedule.interrupted, remembered)
        self._most_in_flight = settings.in_flight
        self._newest_ns = 0  # stamp of the newest image
        self._stopped = False
        # before the images, so that their answers are heard from the first on
        self._answers = subscribe(self, PROGRESS, self._on_progress)
        end = END_OF_INPUT
        self._end_publisher = self.create_publisher(end.type, outside_name(end), end.qos())
        self._publishers_by_topic = {topic: self._advertise(topic) for topic in source.types}
        self.create_service(SetBool, "~/pause", self._on_pause)
        self.create_service(Trigger, "~/restart", self._on_restart)
        if settings.clock:
            self._clock_publisher = self.create_publisher(Clock, "/clock", 10)
            steady = RclpyClock(clock_type=ClockType.STEADY_TIME)
            self.create_timer(1.0 / settings.clock, self._on_clock_timer, clock=steady)

    def play(self) -> None:
        """Publish everything; returns at the end, or soon after `stop`.

        Raises TimeoutError when nobody listens, ValueError or OSError when the recording breaks off.
        """
        self._wait_for_subscribers()
        if not self._settings.rate and not self._settings.in_flight:
            self._most_in_flight = self._room_at_the_node()
        while not self._stopped:
            if self._play_once() and not self._settings.loop:
                self._wait_until_received()
                if not self._schedule.interrupted:
                    return

    def stop(self) -> None:
        """End `play` from another thread."""
        self._stopped = True
        self._schedule.stop()
        self._progress.wake()

    def _play_once(self) -> bool:
        """True at the end of the recording; False when stopped or asked to begin again."""
        begin_ns = end_ns = None
        images = 0
        for item in self._source.items():
            if begin_ns is None or end_ns is None:
                begin_ns, end_ns = self._window(item.due_ns)
                self._schedule.start(begin_ns)
            if item.due_ns < begin_ns and item.topic not in STATIC_TOPICS:
                continue
            if item.due_ns >= end_ns:
                break
            if not self._schedule.wait_until(item.due_ns) or not self._wait_for_room(item):
                return False
            self._publish(item)
            images += item.topic == self._source.image_topic
        if not images:
            raise ValueError(
                f"no image between start_offset = {self._settings.start_offset:g} s and the end of what is "
                "to be played; use a smaller offset or a longer duration"
            )
        self._end_publisher.publish(Header(stamp=stamp_message(self._newest_ns)))
        return True

    def _window(self, first_ns: int) -> tuple[int, int]:
        """The part of the recording that is played: from, and up to."""
        begin_ns = first_ns + int(self._settings.start_offset * SECOND)
        duration_ns = int(self._settings.duration * SECOND)
        return begin_ns, begin_ns + duration_ns if duration_ns else sys.maxsize

    def _wait_for_room(self, item: Item) -> bool:
        """With rate 0, hold an image back until the mapping node has come near."""
        if self._settings.rate or item.topic != self._source.image_topic:
            return True
        if not self._progress.wait_for_room(self._most_in_flight, self._settings.answer_limit):
            self.get_logger().warning(
                f"no answer on {outside_name(PROGRESS)} for {self._settings.answer_limit:g} s; "
                "sending the next image all the same"
            )
            self._progress.forget_oldest()
        return not self._schedule.interrupted

    def _publish(self, item: Item) -> None:
        payload, kind = item.payload, self._source.types[item.topic]
        if self._settings.use_wall_stamps and item.topic not in STATIC_TOPICS:
            # what carries no stamp, 0, takes place when it was recorded
            payload = restamp(payload, kind, lambda ns: self._schedule.wall_of_ns(ns or item.due_ns))
        if item.topic == self._source.image_topic:
            self._newest_ns = header_stamp_ns(payload)
            self._progress.sent(self._newest_ns)
        self._publishers_by_topic[item.topic].publish(payload)

    def _advertise(self, topic: str) -> Publisher:
        if topic in STATIC_TOPICS:
            qos = qos_profile("latched", 100)
        elif topic == self._source.image_topic:
            qos = qos_profile(self._settings.image_qos, 10)
            if not self._settings.rate:  # none may push out another: so many wait for their answer, no more
                qos.history = HistoryPolicy.KEEP_ALL
        else:
            qos = QoSProfile(depth=100)
        return self.create_publisher(self._source.types[topic], topic, qos)

    def _wait_for_subscribers(self) -> None:
        limit = self._settings.wait_for_subscribers
        wanted = {name for name in self._settings.wait_for_nodes.split(",") if name}
        topic = self._publishers_by_topic[self._source.image_topic].topic_name
        end = time.monotonic() + limit
        while limit and not self._stopped:
            listeners = self.get_subscriptions_info_by_topic(topic)
            found = [info for info in listeners if info.node_name in wanted or not wanted]
            missing = wanted - {info.node_name for info in found}
            if found and not missing:
                self._tell_best_effort(found)
                time.sleep(SETTLE_S)
                return
            if time.monotonic() > end:
                who = " and ".join(sorted(missing)) or "nobody"
                raise TimeoutError(f"{who} did not subscribe to {topic} within {limit:g} s; {self._cure()}")
            time.sleep(0.05)

    def _room_at_the_node(self) -> int:
        """The most images in flight that never push each other out; fewer might not fill a chunk."""
        limit_s, client, answer = self._settings.answer_limit, AsyncParameterClient(self, NODE_NAME), None
        end = time.monotonic() + limit_s
        while not self._stopped and time.monotonic() < end:
            if answer is None and client.services_are_ready():
                answer = client.get_parameters(["worker.mailbox_size", "cache.chunk_size"])
            if answer is not None and (told := answer.result()) is not None:
                mailbox_size, chunk_size = (value.integer_value for value in told.values)
                return mailbox_room(mailbox_size, chunk_size)
            time.sleep(0.02)
        if self._stopped:
            return 1
        raise TimeoutError(
            f"{NODE_NAME} did not tell within {limit_s:g} s how many images may wait; is it running, in the "
            "same namespace and ROS_DOMAIN_ID? Without it, set in_flight"
        )

    def _cure(self) -> str:
        """Why nobody listens to the images: most likely to those of the other kind, or not at all."""
        compressed = self._source.image_topic == COMPRESSED_IMAGE.name
        other = self.resolve_topic_name((IMAGE if compressed else COMPRESSED_IMAGE).name)
        if self.count_subscribers(other):
            return f"{other} is listened to: start its listener with compressed:={str(compressed).lower()}"
        return "is it running, in the same ROS_DOMAIN_ID, and are its topics remapped to this name?"

    def _tell_best_effort(self, listeners: list[TopicEndpointInfo]) -> None:
        for info in listeners:
            reliable = info.qos_profile.reliability == ReliabilityPolicy.RELIABLE
            if info.node_name == NODE_NAME and not reliable:
                self.get_logger().info(
                    "the mapping node hears images best effort: a busy computer may lose some; to replay "
                    "every one, set its input.image_qos to reliable"
                )

    def _wait_until_received(self) -> None:
        """Leave only when the last messages have arrived: they die with this process.

        And when a mapping node has come to the last image: with the replay, all that listens may end.
        """
        if self._stopped:
            return
        limit_s = self._settings.answer_limit
        if self._settings.rate:
            limit_s = min(limit_s, LAST_ANSWER_S) if self._answers.get_publisher_count() else 0.0
        if not self._progress.wait_for_all(limit_s) and limit_s:
            self.get_logger().warning(f"the last image was not answered within {limit_s:g} s")
        for publisher in (*self._publishers_by_topic.values(), self._end_publisher):
            publisher.wait_for_all_acked(Duration(seconds=5))

    def _on_clock_timer(self) -> None:
        """Recording time at a steady rate of wall time, also while paused; 0, "not yet", before the start."""
        self._clock_publisher.publish(Clock(clock=stamp_message(self._schedule.now_ns())))

    def _on_progress(self, message: Header) -> None:
        self._progress.answered(stamp_nanoseconds(message.stamp))

    def _on_pause(self, request: SetBool.Request, response: SetBool.Response) -> SetBool.Response:
        self._schedule.pause(request.data)
        response.success, response.message = True, "paused" if request.data else "playing"
        return response

    def _on_restart(self, _: Trigger.Request, response: Trigger.Response) -> Trigger.Response:
        self._schedule.interrupt()
        self._progress.wake()
        response.success, response.message = True, "playing from the beginning"
        return response
