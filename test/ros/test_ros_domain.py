"""A private domain is nobody else's: neither that of another command nor that of the user."""

from __future__ import annotations

import tempfile

from stac_ros.domain import private_ros_environment


def test_a_private_domain_is_neither_shared_nor_the_users(monkeypatch, tmp_path):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.setenv("ROS_DOMAIN_ID", "2")
    found = [private_ros_environment() for _ in range(3)]
    assert [one["ROS_DOMAIN_ID"] for one in found] == ["1", "3", "4"]
    assert {one["ROS_AUTOMATIC_DISCOVERY_RANGE"] for one in found} == {"LOCALHOST"}
