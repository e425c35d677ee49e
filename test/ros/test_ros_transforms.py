"""Transforms over real topics: what one node sends, another looks up."""

from __future__ import annotations

import numpy as np
import pytest
from builtin_interfaces.msg import Time
from rclpy.parameter import Parameter
from ros_helpers import StaticTransformBroadcaster, ros_nodes, spin_until
from rosgraph_msgs.msg import Clock
from scipy.spatial.transform import Rotation
from tf2_msgs.msg import TFMessage

from stac_ros import transforms
from stac_ros.placed_frames import Placed, PlacedFrames
from stac_ros.settings import FrameSettings
from stac_ros.stamps import stamp_nanoseconds
from stac_ros.transforms import (
    TransformBroadcaster,
    TransformBuffer,
    TransformError,
    stamped_transform,
    transform_buffer,
    transform_matrix,
    transform_message,
)


def pose(seed: int) -> np.ndarray:
    rng = np.random.default_rng(seed)
    matrix = np.eye(4)
    matrix[:3, :3] = Rotation.random(None, rng).as_matrix()
    matrix[:3, 3] = rng.normal(size=3)
    return matrix


@pytest.fixture(params=["tf2_ros", "stac_ros"])
def library(request, monkeypatch):
    if request.param == "stac_ros":
        monkeypatch.setattr(transforms, "tf2_ros", None)
    elif transforms.tf2_ros is None:
        pytest.skip("tf2_ros is part of a ROS installation, no wheel carries it")
    return request.param


def known(buffer: TransformBuffer, *question) -> bool:
    try:
        buffer.lookup(*question)
    except TransformError:
        return False
    return True


def test_a_matrix_survives_its_message():
    assert np.allclose(transform_matrix(transform_message(pose(0))), pose(0))


def test_what_one_node_sends_another_looks_up(library):
    odom_from_base, base_from_camera, base_from_laser = pose(1), pose(2), pose(3)
    stamp = Time(sec=12, nanosec=345)
    with ros_nodes("sender", "receiver") as (sender, receiver):
        static = StaticTransformBroadcaster(sender)
        static.send(stamped_transform(base_from_camera, "base", "camera", Time()))
        static.send(stamped_transform(base_from_laser, "base", "laser", Time()))
        moving = TransformBroadcaster(sender)
        buffer = transform_buffer(receiver)  # subscribes after the static transforms were sent
        spin_until([sender, receiver], lambda: sender.count_subscribers("/tf"), "the subscriber of /tf")
        spin_until([sender, receiver], lambda: known(buffer, "laser", "camera"), "static transforms")

        def heard() -> bool:
            moving.send(stamped_transform(odom_from_base, "odom", "base", stamp))
            return known(buffer, "odom", "camera")

        spin_until([sender, receiver], heard, "the moving transform")
        found = buffer.lookup("odom", "camera", 12_000_000_345)
        assert np.allclose(found, odom_from_base @ base_from_camera)
        with pytest.raises(TransformError, match="extrapolat"):
            buffer.lookup("odom", "camera", 13_000_000_000)
        with pytest.raises(TransformError, match="nowhere"):
            buffer.lookup("odom", "nowhere")


def test_a_leading_slash_is_no_part_of_a_frame_and_a_frame_is_not_in_itself(library):
    """As recordings of ROS 1 have it, and as tf2 takes it."""
    with ros_nodes("sender", "receiver") as (sender, receiver):
        static, buffer = StaticTransformBroadcaster(sender), transform_buffer(receiver)
        static.send(stamped_transform(pose(1), "/world", "/base", Time()))
        static.send(stamped_transform(pose(2), "base", "camera", Time()))
        static.send(stamped_transform(pose(3), "/world", "world", Time()))
        spin_until([sender, receiver], lambda: known(buffer, "world", "camera"), "static transforms")
        assert np.allclose(buffer.lookup("world", "camera"), pose(1) @ pose(2))


def test_the_correction_is_published_once_for_every_moment_of_the_clock(caplog):
    """Of simulated time, which may stand still, run back, or never have been that of the images."""
    sim_time = {"parameter_overrides": [Parameter("use_sim_time", value=True)]}
    heard: list[float] = []

    def keep(message: TFMessage) -> None:
        heard.extend(stamp_nanoseconds(t.header.stamp) / 1e9 for t in message.transforms)

    with ros_nodes("robot", **sim_time) as (robot,), ros_nodes("outside") as (outside,):
        clock = outside.create_publisher(Clock, "/clock", 1)
        outside.create_subscription(TFMessage, "/tf", keep, 10)
        broadcaster = TransformBroadcaster(robot)
        frames = FrameSettings(odom="base", visual_odom="odom")
        placed = PlacedFrames(broadcaster, robot.get_clock(), frames)
        of_odom = [Placed("map", "odom", pose(1))]

        def set_clock(now_s: int) -> None:
            def told() -> bool:
                clock.publish(Clock(clock=Time(sec=now_s)))
                return robot.get_clock().now().nanoseconds == now_s * 10**9

            spin_until([robot], told, "simulated time")

        def republish(times: int, expected: list[float]) -> None:
            for _ in range(times):
                placed.republish()
            broadcaster.send(stamped_transform(pose(2), "a", "b", Time(sec=1)))  # the last word
            spin_until([outside], lambda: 1.0 in heard, "what was said")
            assert heard == [*expected, 1.0]
            heard.clear()

        spin_until([outside], lambda: outside.count_publishers("/tf"), "the robot")
        spin_until([robot], lambda: robot.count_subscribers("/tf"), "the listener")
        set_clock(100)
        republish(1, [])
        placed.publish(of_odom, Time(sec=99))
        republish(3, [99.0, 100.0])
        set_clock(98)  # earlier than the image
        republish(2, [])
        placed.publish(of_odom, Time(sec=97))
        republish(2, [97.0, 98.0])
        placed.forget()
        set_clock(99)
        republish(2, [])
        placed.publish(of_odom, Time(sec=2000))
        placed.publish(of_odom, Time(sec=2001))
        set_clock(3000)
        republish(2, [2000.0, 2001.0])
    text = "images are stamped 2000.000 s where this node's clock says 99.000 s: map → odom → base is sent"
    assert caplog.text.count(text) == 1
    assert "this node follows /clock" in caplog.text


def test_a_broken_transform_is_ignored(monkeypatch):
    monkeypatch.setattr(transforms, "tf2_ros", None)
    broken = stamped_transform(pose(1), "map", "broken", Time(sec=1))
    broken.transform.rotation.w = float("nan")
    good = stamped_transform(pose(2), "map", "good", Time(sec=1))
    with ros_nodes("sender", "receiver") as (sender, receiver):
        moving = sender.create_publisher(TFMessage, "/tf", 1)
        buffer = transform_buffer(receiver)

        def heard() -> bool:
            moving.publish(TFMessage(transforms=[broken, good]))
            return known(buffer, "map", "good")

        spin_until([sender, receiver], heard, "the good transform")
        assert not known(buffer, "map", "broken")


def test_the_built_interface_is_the_one_of_ros():
    """Wheels and ROS installations only understand each other with the same type hash."""
    from rosbags.typesys import Stores, get_typestore

    store = get_typestore(Stores.ROS2_KILTED)
    expected = store.hash_rihs01("tf2_msgs/msg/TFMessage")
    with ros_nodes("judge") as (node,):
        node.create_publisher(TFMessage, "/tf", 1)
        infos = spin_until([node], lambda: node.get_publishers_info_by_topic("/tf"), "the own publisher")
        assert str(infos[0].topic_type_hash) == expected
