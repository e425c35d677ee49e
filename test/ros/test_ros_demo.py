"""The whole path as a user starts it: replay → node → recorder, three processes over DDS."""

from __future__ import annotations

import json
import signal
from pathlib import Path

import cv2
import numpy as np
import pytest
from ros_helpers import Child, ros_nodes, spin_until
from ros_recordings import BAG_START_NS, PERIOD_NS, write_bag

from stac_ros.topics import NODE_NAME

FRAMES = 6


@pytest.fixture(scope="module")
def mapped_bag(tmp_path_factory) -> tuple[Path, str]:
    folder = tmp_path_factory.mktemp("demo")
    bag = write_bag(folder / "bag", FRAMES)
    with Child("stac_ros.starter", "demo", f"source:={bag}", f"record:={folder / 'out'}") as demo:
        assert demo.wait(180) == 0, demo.output
    return folder / "out", demo.output


def test_the_demo_ends_by_itself_with_every_frame_mapped(mapped_bag):
    folder, _ = mapped_bag
    stamps = [BAG_START_NS + index * PERIOD_NS for index in range(FRAMES)]
    lines = (folder / "trajectory.tum").read_text().splitlines()
    assert [line.split()[0] for line in lines] == [f"{s // 10**9}.{s % 10**9:09d}" for s in stamps]
    names = sorted(file.stem for file in (folder / "depth").iterdir())
    assert names == [line.split()[0] for line in lines]


def test_depth_has_the_cameras_own_size(mapped_bag):
    folder, _ = mapped_bag
    for file in (folder / "depth").iterdir():
        depth = cv2.imread(str(file), cv2.IMREAD_UNCHANGED)
        assert depth.shape == (56, 84) and depth.dtype == np.uint16 and (depth > 0).any()


def test_the_map_holds_coloured_points(mapped_bag):
    folder, _ = mapped_bag
    header, body = (folder / "map.ply").read_bytes().split(b"end_header\n")
    count = int(header.split(b"element vertex ")[1].split()[0])
    points = np.frombuffer(body, np.dtype([("xyz", "<f4", 3), ("rgb", "u1", 3)]))
    assert len(points) == count > 100
    assert np.isfinite(points["xyz"]).all() and points["rgb"].std() > 5


def test_weights_and_memory_are_told(mapped_bag):
    folder, said = mapped_bag
    told = json.loads((folder / "diagnostics.json").read_text())
    assert told["last"]["inference"]["values"]["weights"]
    assert told["last"]["inference"]["values"]["images mapped"] == str(FRAMES)
    assert told["last"]["inference"]["values"]["chunks"] == "1 of 4, 1 of 2", "whole chunks, then the rest"
    assert told["memory"][-1]["cache_bytes"] > 0
    assert "weights" in said and "report.png" in said
    assert cv2.imread(str(folder / "report.png")) is not None


def test_one_that_cannot_start_ends_all_with_its_reason(tmp_path):
    bag = write_bag(tmp_path / "bag", 2)
    words = ("demo", f"source:={bag}", f"record:={tmp_path / 'out'}", "device:=abacus")
    with Child("stac_ros.starter", *words) as demo:
        assert demo.wait(120) != 0
        assert "abacus" in demo.output and "Traceback" not in demo.output


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_live_run_stays_until_it_is_told_to_end(tmp_path, number):
    words = ("up", "namespace:=robot1", f"record:={tmp_path / 'out'}", "log_level:=warn")
    with ros_nodes("witness", namespace="/robot1") as (node,), Child("stac_ros.starter", *words) as live:
        wanted = {(NODE_NAME, "/robot1"), ("stac_record", "/robot1")}
        spin_until([node], lambda: wanted <= set(node.get_node_names_and_namespaces()), "both nodes", 90)
        live.signal(number)
        assert live.wait() == 0, live.output
    assert "No frame was mapped: nothing was written" in live.output
