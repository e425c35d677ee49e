"""`stac-eval bag --result`: a recorded answer is judged as outside judges judge it."""

import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
from evaluation.evaluation_judges import abs_rel, evo, write_poses
from evaluation.evaluation_scene import (
    BagWriter,
    camera_info,
    cloud_message,
    diagnostics,
    header,
    image_message,
    odometry,
    path,
    pose_stamped,
    pose_with_covariance,
    tiny_frames,
)
from scipy.spatial.transform import Rotation

from stac_core.checkpoint import describe_weights
from stac_core.config import ModelConfig
from stac_core.evaluation import bag_command
from stac_core.evaluation.alignment import Similarity
from stac_core.evaluation.bag_result import BagResult
from stac_core.evaluation.evaluate import main
from stac_core.evaluation.results import read_rows
from stac_core.evaluation.score import unproject
from stac_core.version import version

IMAGE = "sensor_msgs/msg/Image"
MAP_FROM_WORLD = Similarity(
    Rotation.from_euler("xyz", [20, -35, 70], degrees=True).as_matrix(), np.array([1.0, 2, 3]), 0.4
)
EVERYWHERE = (slice(None), slice(None))


def write_recording(path: Path, truth: bool = True, seen: tuple[slice, slice] = EVERYWHERE) -> Path:
    """seen: the pixels [rows, columns] of the image that the true depth has."""
    with BagWriter(path) as bag:
        for frame in tiny_frames(12, 24, 32):
            stamp = frame.stamp_ns
            bag.write("/camera/image", IMAGE, image_message(frame.image, stamp, "rgb8"), stamp)
            bag.write("/camera/camera_info", "sensor_msgs/msg/CameraInfo", camera_info(frame), stamp)
            if truth:
                depth = np.round(frame.depth_m[seen] * 1000).astype(np.uint16)
                bag.write("/camera/depth", IMAGE, image_message(depth, stamp, "16UC1"), stamp)
                pose = pose_stamped(frame.world_from_camera, stamp)
                bag.write("/truth", "geometry_msgs/msg/PoseStamped", pose, stamp)
    return path


def write_answer(
    path: Path,
    others: bool = False,
    unanswered: tuple[int, ...] = (3, 7),
    weights: str = "random",
    about: dict[str, str] | None = None,
) -> Path:
    """What a node might say: another world and unit, some noise, some frames dropped.

    others: recorded as `ros2 bag record -a` would, with the images and what other nodes say.
    about: what else the node says of its inference.
    """
    random, now, points, colours = np.random.default_rng(0), 10**18, [], []
    with BagWriter(path) as bag:
        for index, frame in enumerate(tiny_frames(12, 24, 32)):
            stamp, now = frame.stamp_ns, now + 200_000_000
            if others:
                bag.write("/camera/image", IMAGE, image_message(frame.image, stamp, "rgb8"), now)
                wheels = odometry(frame.world_from_camera, stamp, "camera", "odom")
                bag.write("/a_robot/odom", "nav_msgs/msg/Odometry", wheels, now)
                battery = diagnostics({"heap_bytes": "77"}, stamp, "battery: memory")
                bag.write("/diagnostics", "diagnostic_msgs/msg/DiagnosticArray", battery, now)
            else:
                bag.write("/evaluation/image_sent", "std_msgs/msg/Header", header(stamp, ""), now)
            if index in unanswered:
                continue
            pose = MAP_FROM_WORLD.apply_poses(frame.world_from_camera[None])[0]
            pose[:3, 3] += random.normal(0, 0.005, 3)
            done = now + (50_000_000 if index else 150_000_000)
            posed = pose_with_covariance(pose, stamp)
            bag.write("/stac_mapping/pose", "geometry_msgs/msg/PoseWithCovarianceStamped", posed, done)
            bag.write(
                "/stac_mapping/odom", "nav_msgs/msg/Odometry", odometry(pose, stamp, "camera", "map"), done
            )
            depth = (frame.depth_m * 0.4 * random.lognormal(0, 0.05, frame.depth_m.shape)).astype(np.float32)
            depth[2, 3] = np.nan
            bag.write("/stac_mapping/depth", IMAGE, image_message(depth, stamp, "32FC1"), done)
            seen = unproject(frame.depth_m, frame.intrinsics, frame.world_from_camera)[frame.depth_m > 0]
            points.append(MAP_FROM_WORLD.apply(seen))
            colours.append(frame.image[frame.depth_m > 0])
            cloud = cloud_message(np.concatenate(points), np.concatenate(colours), stamp)
            bag.write("/stac_mapping/map_points", "sensor_msgs/msg/PointCloud2", cloud, done)
            said = {
                "cache.live_bytes": str(index * 2**20),
                "voxels": str(10 * index),
                "idle": "0",
            }
            bag.write("/diagnostics", "diagnostic_msgs/msg/DiagnosticArray", diagnostics(said, stamp), done)
            network = diagnostics({"weights": weights, **(about or {})}, stamp, "stac_mapping: inference")
            bag.write("/diagnostics", "diagnostic_msgs/msg/DiagnosticArray", network, done)
    return path


