"""A calibration that was sent once, before the node, and is kept for whoever comes later."""

from __future__ import annotations

import itertools

import numpy as np
from node_helpers import HEIGHT, WIDTH, NodeProcess, Observer, header, images
from ros_helpers import ros_nodes

from stac_ros import topics
from stac_ros.camera_messages import calibration_message
from stac_ros.topics import qos_profile


def test_a_latched_calibration_is_heard_by_a_node_that_starts_later():
    intrinsics = np.array([[61.0, 0, 31], [0, 62, 23], [0, 0, 1]])
    settings = {"input.camera_info_qos": "latched", "input.image_qos": "reliable"}
    with ros_nodes("observer") as (node,):
        info = node.create_publisher(
            topics.CAMERA_INFO.type, f"/late/{topics.CAMERA_INFO.name}", qos_profile("latched", 1)
        )
        info.publish(calibration_message(intrinsics, HEIGHT, WIDTH, header(0)))
        with NodeProcess("late", settings) as process:
            observer = Observer(node, process, topics.IMAGE, qos_profile("reliable", 10))
            observer.wait_until_ready()
            observer.spin_until(lambda: info.get_subscription_count() > 0, "the node to find the calibration")
            stamps = itertools.count(100)
            observer.diagnostics_when(
                lambda now: now["map"]["intrinsics"] == "camera_info",
                lambda: observer.map_images(*images(1, next(stamps))),
            )
