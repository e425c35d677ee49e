"""`stac-eval bag` end to end: bags made here, the real node in its own process, outside judges."""

import dataclasses
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from evaluation.evaluation_judges import abs_rel, evo, messages, write_poses
from evaluation.evaluation_scene import BagWriter, camera_info, compressed_message, image_message, odometry

from stac_core.evaluation.datasets import Sequence, open_sequence
from stac_core.evaluation.results import read_rows

rclpy = pytest.importorskip("rclpy", reason="the replay needs ROS 2")
pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]

DATA = Path(os.environ.get("STAC_TEST_DATA", Path(__file__).resolve().parents[3] / "shared" / "data"))
# A lap of 40 frames and a little more: the camera comes back to where it began.
LOOP = "world:5,frames=44,height=112,width=154,kind=room,path=loop,motion=forward,step_min=0.08,stops=0"
SOURCES = [LOOP, "hololens_office_start", "tum_fr3_cabinet"]
FRAME = "camera_optical_frame"


def open_source(name: str) -> Sequence:
    if name.startswith("world:"):
        return open_sequence(name)
    if not (DATA / name).is_dir():
        pytest.skip(f"no sample recordings at {DATA}")
    return open_sequence(DATA / name)


def write_bag(
    path: Path, sequence: Sequence, frames: int = 1000, compressed: bool = False, broken: int = -1
) -> Path:
    """Raw or compressed images, calibration, depth in millimetres and true odometry of the camera itself.

    broken: number of an image whose encoding nobody knows.
    """
    with BagWriter(path) as bag:
        for index in range(min(frames, len(sequence))):
            frame = sequence.frame(index)
            stamp = frame.stamp_ns + 10**9
            frame = dataclasses.replace(frame, stamp_ns=stamp)
            if compressed:
                kind, image = "CompressedImage", compressed_message(frame.image, stamp, FRAME)
            else:
                encoding = "unheard of" if index == broken else "rgb8"
                kind, image = "Image", image_message(frame.image, stamp, encoding, FRAME)
            bag.write("/rgb", f"sensor_msgs/msg/{kind}", image, stamp)
            bag.write("/camera_info", "sensor_msgs/msg/CameraInfo", camera_info(frame, FRAME), stamp)
            millimetres = np.round(np.minimum(frame.depth_m, 60) * 1000).astype(np.uint16)
            depth = image_message(millimetres, stamp, "16UC1", FRAME)
            bag.write("/true/depth", "sensor_msgs/msg/Image", depth, stamp)
            bag.write(
                "/true/odom", "nav_msgs/msg/Odometry", odometry(frame.world_from_camera, stamp, FRAME), stamp
            )
    return path


def stac_eval(*arguments: object) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "stac_core.evaluation.evaluate", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=800)


def test_the_synthetic_camera_comes_back():
    sequence = open_sequence(LOOP)
    centres = np.array([sequence.frame(index).world_from_camera[:3, 3] for index in (0, 10, 20, 30, 40)])
    far = np.linalg.norm(centres - centres[0], axis=1)
    assert far[4] < 0.05 * far[1:4].min()


@pytest.mark.parametrize("source", SOURCES)
def test_the_report_says_what_the_judges_find_in_the_recorded_answer(tmp_path, source):
    sequence = open_source(source)
    bag = write_bag(tmp_path / "bag", sequence, compressed=source.startswith("hololens"))
    flags = ["--size", "98", "--device", "cpu", "--model_name", "box"]
    done = stac_eval("bag", bag, "--output_dir", tmp_path / "out", *flags)
    assert done.returncode == 0, done.stderr
    (row,) = read_rows(tmp_path / "out" / "rows.jsonl")
    (folder,) = (path for path in (tmp_path / "out").iterdir() if path.is_dir())
    answer = folder / "result"
    report = json.loads((folder / "report.json").read_text())
    assert report["not judged"] == {} and row["frames_used"] == row["frames_sent"] == len(sequence)

    write_poses(tmp_path / "truth.tum", bag, "/true/odom")
    write_poses(tmp_path / "estimate.tum", answer, "/stac_mapping/path")
    assert report["pose"]["ate_rmse"] == pytest.approx(evo("evo_ape", tmp_path, "-as")["rmse"], abs=1e-6)
    expected = abs_rel(answer, "/stac_mapping/depth", bag, "/true/depth")
    assert report["depth"]["abs_rel"] == pytest.approx(expected, abs=1e-6)
    assert 0 < report["latency"]["latency_median_ms"] <= report["latency"]["latency_max_ms"]
    assert report["memory"]["cache_mib_max"] > 0
    assert len(messages(answer, "/stac_mapping/points")) == len(sequence)
    assert (folder / "report.html").read_text().count("data:image/png;base64,") >= 8


def test_the_same_bag_gives_the_same_answer_again(tmp_path):
    """Bit by bit, whatever else the computer does, with a broken image and a last chunk that is not full."""
    bag = write_bag(tmp_path / "bag", open_source(LOOP), frames=11, broken=3)
    flags = ["--size", "98", "--device", "cpu"]
    rows = []
    for number, busy in enumerate([False, True]):
        out = tmp_path / f"out{number}"
        burner = subprocess.Popen([sys.executable, "-c", "while True: pass"]) if busy else None
        try:
            done = stac_eval("bag", bag, "--output_dir", out, *flags)
        finally:
            if burner:
                burner.kill()
                burner.wait()
        assert done.returncode == 0, done.stderr
        (answer,) = out.glob("*/result")
        write_poses(out / "trajectory.tum", answer, "/stac_mapping/odom")
        rows += read_rows(out / "rows.jsonl")
    paths = [(tmp_path / f"out{number}" / "trajectory.tum").read_bytes() for number in range(2)]
    assert paths[0] == paths[1] and paths[0].count(b"\n") == 10
    assert rows[0]["chunks"] == "1 of 4, 2 of 3"
    depend_on_time = ("latency", "seconds", "frames_per_second", "memory")  # that of a sample each second
    for name, value in rows[0].items():
        assert name.startswith(depend_on_time) or rows[1][name] == value, name