def report_of(output: Path) -> dict:
    """The only one there."""
    (file,) = output.glob("*/report.json")
    return json.loads(file.read_text(), parse_constant=pytest.fail)


@pytest.fixture(scope="module")
def judged(tmp_path_factory):
    """Folder with recording, answer and report."""
    folder = tmp_path_factory.mktemp("bag")
    recording, answer = write_recording(folder / "recording"), write_answer(folder / "answer")
    assert main(["bag", str(recording), "--result", str(answer), "--output_dir", str(folder / "out")]) == 0
    return folder


@pytest.fixture
def without_pictures(monkeypatch):
    """Drawing them takes most of the time: for runs whose pictures another test here has drawn."""
    monkeypatch.setattr(bag_command, "draw_pictures", lambda *_: ())


def test_pose_and_depth_figures_equal_the_outside_judges(judged):
    report = report_of(judged / "out")
    write_poses(judged / "truth.tum", judged / "recording", "/truth")
    write_poses(judged / "estimate.tum", judged / "answer", "/stac_mapping/odom")
    assert report["pose"]["ate_rmse"] == pytest.approx(evo("evo_ape", judged, "-as")["rmse"], abs=1e-6)
    rpe = evo("evo_rpe", judged, "-as", "--delta", "1")["rmse"]
    assert report["pose"]["rpe_rmse"] == pytest.approx(rpe, abs=1e-6)
    expected = abs_rel(judged / "answer", "/stac_mapping/depth", judged / "recording", "/camera/depth")
    assert report["depth"]["abs_rel"] == pytest.approx(expected, abs=1e-6)
    assert report["pose"]["scale"] == pytest.approx(1 / 0.4, rel=0.05)
    assert report["cloud"]["f_score"] > 0.9


def test_frames_latency_and_memory_are_counted(judged):
    report = report_of(judged / "out")
    assert report["frames"] | {"seconds": 0, "frames_per_second": 0} == {
        "frames": 12, "frames_sent": 12, "frames_used": 10, "frames_dropped": 2,
        "seconds": 0, "frames_per_second": 0,
    }  # fmt: skip
    assert report["latency"] == {
        "latency_median_ms": 50,
        "latency_p95_ms": pytest.approx(105),
        "latency_max_ms": 150,
    }
    assert report["memory"] == {
        "memory: cache.live_bytes (max)": 11 * 2**20,
        "memory: voxels (max)": 110,
        "cache_mib_max": 11,
    }


@pytest.mark.usefixtures("without_pictures")
def test_a_recording_of_everything_gives_the_same_figures(judged, tmp_path):
    """The images tell when they were sent; what other nodes say is left out."""
    answer = write_answer(tmp_path / "everything", others=True)
    recording = str(judged / "recording")
    assert main(["bag", recording, "--result", str(answer), "--output_dir", str(tmp_path / "out")]) == 0
    report = report_of(tmp_path / "out")
    expected = report_of(judged / "out")
    assert {**report, "measured": ""} == {**expected, "measured": ""}


