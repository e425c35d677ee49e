"""Covariances of messages: their layout, their units, and that nothing unknown is passed off as certain."""

from __future__ import annotations

import numpy as np
import pytest
from builtin_interfaces.msg import Time
from mapping_helpers import mapper_of
from ros_helpers import parameters_of, spin_until
from scipy.linalg import block_diag
from scipy.spatial.transform import Rotation
from std_msgs.msg import Header
from tiny import synthetic_frames, tiny_network
from walks import bundled

from stac_ros import topics
from stac_ros.camera_info import CameraCalibration
from stac_ros.covariances import UNTOLD
from stac_ros.images import encode_image
from stac_ros.outputs import Outputs
from stac_ros.pose_messages import OdometryMessages, pose_message, pose_with_covariance

TURN, PLACE = 0.01, 0.09
VARIANCE = np.array([TURN, PLACE])
PERIOD = 0.25  # seconds


def matrix(covered) -> np.ndarray:
    return np.array(covered.covariance).reshape(6, 6)


def stamped(step: int) -> Header:
    return Header(stamp=Time(nanosec=int(1e9 * PERIOD) * step), frame_id="camera")


def images(count: int) -> list:
    return [encode_image(image, "rgb8", stamped(i)) for i, image in enumerate(synthetic_frames(count))]


def odometry(steps: int, variance) -> list:
    said, pose = OdometryMessages(), np.eye(4)
    covered = pose_with_covariance(pose_message(pose), variance)
    moved = [None, *[pose] * (steps - 1)]
    return [said.next(stamped(step), "camera", covered, moved[step], variance) for step in range(steps)]


def test_places_come_before_turns_and_all_axes_are_alike():
    """Scipy turns the covariance into any other frame, where it is the same."""
    found = matrix(pose_with_covariance(pose_message(np.eye(4)), VARIANCE))
    assert np.allclose(np.diag(found), 3 * [PLACE] + 3 * [TURN])
    turn = Rotation.random(None, np.random.default_rng(2)).as_matrix()
    both = block_diag(turn, turn)
    assert np.allclose(both @ found @ both.T, found)
    assert np.array_equal(found, found.T) and (np.linalg.eigvalsh(found) > 0).all()


def test_velocities_vary_as_steps_do_over_their_time():
    first, second = odometry(2, VARIANCE)
    assert np.allclose(np.diag(matrix(first.twist)), UNTOLD)  # standing still is not certain
    assert np.allclose(np.diag(matrix(second.twist)), np.repeat([PLACE, TURN], 3) / PERIOD**2)
    assert np.allclose(np.diag(matrix(second.pose)), np.repeat([PLACE, TURN], 3))


def test_what_is_unknown_is_zero_and_what_is_not_finite_says_nothing():
    for message in odometry(2, None):
        assert not matrix(message.pose).any() and not matrix(message.twist).any()
    found = matrix(pose_with_covariance(pose_message(np.eye(4)), np.array([TURN, np.nan])))
    assert np.allclose(np.diag(found), 3 * [UNTOLD] + 3 * [TURN])


def heard_of(frames, points) -> tuple[list, list]:
    """What a listener hears of frames: poses and odometry."""
    heard: tuple[list, list] = [], []
    with parameters_of() as (node, parameters):
        outputs = Outputs(node, parameters, CameraCalibration())
        for topic, found in zip((topics.POSE, topics.ODOMETRY), heard, strict=True):
            node.create_subscription(topic.type, topic.name, found.append, topic.qos())
            spin_until([node], lambda topic=topic: outputs.has_subscribers(topic), "the subscription")
        for frame, added in zip(frames, points, strict=True):
            outputs.publish(frame, added)
        spin_until([node], lambda: min(map(len, heard)) == len(frames), "all messages")
    return heard


def test_the_bundled_model_says_how_uncertain_it_is_in_lengths_of_the_map():
    found = []
    for factor in (1.0, 3.0):
        with mapper_of(bundled(), scale__mode="fixed", scale__factor=factor) as (mapper, notes, _):
            mapper.process(images(3))
        found.append(heard_of(notes.frames, notes.points))
    for one, other in zip(*(poses + odometry for poses, odometry in found), strict=True):
        before, after = matrix(one.pose), matrix(other.pose)
        assert (np.linalg.eigvalsh(before) > 0).all()
        assert np.allclose(after, before * np.repeat([9, 1], 3))
    twists = [[matrix(message.twist) for message in odometry] for _, odometry in found]
    assert np.allclose(twists[1][1:], twists[0][1:] * np.repeat([9, 1], 3))
    assert (np.linalg.eigvalsh(twists[0]) > 0).all() and (np.diag(twists[0][0]) == UNTOLD).all()


@pytest.mark.parametrize("topic", [0, 1])
def test_another_network_says_nothing(topic):
    with mapper_of(tiny_network()) as (mapper, notes, _):
        mapper.process(images(2))
    for message in heard_of(notes.frames, notes.points)[topic]:
        assert not matrix(message.pose).any()
        assert topic == 0 or not matrix(message.twist).any()
