"""Diagnostics: levels, figures, and the watchdog's causes and cures with real publishers."""

from __future__ import annotations

import logging
from dataclasses import replace

import pytest
from builtin_interfaces.msg import Time
from diagnostic_msgs.msg import DiagnosticArray, DiagnosticStatus
from ros_helpers import ros_nodes, spin_until
from sensor_msgs.msg import CompressedImage, Image, PointCloud2

from stac_core import SessionStats
from stac_core.cache.stats import CacheStats
from stac_ros.diagnostics import (
    ERROR,
    OK,
    STALE,
    WARN,
    Facts,
    InputState,
    MapState,
    diagnostic_array,
    failure,
)
from stac_ros.logs import log_to_ros
from stac_ros.run_statistics import Snapshot, Statistics
from stac_ros.topics import COMPRESSED_IMAGE, qos_profile
from stac_ros.watchdog import Watchdog

FACTS = Facts(
    "robot/stac_mapping", "embedded", "bundled model, step 12", "cuda:0", "bfloat16", "cuda:0, 2 threads",
    "0.1.0", "images by X",
)  # fmt: skip
SOURCE = InputState(topic="/image", publishers=1, complaint="", waiting=2, paused=False, searching=False)
COUNTS = Snapshot(
    received=50, rate_hz=10.25, age_s=0.0312, mapped=40, dropped={"mailbox full": 8},
    events={"new streams": 1}, chunks={3: 1, 4: 9, 1: 1}, steps_ms=[100.0] * 95 + [400.0] * 5,
    mapping_ms=[20.0, 30.0], failed=0, failing=False, last_error="", last_error_age_s=0.0,
)  # fmt: skip
SESSION = SessionStats(
    CacheStats(frames_seen=40, live_bytes=12345, members={1: 7, 2: 3}), 7, 2, 0, 90, 1.0, 20.0, 2.5
)
MAP = MapState(
    points=1000, bytes=40000, voxel_size=0.01, coarsened=False, points_outside=0, poses=40, scale="none: …",
    intrinsics="predicted",
)  # fmt: skip


def report(facts=FACTS, source=SOURCE, counts=COUNTS, previous=COUNTS, session=SESSION, map_state=MAP):
    """Part → (level, message, values)."""
    message = diagnostic_array(Time(sec=7), facts, source, counts, previous, session, map_state)
    assert message.header.stamp == Time(sec=7)
    return {
        status.name.removeprefix("robot/stac_mapping: "): (
            status.level,
            status.message,
            {pair.key: pair.value for pair in status.values},
        )
        for status in message.status
    }


def test_a_healthy_node_is_ok_and_tells_its_figures():
    found = report(previous=replace(COUNTS, mapped=31))
    assert {part: level for part, (level, _, _) in found.items()} == dict.fromkeys(
        ("input", "inference", "memory", "map"), OK
    )
    assert found["input"][2] | {"rate [Hz]": "10.25", "dropped: mailbox full": "8"} == found["input"][2]
    assert found["input"][2]["age of the last image [s]"] == "0.03"
    assert found["input"][2]["events: new streams"] == "1" and found["input"][2]["images waiting"] == "2"
    message, values = found["inference"][1:]
    assert message == "9 images mapped since the last report" and values["last error"] == "none"
    assert (values["step mean [ms]"], values["step p95 [ms]"], values["step max [ms]"]) == (
        "115.0",
        "115.0",
        "400.0",
    )
    assert values["mapping mean [ms]"] == "25.0"
    assert values["chunks"] == "9 of 4, 1 of 3, 1 of 1" and values["chunks failed"] == "0"
    assert values["weights"] == "bundled model, step 12" and values["libraries"] == "images by X"
    assert values["machine"] == "cuda:0, 2 threads" and values["version"] == "0.1.0"
    memory = found["memory"][2]
    assert memory["cache.live_bytes"] == "12345" and memory["cache.members.2"] == "3"
    assert memory["settle_ms"] == "2.5" and memory["submaps"] == "7" and memory["loops"] == "2"
    assert found["map"][2]["voxel_size"] == "0.01" and found["map"][2]["scale"] == "none: …"


