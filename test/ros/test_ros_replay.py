"""`stac-replay` as a process, heard by a node of the test."""

from __future__ import annotations

import signal
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from rclpy.publisher import Publisher
from rclpy.qos import qos_profile_sensor_data
from ros_helpers import Child, ros_nodes, spin_until
from ros_recordings import BAG_START_NS, PERIOD_NS, picture, write_bag, write_calibration, write_images
from rosgraph_msgs.msg import Clock
from sensor_msgs.msg import CameraInfo, CompressedImage, Image
from std_srvs.srv import SetBool, Trigger
from tf2_msgs.msg import TFMessage

from stac_ros.listen import outside_name
from stac_ros.open_source import open_source
from stac_ros.replay_node import LAST_ANSWER_S, ReplayNode
from stac_ros.replay_settings import ReplaySettings
from stac_ros.stamps import stamp_nanoseconds
from stac_ros.topics import END_OF_INPUT, PROGRESS, qos_profile
from stac_ros.transforms import transform_buffer

PATIENT = ("--wait-for-subscribers", 60, "--wait-for-nodes", "listener")


@pytest.fixture
def listener():
    with ros_nodes("listener") as (node,):
        yield node


def collect(node, kind, topic, qos=10) -> list:
    messages: list = []
    node.create_subscription(kind, topic, messages.append, qos)
    return messages


def stamps(messages) -> list[int]:
    return [stamp_nanoseconds(message.header.stamp) for message in messages]


def test_images_of_a_folder_arrive_whole_and_in_order(tmp_path, listener):
    images = collect(listener, Image, "image", qos_profile("reliable", 50))
    with Child("stac_ros.replay", write_images(tmp_path, 6), *PATIENT, "--rate", 5) as replay:
        spin_until([listener], lambda: len(images) == 6, "six images")
        assert replay.wait() == 0, replay.output
    for index, image in enumerate(images):
        shown = np.frombuffer(image.data, np.uint8).reshape(image.height, image.width, 3)
        assert np.array_equal(shown, picture(index))


def test_best_effort_images_larger_than_the_default_segment_arrive(tmp_path, listener):
    """The shipped Fast DDS profile at work: 1.5 MB each, best effort on both sides."""
    images = collect(listener, Image, "image", qos_profile_sensor_data)
    source = write_images(tmp_path, 3, height=700, width=700)
    with Child("stac_ros.replay", source, *PATIENT, "--image-qos", "sensor_data", "--loop", "--rate", 30):
        spin_until([listener], lambda: len(images) >= 3, "three large images")
    assert all(len(image.data) == 3 * 700 * 700 for image in images)


def test_a_bag_is_replayed_with_transforms_calibration_and_clock(tmp_path, listener):
    images = collect(listener, Image, "image", qos_profile("reliable", 50))
    infos = collect(listener, CameraInfo, "camera_info", 50)
    clocks = collect(listener, Clock, "/clock", 50)
    buffer = transform_buffer(listener)
    bag = write_bag(tmp_path / "bag", 5)
    with Child("stac_ros.replay", bag, *PATIENT, "--clock", 100) as replay:
        spin_until([listener], lambda: len(images) == len(infos) == 5 and clocks, "a bag")
        assert replay.wait() == 0, replay.output
    assert stamps(images) == stamps(infos) == [BAG_START_NS + i * PERIOD_NS for i in range(5)]
    assert buffer.lookup("odom", "camera", BAG_START_NS + 3 * PERIOD_NS)[0, 3] == pytest.approx(3.0 + 1.0)
    times = [stamp_nanoseconds(clock.clock) for clock in clocks]
    assert times == sorted(times)
    assert BAG_START_NS <= times[-1] <= BAG_START_NS + 3600 * 10**9


def test_a_calibration_file_arrives_with_every_image(tmp_path, listener):
    """Also with stamps of the wall clock, which are made for each message."""
    images = collect(listener, Image, "image", qos_profile("reliable", 50))
    infos = collect(listener, CameraInfo, "camera_info", 50)
    file = write_calibration(tmp_path / "ost.yaml")
    arguments = (*PATIENT, "--use-wall-stamps", "--frame-id", "webcam", "--calibration", file)
    with Child("stac_ros.replay", write_images(tmp_path / "images", 3), *arguments) as replay:
        spin_until([listener], lambda: len(images) == len(infos) == 3, "images and their calibration")
        assert replay.wait() == 0, replay.output
    assert [info.header for info in infos] == [image.header for image in images]
    assert {info.header.frame_id for info in infos} == {"webcam"}
    for info in infos:
        assert (info.height, info.width) == (56, 84) and list(info.k)[:3] == [80.5, 0, 42.25]
        assert list(info.p)[:3] == [70, 0, 41] and list(info.d) == [-0.25, 0.07, 0.001, -0.002, 0]