def test_without_departures_the_latency_alone_is_not_judged(judged, tmp_path):
    with BagWriter(tmp_path / "poses") as bag:
        for index, frame in enumerate(tiny_frames(12, 24, 32)[:5]):
            pose = odometry(frame.world_from_camera, frame.stamp_ns, "camera", "map")
            bag.write("/stac_mapping/odom", "nav_msgs/msg/Odometry", pose, 10**18 + index * 10**9)
    arguments = ["--result", str(tmp_path / "poses"), "--output_dir", str(tmp_path / "out")]
    main(["bag", str(judged / "recording"), *arguments])
    report = report_of(tmp_path / "out")
    assert "neither the images nor when they were sent" in report["not judged"]["latency"]
    assert report["frames"] == {
        "frames": 12, "frames_sent": 12, "frames_used": 5, "frames_dropped": 7,
        "seconds": 4, "frames_per_second": 1.25,
    }  # fmt: skip


def test_the_page_needs_nothing_else(judged):
    (page,) = (file.read_text() for file in (judged / "out").glob("recording_*/report.html"))
    assert "http" not in page and "<script" not in page
    titles = re.findall(r'<img alt="([^"]+)" src="data:image/png;base64,', page)
    curves = ["Camera path", "Position error", "Rotation error", "Latency", "Memory", "Tokens and voxels"]
    assert titles == [*curves, "Map", "Depth"]


def test_a_bag_without_truth_keeps_its_costs_and_says_so(judged, capsys, tmp_path):
    bare = write_recording(tmp_path / "bare", truth=False)
    arguments = ["bag", str(bare), "--result", str(judged / "answer"), "--output_dir", str(tmp_path / "out")]
    assert main(arguments) == 1
    assert "no camera path" in capsys.readouterr().err
    report = report_of(tmp_path / "out")
    assert report["latency"]["latency_median_ms"] == 50
    assert set(report["not judged"]) == {"pose", "depth", "cloud"}
    assert main([*arguments, "--truth", "none"]) == 0
    assert "bare [defaults]: latency 50 ms, 10 of 12 frames" in capsys.readouterr().out


def test_an_answer_that_stands_still_is_named_and_the_rest_is_kept(judged, capsys, tmp_path):
    with BagWriter(tmp_path / "still") as bag:
        for frame in tiny_frames(12, 24, 32):
            still = odometry(np.eye(4), frame.stamp_ns, "camera", "map")
            bag.write("/stac_mapping/odom", "nav_msgs/msg/Odometry", still, frame.stamp_ns)
            depth = image_message(frame.depth_m, frame.stamp_ns, "32FC1")
            bag.write("/stac_mapping/depth", IMAGE, depth, frame.stamp_ns)
    arguments = ["--result", str(tmp_path / "still"), "--output_dir", str(tmp_path / "out")]
    assert main(["bag", str(judged / "recording"), *arguments]) == 1
    assert "pose: cannot align: all points of one side coincide" in capsys.readouterr().err
    report = report_of(tmp_path / "out")
    assert report["depth"]["abs_rel"] == pytest.approx(0, abs=1e-3)


@pytest.mark.usefixtures("without_pictures")
def test_a_recording_that_was_made_anew_is_judged_anew(judged, tmp_path):
    answer = write_answer(tmp_path / "answer")
    command = [
        "bag",
        str(judged / "recording"),
        "--result",
        str(answer),
        "--output_dir",
        str(tmp_path / "out"),
    ]
    assert main(command) == 0
    shutil.rmtree(answer)
    write_answer(answer, unanswered=(3, 4, 5, 7))
    assert main(command) == 0
    (row,) = read_rows(tmp_path / "out" / "rows.jsonl")
    assert row["frames_used"] == 8


@pytest.mark.usefixtures("without_pictures")
@pytest.mark.parametrize(("weights", "replays"), [("", 1), ("the model of last year, step 1", 2)])
def test_the_answer_of_other_weights_is_not_taken_for_that_of_these(
    judged, tmp_path, monkeypatch, weights, replays
):
    """Weights come with the software; their row must not outlive them."""
    made = []

    def replay(arguments, topic, overrides, recording):
        shutil.rmtree(recording, ignore_errors=True)
        write_answer(recording, weights=weights or describe_weights(ModelConfig()))
        made.append(recording)
        return 0

    monkeypatch.setattr(bag_command, "_replay", replay)
    command = ["bag", str(judged / "recording"), "--output_dir", str(tmp_path)]
    assert main(command) == main(command) == 0
    assert len(made) == replays