def test_a_node_that_cannot_start_is_told_and_nothing_hangs(tmp_path):
    bag = write_bag(tmp_path / "bag", open_source(LOOP), frames=2)
    flags = ["--checkpoint", tmp_path / "missing.pt", "--device", "cpu"]
    done = stac_eval("bag", bag, "--output_dir", tmp_path / "out", *flags)
    assert done.returncode == 1
    assert "missing.pt" in done.stderr and "the mapping node" in done.stderr
    assert not (tmp_path / "out" / "rows.jsonl").exists()


def test_a_node_that_fails_at_every_chunk_is_told_at_the_first(tmp_path):
    bag = write_bag(tmp_path / "bag", open_source(LOOP))
    flags = [
        "--memory_budget",
        "1000",
        "--limit_s",
        "3600",
        "--device",
        "cpu",
        "--output_dir",
        tmp_path / "out",
    ]
    done = stac_eval("bag", bag, *flags)
    assert done.returncode == 1
    assert "failed to map a chunk: inference: ValueError: " in done.stderr and "memory_budget" in done.stderr
    assert not (tmp_path / "out" / "rows.jsonl").exists()


# As `ros2 bag play` does: recorded names, bytes, stamps and pace, waiting for nobody.
PLAYER = """
import importlib, sys, time, rclpy
from pathlib import Path
from rosbags.highlevel import AnyReader
from rosbags.typesys import Stores, get_typestore

rclpy.init()
node = rclpy.create_node("rosbag2_player")
with AnyReader([Path(sys.argv[1])], default_typestore=get_typestore(Stores.ROS2_KILTED)) as reader:
    kinds = {c.topic: c.msgtype.split("/msg/") for c in reader.connections}
    types = {topic: getattr(importlib.import_module(p + ".msg"), kind) for topic, (p, kind) in kinds.items()}
    publishers = {topic: node.create_publisher(kind, topic, 10) for topic, kind in types.items()}
    time.sleep(5)  # as --delay 5: publishers and listeners find each other
    begin = time.monotonic_ns() - reader.start_time
    for connection, recorded, raw in reader.messages():
        time.sleep(max(0, recorded - time.monotonic_ns() + begin) / 1e9)
        publishers[connection.topic].publish(bytes(raw))
time.sleep(1)
"""


def start_eval(folder: Path, *arguments: object) -> subprocess.Popen:
    command = [sys.executable, "-m", "stac_core.evaluation.evaluate", *map(str, arguments)]
    return subprocess.Popen(command, stderr=(folder / "log").open("w"), start_new_session=True)


def wait_for(text: str, process: subprocess.Popen, folder: Path, limit_s: float = 180.0) -> None:
    """Until the process has said so."""
    end = time.monotonic() + limit_s
    while text not in (folder / "log").read_text():
        assert process.poll() is None and time.monotonic() < end, (folder / "log").read_text()
        time.sleep(0.1)


def test_the_node_does_not_know_who_plays(tmp_path):
    bag = write_bag(tmp_path / "bag", open_source(LOOP), frames=12)
    flags = ["--outside_player", "--size", "98", "--device", "cpu", "--output_dir", tmp_path / "out"]
    process = start_eval(tmp_path, "bag", bag, *flags)
    wait_for("play now", process, tmp_path)
    subprocess.run([sys.executable, "-c", PLAYER, str(bag)], check=True, timeout=120)
    assert process.wait(300) == 0, (tmp_path / "log").read_text()
    (row,) = read_rows(tmp_path / "out" / "rows.jsonl")
    (answer,) = (tmp_path / "out").glob("*/result")
    assert row["frames"] == 12 and row["frames_used"] >= 2
    write_poses(tmp_path / "truth.tum", bag, "/true/odom")
    write_poses(tmp_path / "estimate.tum", answer, "/stac_mapping/odom")
    assert row["ate_rmse"] == pytest.approx(evo("evo_ape", tmp_path, "-as")["rmse"], abs=1e-6)
    assert 0 < row["latency_median_ms"] <= row["latency_max_ms"]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_the_replay_and_keeps_what_was_answered(tmp_path, number):
    bag = write_bag(tmp_path / "bag", open_source(LOOP))
    flags = ["--rate", "0.1", "--size", "98", "--device", "cpu", "--output_dir", tmp_path / "out"]
    process = start_eval(tmp_path, "bag", bag, *flags, "--sweep", "cache.window_size=4,8")
    wait_for("subscribed to", process, tmp_path)
    time.sleep(6)
    process.send_signal(number)
    assert process.wait(120) == 130
    log = (tmp_path / "log").read_text()
    assert "interrupted before the end" in log and log.count("images mapped") == 1  # the node has ended, too
    (report,) = (tmp_path / "out").glob("*/report.json")
    assert 1 <= json.loads(report.read_text())["frames"]["frames_used"] < 44
    assert not (tmp_path / "out" / "rows.jsonl").exists()