def test_looping_goes_back_in_time_and_restart_begins_again(tmp_path, listener):
    images = collect(listener, Image, "image", qos_profile("reliable", 50))
    arguments = (write_bag(tmp_path / "bag", 3), *PATIENT, "--loop", "--rate", 10)
    with Child("stac_ros.replay", *arguments) as replay:
        spin_until([listener], lambda: len(images) >= 7, "more images than the bag has")
        replay.signal(signal.SIGTERM)
        assert replay.wait() == 0, replay.output
    one_round = [BAG_START_NS + i * PERIOD_NS for i in range(3)]
    assert stamps(images)[:7] == (one_round * 3)[:7]


def test_pause_and_restart(tmp_path, listener):
    images = collect(listener, Image, "image", qos_profile("reliable", 50))
    pause = listener.create_client(SetBool, "stac_replay/pause")
    restart = listener.create_client(Trigger, "stac_replay/restart")
    bag = write_bag(tmp_path / "bag", 40)
    with Child("stac_ros.replay", bag, *PATIENT, "--rate", 0.5) as replay:
        spin_until([listener], lambda: len(images) >= 2 and pause.service_is_ready(), "the first images")
        paused = pause.call_async(SetBool.Request(data=True))
        spin_until([listener], paused.done, "the pause")
        restart.wait_for_service(10)
        begun = restart.call_async(Trigger.Request())
        spin_until([listener], begun.done, "the restart")
        seen = len(images)
        going_on = pause.call_async(SetBool.Request(data=False))
        spin_until([listener], lambda: going_on.done() and len(images) > seen, "images after the restart")
        assert stamps(images)[seen] == BAG_START_NS
        replay.signal(signal.SIGINT)
        assert replay.wait() == 0, replay.output


def test_rate_zero_sends_only_what_the_node_can_take(tmp_path, listener):
    images = collect(listener, Image, "image", qos_profile("reliable", 50))
    answers = listener.create_publisher(PROGRESS.type, outside_name(PROGRESS), PROGRESS.qos())
    ends = collect(listener, END_OF_INPUT.type, outside_name(END_OF_INPUT), END_OF_INPUT.qos())
    arguments = (write_images(tmp_path, 9), *PATIENT, "--rate", 0, "--in-flight", 3)
    with Child("stac_ros.replay", *arguments) as replay:
        most_unanswered = answered = 0
        while answered < 9:
            spin_until([listener], lambda: len(images) > answered, "the next image")  # noqa: B023
            most_unanswered = max(most_unanswered, len(images) - answered)
            answers.publish(images[answered].header)
            answered += 1
        assert replay.wait() == 0, replay.output
        spin_until([listener], lambda: ends, "the end of the input")
    assert [end.stamp for end in ends] == [images[-1].header.stamp]
    assert len(images) == 9 and most_unanswered <= 3


def test_a_replay_that_waits_at_its_end_begins_again_on_request(tmp_path, listener):
    images = collect(listener, Image, "image", qos_profile("reliable", 50))
    ends = collect(listener, END_OF_INPUT.type, outside_name(END_OF_INPUT), END_OF_INPUT.qos())
    answers = listener.create_publisher(PROGRESS.type, outside_name(PROGRESS), PROGRESS.qos())
    restart = listener.create_client(Trigger, "stac_replay/restart")
    arguments = (write_images(tmp_path, 3), *PATIENT, "--rate", 0, "--in-flight", 4)
    with Child("stac_ros.replay", *arguments) as replay:
        spin_until([listener], lambda: ends and restart.service_is_ready(), "the end, without an answer")
        begun = restart.call_async(Trigger.Request())
        spin_until([listener], lambda: begun.done() and len(images) == 4, "the first image again")
        answers.publish(images[2].header)  # of all three, sent before it
        spin_until([listener], lambda: len(images) == 6 and len(ends) == 2, "the end again")
        answers.publish(images[2].header)
        assert replay.wait() == 0, replay.output
    assert stamps(images) == 2 * stamps(images[:3])


@pytest.mark.parametrize("mapped", [True, False], ids=["mapped", "heard by others alone"])
def test_a_replay_at_a_rate_ends_once_its_last_image_is_mapped(tmp_path, listener, monkeypatch, mapped):
    """And not before: all that listens may end with it."""
    monkeypatch.setattr(Publisher, "wait_for_all_acked", lambda *_: True)  # takes seconds, too
    images = collect(listener, Image, "image", qos_profile("reliable", 50))
    source = open_source(str(write_images(tmp_path, 3)), "", [], False, "camera")
    settings = ReplaySettings(rate=30.0, wait_for_subscribers=60.0, wait_for_nodes="listener")
    replay = ReplayNode(source, settings, context=listener.context)
    nodes = [listener, replay]
    try:
        if mapped:
            answers = listener.create_publisher(PROGRESS.type, outside_name(PROGRESS), PROGRESS.qos())
            spin_until(nodes, answers.get_subscription_count, "the replay's subscription")
        with ThreadPoolExecutor(1) as player:
            played = player.submit(replay.play)
            spin_until(nodes, lambda: len(images) == 3, "three images")
            if mapped:
                answers.publish(images[1].header)
                with pytest.raises(AssertionError, match="in vain"):
                    spin_until(nodes, played.done, "the end", 0.5)
                answers.publish(images[2].header)
            spin_until(nodes, played.done, "the end", LAST_ANSWER_S / 2)
        played.result()
    finally:
        replay.destroy_node()


