"""`stac-eval bag` end to end: bags made here, the real node in its own process, outside judges."""

import dataclasses
import json
import os
import subprocess
import sys
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
LOOP = "world:5,frames=24,height=112,width=154,kind=room,path=loop"
SOURCES = [LOOP, "hololens_office_start", "tum_fr3_cabinet"]
FRAME = "camera_optical_frame"


def open_source(name: str) -> Sequence:
    if name.startswith("world:"):
        return open_sequence(name)
    if not (DATA / name).is_dir():
        pytest.skip(f"no sample recordings at {DATA}")
    return open_sequence(DATA / name)


def write_bag(path: Path, sequence: Sequence, frames: int, compressed: bool = False) -> Path:
    """Raw or compressed images, calibration, depth in millimetres and true odometry of the camera itself."""
    with BagWriter(path) as bag:
        for index in range(min(frames, len(sequence))):
            frame = sequence.frame(index)
            stamp = frame.stamp_ns + 10**9
            frame = dataclasses.replace(frame, stamp_ns=stamp)
            if compressed:
                kind, image = "CompressedImage", compressed_message(frame.image, stamp, FRAME)
            else:
                kind, image = "Image", image_message(frame.image, stamp, "rgb8", FRAME)
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


@pytest.mark.parametrize("source", SOURCES)
def test_the_report_says_what_the_judges_find_in_the_recorded_answer(tmp_path, source):
    bag = write_bag(
        tmp_path / "bag", open_source(source), frames=16, compressed=source.startswith("hololens")
    )
    flags = ["--size", "98", "--device", "cpu", "--model_name", "box"]
    done = stac_eval("bag", bag, "--output_dir", tmp_path / "out", *flags)
    assert done.returncode == 0, done.stderr
    (row,) = read_rows(tmp_path / "out" / "rows.jsonl")
    (folder,) = (path for path in (tmp_path / "out").iterdir() if path.is_dir())
    answer = folder / "result"
    report = json.loads((folder / "report.json").read_text())
    assert report["not judged"] == {} and row["frames_used"] == row["frames_sent"] == 16

    write_poses(tmp_path / "truth.tum", bag, "/true/odom")
    write_poses(tmp_path / "estimate.tum", answer, "/stac_mapping/odom")
    assert report["pose"]["ate_rmse"] == pytest.approx(evo("evo_ape", tmp_path, "-as")["rmse"], abs=1e-6)
    expected = abs_rel(answer, "/stac_mapping/depth", bag, "/true/depth")
    assert report["depth"]["abs_rel"] == pytest.approx(expected, abs=1e-6)
    assert 0 < report["latency"]["latency_median_ms"] <= report["latency"]["latency_max_ms"]
    assert report["memory"]["cache_mib_max"] > 0
    assert len(messages(answer, "/stac_mapping/points")) == 16
    assert (folder / "report.html").read_text().count("data:image/png;base64,") >= 8


def test_a_node_that_cannot_start_is_told_and_nothing_hangs(tmp_path):
    bag = write_bag(tmp_path / "bag", open_source(LOOP), frames=2)
    flags = ["--checkpoint", tmp_path / "missing.pt", "--device", "cpu"]
    done = stac_eval("bag", bag, "--output_dir", tmp_path / "out", *flags)
    assert done.returncode == 1
    assert "missing.pt" in done.stderr and "the mapping node" in done.stderr
    assert not (tmp_path / "out" / "rows.jsonl").exists()