@pytest.mark.parametrize(
    ("part", "level", "text", "changes"),
    [
        ("input", STALE, "nobody", {"source": replace(SOURCE, publishers=0, complaint="nobody")}),
        ("input", WARN, "silent", {"source": replace(SOURCE, complaint="silent")}),
        ("input", OK, "paused", {"source": replace(SOURCE, paused=True)}),
        (
            "input",
            WARN,
            "4 images left out since the last report: 3 bad image (size), 1 no odometry",
            {"counts": replace(COUNTS, dropped={"bad image (size)": 5, "bad image (encoding)": 2,
                                                "no odometry": 1, "inference": 2},
                               last_error="inference: out of memory"),
             "previous": replace(COUNTS, dropped={"bad image (size)": 2, "bad image (encoding)": 2})},
        ),
        ("input", WARN, "2 publishers on /image, whose images would mix: stop one, or remap `image` to",
         {"source": replace(SOURCE, publishers=2)}),
        ("input", WARN, "stop one, or remap `image` to the topic of one camera; "
         "3 images left out since the last report: 1 bad image (size), 2 late",
         {"source": replace(SOURCE, publishers=2),
          "counts": replace(COUNTS, dropped={"mailbox full": 9, "late": 2, "bad image (size)": 1})}),
        ("input", WARN, "5 images left out since the last report: 3 duplicate, 2 size",
         {"counts": replace(COUNTS, dropped={"mailbox full": 8, "paused": 4, "duplicate": 3, "size": 2})}),
        ("inference", WARN, "random weights", {"facts": replace(FACTS, weights="random weights, seed 0: …")}),
        ("inference", ERROR, "the last chunk failed: inference: boom",
         {"counts": replace(COUNTS, failing=True, last_error="inference: boom")}),
        ("map", WARN, "voxels are 0.02 now; raise map.voxel_size",
         {"map_state": replace(MAP, coarsened=True, voxel_size=0.02)}),
        ("memory", WARN,
         "the limit of 70000 bytes is reached: 4 voxels have become part of wider ones, 9 tokens are "
         "forgotten; raise cache.memory_budget or cache.host_budget",
         {"session": replace(SESSION, cache=CacheStats(byte_limit=70_000, coarsened_voxels=4, forgotten=9))}),
    ],
)  # fmt: skip
def test_trouble_shows_in_the_level_and_the_message(part, level, text, changes):
    found = report(**changes)
    assert found[part][0] == level and text in found[part][1]


def test_a_failure_is_found_in_a_report_though_later_chunks_succeed():
    counts = replace(COUNTS, failed=1, failing=False, last_error="inference: boom")
    for now, told in ((counts, "the mapping node failed to map a chunk: inference: boom"), (COUNTS, "")):
        assert failure(diagnostic_array(Time(), FACTS, SOURCE, now, COUNTS, SESSION, MAP)) == told
    assert failure(DiagnosticArray(status=[DiagnosticStatus(name="another node")])) == ""


def test_old_bad_images_do_not_worry_for_ever():
    counts = replace(COUNTS, dropped={"bad image (size)": 5})
    assert report(counts=counts, previous=counts)["input"][0] == OK


@pytest.fixture
def nodes():
    with ros_nodes("driver", "mapping") as nodes:
        yield nodes


def watchdog_of(node, qos: str, silence_s: float = 0.0) -> tuple[Watchdog, Statistics]:
    statistics = Statistics()
    subscription = node.create_subscription(Image, "image", lambda message: None, qos_profile(qos, 1))
    alternatives = {COMPRESSED_IMAGE: "set input.compressed to true"}
    return Watchdog(node, subscription, silence_s, alternatives), statistics


def test_nobody_publishes(nodes):
    watchdog, statistics = watchdog_of(nodes[1], "sensor_data")
    complaint = watchdog.complaint(statistics.snapshot())
    assert "no image on /image for more than 0 s: nobody publishes it; start the camera" in complaint
    assert watchdog.publishers == 0