def test_part_of_a_recording_compressed_with_wall_stamps(tmp_path, listener):
    images = collect(listener, CompressedImage, "image/compressed", qos_profile("reliable", 50))
    begin = listener.get_clock().now().nanoseconds
    arguments = ("--start-offset", 0.1, "--duration", 0.1, "--compressed", "--use-wall-stamps")
    with Child("stac_ros.replay", write_images(tmp_path, 12), *PATIENT, *arguments) as replay:
        assert spin_until([listener], lambda: not replay.running, "the end") and replay.wait() == 0
        spin_until([listener], lambda: images, "images")
    assert len(images) == 3  # 30 frames per second: numbers 3 … 5 lie between 0.1 s and 0.2 s
    assert all(begin < stamp <= listener.get_clock().now().nanoseconds + 10**9 for stamp in stamps(images))


def test_images_without_a_stamp_get_one_of_the_wall_clock(tmp_path, listener):
    images = collect(listener, Image, "image", qos_profile("reliable", 50))
    begin = listener.get_clock().now().nanoseconds
    bag = write_bag(tmp_path / "bag", 3, stamped=False)
    with Child("stac_ros.replay", bag, *PATIENT, "--use-wall-stamps") as replay:
        spin_until([listener], lambda: len(images) == 3, "three images")
        assert replay.wait() == 0, replay.output
    first, second, third = stamps(images)
    assert begin < first < second < third < listener.get_clock().now().nanoseconds + 10**9
    assert third - first == pytest.approx(2 * PERIOD_NS, abs=PERIOD_NS)


def test_a_static_transform_reaches_those_who_come_late(tmp_path, listener):
    bag = write_bag(tmp_path / "bag", 3)
    images = collect(listener, Image, "image", qos_profile("reliable", 50))
    with Child("stac_ros.replay", bag, *PATIENT, "--loop"):
        spin_until([listener], lambda: len(images) > 3, "the second round")
        latched = collect(listener, TFMessage, "/tf_static", qos_profile("latched", 5))
        spin_until([listener], lambda: latched, "the latched transform")


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        (("--rate", "-1"), "rate = -1.0: below the minimum"),
        (("--start-offset", "1000"), "no image between start_offset = 1000 s"),
        (("--wait-for-subscribers", "0.1"), "stac_mapping did not subscribe to /image within 0.1 s"),
        (("--rate", "0", "--answer-limit", "0.2"), "stac_mapping did not tell within 0.2 s how many images"),
        (("--topic", "/camera"), "is not a rosbag2 recording and has no topics"),
    ],
)
def test_what_cannot_be_played_ends_with_one_clear_line(tmp_path, arguments, reason):
    with Child("stac_ros.replay", write_images(tmp_path, 1), *arguments) as replay:
        assert replay.wait() == 1
        assert reason in replay.output
        assert "Traceback" not in replay.output


def test_a_calibration_for_another_size_ends_with_one_clear_line(tmp_path):
    file = write_calibration(tmp_path / "ost.yaml", 480, 640)
    with Child("stac_ros.replay", write_images(tmp_path / "images", 1), "--calibration", file) as replay:
        assert replay.wait() == 1
    assert replay.output.strip().count("\n") == 0, replay.output
    assert "ost.yaml is for images of 640×480 pixels, and these are 84×56" in replay.output


@pytest.mark.parametrize(
    ("sent", "heard", "cure"),
    [
        ("/camera/compressed", "image", "/image is listened to: start its listener with compressed:=true"),
        ("/camera", "image/compressed", "/image/compressed is listened to: .* compressed:=false"),
    ],
)
def test_who_listens_to_images_of_the_other_kind_is_told(tmp_path, listener, sent, heard, cure):
    collect(listener, CompressedImage if "compressed" in heard else Image, heard)
    bag = open_source(str(write_bag(tmp_path / "bag", 1, image_topics=(sent,))), "", [], False, "camera")
    settings = ReplaySettings(wait_for_subscribers=0.01, wait_for_nodes="listener")
    replay = ReplayNode(bag, settings, context=listener.context)
    try:
        spin_until([listener, replay], lambda: replay.count_subscribers(heard), "the listener")
        with pytest.raises(TimeoutError, match=f"listener did not subscribe to .* within 0.01 s; {cure}"):
            replay.play()
    finally:
        replay.destroy_node()