@pytest.mark.usefixtures("without_pictures")
@pytest.mark.parametrize(
    ("about", "ran_on", "made_by"),
    [
        ({}, "?, ?", "unknown, judged by {}"),
        ({"device": "cpu", "precision": "float32"}, "cpu, float32", "unknown, judged by {}"),
        ({"machine": "cpu, 2 threads", "version": "{}"}, "cpu, 2 threads", "{}"),
        ({"machine": "cuda:0", "version": "0.0.9"}, "cuda:0", "0.0.9, judged by {}"),
    ],
)
def test_a_row_names_the_versions_of_node_and_judge(judged, tmp_path, about, ran_on, made_by):
    """A recording may come from anywhere; earlier nodes said less."""
    about = {key: value.format(version()) for key, value in about.items()}
    answer = write_answer(tmp_path / "answer", about=about)
    command = ["bag", str(judged / "recording"), "--result", str(answer), "--output_dir", str(tmp_path)]
    assert main(command) == 0
    (row,) = read_rows(tmp_path / "rows.jsonl")
    assert (row["ran_on"], row["version"]) == (ran_on, made_by.format(version()))
    assert row["version"] in next(tmp_path.glob("*/report.html")).read_text()


def test_a_pose_that_is_no_number_is_named(judged, tmp_path, capsys):
    with BagWriter(tmp_path / "answer") as bag:
        for index, frame in enumerate(tiny_frames(12, 24, 32)):
            pose = odometry(frame.world_from_camera, frame.stamp_ns, "camera", "map")
            if index == 5:
                pose.pose.pose.position.x = float("nan")
            bag.write("/stac_mapping/odom", "nav_msgs/msg/Odometry", pose, 10**18 + index * 10**9)
    arguments = [
        "--result",
        str(tmp_path / "answer"),
        "--align",
        "none",
        "--output_dir",
        str(tmp_path / "out"),
    ]
    assert main(["bag", str(judged / "recording"), *arguments]) == 1
    assert "pose: a figure is not finite" in capsys.readouterr().err
    assert "pose" not in report_of(tmp_path / "out")  # which reads no NaN


def test_true_depth_of_another_size_is_seen_by_the_same_camera(judged, tmp_path):
    """The calibration is that of the images."""
    recording = write_recording(tmp_path / "half", seen=(slice(0, None, 2), slice(0, None, 2)))
    arguments = ["--result", str(judged / "answer"), "--output_dir", str(tmp_path / "out")]
    assert main(["bag", str(recording), *arguments]) == 0
    report = report_of(tmp_path / "out")
    assert report["cloud"]["recall"] > 0.8  # a sixth of the images was not answered
    assert main(["recon", str(recording), "--size", "70", "--eval_cpu", *arguments[2:]]) == 0


def test_true_depth_of_another_view_is_not_stretched(judged, tmp_path, capsys):
    recording = write_recording(tmp_path / "crop", seen=(slice(None), slice(0, 24)))
    arguments = ["--result", str(judged / "answer"), "--output_dir", str(tmp_path / "out")]
    assert main(["bag", str(recording), *arguments]) == 1
    told = capsys.readouterr().err
    assert "depth: predicted depth (24, 32) and true depth (24, 24) differ in shape" in told
    assert "cloud: predicted depth" in told
    assert main(["depth", str(recording), "--eval_cam", "--size", "70", "--eval_cpu", *arguments[2:]]) == 1
    told = capsys.readouterr()
    assert "differ in shape" in told.err and "ATE" in told.out


@pytest.mark.usefixtures("without_pictures")
def test_another_truth_is_another_row(judged, tmp_path):
    """What was judged by one path says nothing about another."""
    command = ["bag", str(judged / "recording"), "--result", str(judged / "answer")]
    for truth in ("", "none"):
        assert main([*command, "--output_dir", str(tmp_path), "--truth", truth]) == 0
    rows = read_rows(tmp_path / "rows.jsonl")
    assert ["ate_rmse" in row for row in rows] == [True, False]
    assert len(list(tmp_path.glob("*/report.html"))) == 2


