"""A second parent on /tf or /tf_static: whoever gives it is found and told of once, with what to do."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import numpy as np
import pytest
from ros_helpers import StaticTransformBroadcaster, ros_nodes, spin_until
from tf2_msgs.msg import TFMessage

from stac_ros import frame_parents
from stac_ros.frame_parents import OtherParents
from stac_ros.settings import FrameSettings
from stac_ros.stamps import stamp_message
from stac_ros.topics import TF
from stac_ros.transforms import TransformBroadcaster, stamped_transform


class Meeting:
    """A node with its check, and another node on the same /tf."""

    def __init__(self, node, other, settings: FrameSettings, caplog) -> None:
        self.node, self.other, self._caplog = node, other, caplog
        self.broadcaster = TransformBroadcaster(node)
        self.parents = OtherParents(node, self.broadcaster, settings)
        self._publisher = other.create_publisher(TF.type, TF.name, TF.qos())
        self._milliseconds = itertools.count(1)
        spin_until([node, other], lambda: self._publisher.get_subscription_count() == 1, "the check")

    def link(self, parent: str, child: str):
        return stamped_transform(np.eye(4), parent, child, stamp_message(next(self._milliseconds) * 10**6))

    def say(self, *links: tuple[str, str]) -> None:
        """The other node sends these, parent → child, in one message."""
        self._publisher.publish(TFMessage(transforms=[self.link(*link) for link in links]))

    def told(self, child: str, say: Callable[[], None] = lambda: None) -> str:
        """The warning that comes of what the other says."""

        def heard() -> str:
            say()
            self.parents.check(child)
            return self.warnings

        return spin_until([self.node], heard, "the warning")

    @property
    def warnings(self) -> str:
        """Of this check alone: others may have something to say on a busy computer."""
        records = self._caplog.records
        return "\n".join(record.getMessage() for record in records if record.name == frame_parents.__name__)


@contextmanager
def meeting(caplog, monkeypatch, **settings: str) -> Iterator[Meeting]:
    monkeypatch.setattr(frame_parents, "LOOK_EVERY_S", 0.0)
    with ros_nodes("stac_mapping", "amcl") as (node, other):
        yield Meeting(node, other, FrameSettings(**settings), caplog)


def test_a_camera_on_a_moving_head_has_a_parent_already(caplog, monkeypatch):
    with meeting(caplog, monkeypatch) as met:

        def speak() -> None:  # all but the camera's own link before it, so that one look tells the root
            met.say(("odom", "base"), ("left", "right"))
            met.say(("base", "pan"), ("pan", "tilt"))
            met.say(("tilt", "cam"))

        text = met.told("cam", speak)
        assert "cam has the parent tilt on /tf (from /amcl); map → cam is a second one" in text
        assert "set frames.odom to the odometry frame, or where there is none to odom, the root" in text
        speak()
        met.parents.check("cam")
        assert met.warnings == text, "told once"


@pytest.mark.parametrize("slash", ["", "/"])
def test_two_robots_that_share_tf_are_told_apart(caplog, monkeypatch, slash):
    with meeting(caplog, monkeypatch) as met:
        text = met.told("cam", lambda: met.say((f"{slash}map", f"{slash}cam")))
        assert "/amcl sends map → cam on /tf as well" in text and "own frames.map and frames.camera" in text


def test_two_robots_whose_cameras_share_a_name_are_told_to_part_them(caplog, monkeypatch):
    with meeting(caplog, monkeypatch, map="robot1/map") as met:
        text = met.told("cam", lambda: met.say(("robot2/map", "cam")))
        assert "another robot's camera, give this one a name of its own in frames.camera" in text


@pytest.mark.parametrize("parent", ["map", "earth"])
def test_somebody_else_who_corrects_odometry_is_named(parent, caplog, monkeypatch):
    with meeting(caplog, monkeypatch, odom="odom") as met:
        text = met.told("odom", lambda: met.say((parent, "odom")))
        assert f"/amcl sends {parent} → odom on /tf, this node map → odom" in text
        assert "AMCL: tf_broadcast false" in text and "frames.publish_tf to false" in text


@pytest.mark.parametrize("slash", ["", "/"])
def test_a_static_link_to_odometry_counts_too(caplog, monkeypatch, slash):
    with meeting(caplog, monkeypatch, odom="odom") as met:
        StaticTransformBroadcaster(met.other).send(met.link(f"{slash}map", f"{slash}odom"))
        assert "sends map → odom on /tf_static, this node map → odom" in met.told("odom")


def test_the_nodes_own_transforms_and_other_frames_are_no_conflict(caplog, monkeypatch):
    with meeting(caplog, monkeypatch, odom="odom") as met:
        for _ in range(500):  # more than are kept
            met.broadcaster.send(met.link("map", "odom"))
            met.say(("odom", "base"), ("odom", "xodom"))
            met.parents.check("odom")
        text = met.told("odom", lambda: met.say(("earth", "odom")))  # so all before has been heard
        assert "/amcl sends earth → odom" in text and text.count("→ odom on") == 1


def test_executors_are_left_alone(caplog, monkeypatch):
    """A thousand messages a second wake nobody: they wait to be looked at."""
    with meeting(caplog, monkeypatch) as met:
        met.say(("map", "cam"))
        with pytest.raises(AssertionError, match="in vain"):
            spin_until([met.node], lambda: False, "nothing", 0.3)
        assert "amcl sends map → cam" in met.told("cam")