def test_only_compressed_images_are_published(nodes):
    watchdog, statistics = watchdog_of(nodes[1], "sensor_data")
    nodes[0].create_publisher(CompressedImage, "image/compressed", 1)
    spin_until(nodes, lambda: nodes[1].count_publishers("image/compressed"), "the publisher")
    assert "/image/compressed is published: set input.compressed" in watchdog.complaint(statistics.snapshot())


@pytest.mark.parametrize(
    ("sent", "cure"),
    [
        (CompressedImage, "set input.compressed to true and remap `image/compressed` to it"),
        (PointCloud2, "choose a topic of images"),
    ],
)
def test_a_publisher_of_another_type_is_named(nodes, sent, cure):
    """Whatever its quality of service. It is another process: one cannot have two types under one name."""
    watchdog, statistics = watchdog_of(nodes[1], "reliable")
    with ros_nodes("camera") as (camera,):
        camera.create_publisher(sent, "image", qos_profile("sensor_data", 1))

        def complaint() -> str:
            return watchdog.complaint(statistics.snapshot())

        spin_until(nodes, lambda: "camera sends" in complaint(), "the publisher and its name")
        complained = complaint()
    told = f"camera sends sensor_msgs/msg/{sent.__name__} and this node wants sensor_msgs/msg/Image; "
    assert told + cure in complained and "QoS" not in complained


def test_a_publisher_of_another_quality_is_named(nodes):
    watchdog, statistics = watchdog_of(nodes[1], "reliable")
    nodes[0].create_publisher(Image, "image", qos_profile("sensor_data", 1))
    spin_until(nodes, lambda: watchdog.publishers, "the publisher")
    complaint = watchdog.complaint(statistics.snapshot())
    assert "QoS mismatch, driver sends best effort" in complaint and "image_qos to sensor_data" in complaint


def test_a_publisher_that_is_not_heard_names_the_size_limit(nodes, caplog):
    caplog.set_level(logging.WARNING)
    watchdog, statistics = watchdog_of(nodes[1], "sensor_data")
    nodes[0].create_publisher(Image, "image", qos_profile("sensor_data", 1))
    spin_until(nodes, lambda: watchdog.publishers, "the publisher")
    for _ in range(3):
        complaint = watchdog.complaint(statistics.snapshot())
    assert "0.5 MB" in complaint and "FASTDDS_DEFAULT_PROFILES_FILE naming config/fastdds.xml" in complaint
    assert "--shm-size=1g" in complaint
    assert caplog.text.count("no image on /image") == 1, "once per silence"
    statistics.arrived()
    assert "has stopped sending" in watchdog.complaint(statistics.snapshot())


def test_no_complaint_while_images_arrive(nodes):
    watchdog, statistics = watchdog_of(nodes[1], "sensor_data", silence_s=1000.0)
    assert watchdog.complaint(statistics.snapshot()) == "", "it has only just begun"
    statistics.arrived()
    assert watchdog.complaint(statistics.snapshot()) == ""


def test_what_the_core_logs_reaches_rosout(nodes, monkeypatch):
    heard: list = []
    from rcl_interfaces.msg import Log

    nodes[0].create_subscription(Log, "/rosout", heard.append, 100)
    source = logging.getLogger("stac_core")
    for name, value in (("handlers", []), ("propagate", True), ("level", logging.NOTSET)):
        monkeypatch.setattr(source, name, value)
        monkeypatch.setattr(logging.getLogger("stac_ros"), name, value)
    log_to_ros(nodes[1].get_logger())
    spin_until(nodes, lambda: nodes[1].count_subscribers("/rosout"), "the subscriber of /rosout")

    def told() -> set[tuple[int, str]]:
        for level in (logging.INFO, logging.WARNING, logging.ERROR):
            logging.getLogger("stac_core.somewhere").log(level, "level %d", level)
        return {
            (message.level[0] if isinstance(message.level, bytes) else message.level, message.msg)
            for message in heard
        }

    expected = {(20, "level 20"), (30, "level 30"), (40, "level 40")}
    spin_until(nodes, lambda: told() >= expected, "three messages on /rosout")