@pytest.mark.usefixtures("without_pictures")
def test_bags_of_one_name_and_recordings_of_one_bag_have_their_own_reports(judged, tmp_path):
    command, output = ["bag", str(judged / "recording")], ["--output_dir", str(tmp_path / "out")]
    for number, unanswered in enumerate([(3,), (4, 5)]):
        answer = write_answer(tmp_path / f"answer{number}", unanswered=unanswered)
        assert main([*command, "--result", str(answer), *output]) == 0
    other = write_recording(tmp_path / "elsewhere" / "recording")
    for align in ("sim3", "se3"):
        assert main(["bag", str(other), "--result", str(answer), "--align", align, *output]) == 0
    reports = [json.loads(file.read_text()) for file in (tmp_path / "out").glob("*/report.json")]
    assert len(reports) == len(read_rows(tmp_path / "out" / "rows.jsonl")) == 4
    assert sorted(report["frames"]["frames_used"] for report in reports) == [10, 10, 10, 11]


@pytest.mark.usefixtures("without_pictures")
def test_a_folder_is_named_however_much_was_set(judged, tmp_path):
    """File systems know names of 255 bytes at most."""
    truth = tmp_path / ("é" * 100) / "path.tum"
    truth.parent.mkdir()
    write_poses(truth, judged / "recording", "/truth")
    command = ["bag", str(judged / "recording"), "--result", str(judged / "answer"), "--truth", str(truth)]
    assert main([*command, "--output_dir", str(tmp_path / "out")]) == 0
    assert report_of(tmp_path / "out")["pose"]


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        (["--rate", "nan"], "--rate nan: must be positive, or 0"),
        (["--rate", "-1"], "--rate -1: must be positive, or 0"),
        (["--rate", "inf"], "--rate inf: must be positive, or 0"),
        (["--limit_s", "nan"], "--limit_s nan: must be positive"),
        (["--limit_s", "0"], "--limit_s 0: must be positive"),
        (["--result", "/no/where"], "/no/where: no such bag"),
        (["--truth", "/no/where.tum"], "/no/where.tum"),
        (["--depth_topic", "/no/where"], "no depth topic '/no/where'; depth topics: /camera/depth"),
    ],
)
def test_mistakes_are_named_before_a_node_starts(judged, tmp_path, capsys, monkeypatch, flags, says):
    monkeypatch.setattr(bag_command, "_replay", lambda *_: pytest.fail("a node was started"))
    assert main(["bag", str(judged / "recording"), "--output_dir", str(tmp_path), *flags]) == 1
    assert says in capsys.readouterr().err


def test_modes_that_see_the_future_are_not_for_a_node(judged, capsys):
    assert main(["bag", str(judged / "recording"), "--sweep", "cache.mode=causal,full"]) == 1
    assert "'full' needs all images at once; a node streams: causal," in capsys.readouterr().err


def test_a_recording_without_an_answer_is_refused(judged, capsys):
    recording = str(judged / "recording")
    assert main(["bag", recording, "--result", recording, "--output_dir", str(judged / "none")]) == 1
    assert f"{recording}: holds no pose of the mapping node" in capsys.readouterr().err


def test_poses_are_judged_where_the_last_path_says_that_they_lie(tmp_path):
    """A loop that closes moves what came before: here all but the last pose, to where it truly was."""
    frames = tiny_frames(12, 24, 32)
    moved = {frame.stamp_ns: frame.world_from_camera for frame in frames}
    with BagWriter(tmp_path / "answer") as bag:
        for index, frame in enumerate(frames):
            drifted = frame.world_from_camera.copy()
            drifted[:3, 3] += 0.1 * (11 - index)
            said = pose_with_covariance(drifted, frame.stamp_ns)
            now = 10**18 + index
            bag.write("/stac_mapping/pose", "geometry_msgs/msg/PoseWithCovarianceStamped", said, now)
            last = {stamp: pose for stamp, pose in moved.items() if index == 11 and stamp != frame.stamp_ns}
            told = path(last or {frame.stamp_ns: drifted})
            bag.write("/stac_mapping/path", "nav_msgs/msg/Path", told, now)
    found = BagResult(tmp_path / "answer", "/camera/image").trajectory
    assert np.allclose(found.world_from_camera, [frame.world_from_camera for frame in frames], atol=1e-9)
