"""The command writes folders and bags that other readers understand, whole or not at all."""

from __future__ import annotations

import json
import os
import resource
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from rosbags.highlevel import AnyReader
from scipy.spatial.transform import Rotation

from stac_core.evaluation.datasets import open_sequence
from stac_core.evaluation.trajectory import read_tum
from stac_core.worlds import World, WorldConfig
from stac_core.worlds.export import ExportConfig, export_world, main
from stac_core.worlds.export_bag import BagSettings
from stac_core.worlds.export_folder import FolderSettings

FRAMES, HEIGHT, WIDTH, RATE = 5, 56, 70, 10.0
CONFIG = ExportConfig(seed=4, frames=FRAMES, height=HEIGHT, width=WIDTH, rate=RATE)
WORLD = WorldConfig(kind="room")
START_NS = CONFIG.start * 10**9


@pytest.fixture(scope="module")
def truth():
    return World(CONFIG.seed, WORLD).render(0, FRAMES, HEIGHT, WIDTH)


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("export")
    folder = root / "room", FolderSettings(image_format="png")
    export_world(CONFIG, WORLD, folder, (root / "recording", BagSettings(bag_images="both")))
    return root


def _images(truth) -> np.ndarray:
    return (truth.images[0] * 255).round().byte().permute(0, 2, 3, 1).numpy()


def test_folder_holds_images_depth_and_their_description(written: Path, truth) -> None:
    root = written / "room"
    case = json.loads((root / "case.json").read_text())
    assert case["frame_count"] == len(case["frames"]) == FRAMES
    camera = case["camera"]
    lens = truth.intrinsics[0, 0].double().numpy()
    assert np.allclose(
        [camera["fx"], camera["fy"], camera["cx"], camera["cy"]], lens[[0, 1, 0, 1], [0, 1, 2, 2]]
    )
    assert np.allclose(np.loadtxt(root / "intrinsics.txt"), lens)
    for index, row in enumerate(case["frames"]):
        image = cv2.cvtColor(cv2.imread(str(root / row["rgb"])), cv2.COLOR_BGR2RGB)
        assert np.array_equal(image, _images(truth)[index])
        depth = cv2.imread(str(root / row["depth"]), cv2.IMREAD_UNCHANGED)
        assert depth.dtype == np.uint16
        assert np.abs(depth / case["gt"]["depth_scale"] - truth.depth[0, index].numpy()).max() < 6e-4
        assert np.allclose(row["T_wc"], truth.world_from_camera[0, index].double().numpy(), atol=1e-8)
        assert abs(row["t"] - CONFIG.start - index / RATE) < 1e-6


def test_a_folder_keeps_stamps_to_the_nanosecond(tmp_path: Path) -> None:
    """As a floating-point number, a second of this century is about 200 ns wide."""
    moment = replace(CONFIG, start=1_700_000_000, rate=30.0)
    export_world(moment, WORLD, (tmp_path / "room", FolderSettings()))
    expected = [moment.start * 10**9 + round(index * 1e9 / 30) for index in range(FRAMES)]
    read = open_sequence(tmp_path / "room", "case")
    assert [read.frame(index).stamp_ns for index in range(FRAMES)] == expected
    assert read_tum(tmp_path / "room" / "groundtruth.txt").stamps_ns.tolist() == expected


def test_ground_truth_is_a_tum_trajectory(written: Path, truth) -> None:
    rows = np.loadtxt(written / "room" / "groundtruth.txt")
    assert rows.shape == (FRAMES, 8)
    assert np.allclose(rows[:, 1:4], truth.world_from_camera[0, :, :3, 3].numpy(), atol=1e-6)
    rotation = Rotation.from_quat(rows[:, 4:]).as_matrix()
    assert np.allclose(rotation, truth.world_from_camera[0, :, :3, :3].numpy(), atol=1e-6)


@pytest.fixture(scope="module")
def messages(written: Path) -> dict[str, list]:
    found: dict[str, list] = {}
    with AnyReader([written / "recording"]) as reader:
        for connection, stamp, raw in reader.messages():
            message = reader.deserialize(raw, connection.msgtype)
            found.setdefault(connection.topic, []).append((stamp, message))
    return found


def _stamp(header) -> int:
    return header.stamp.sec * 10**9 + header.stamp.nanosec


def test_bag_images_decode_to_what_was_rendered(messages: dict[str, list], truth) -> None:
    raw, compressed = messages["/camera/image_raw"], messages["/camera/image_raw/compressed"]
    depths = messages["/camera/depth/image_raw"]
    assert len(raw) == len(compressed) == len(depths) == FRAMES
    for index, (stamp, message) in enumerate(raw):
        assert stamp == _stamp(message.header) == START_NS + round(index * 1e9 / RATE)
        assert message.encoding == "rgb8" and message.step == 3 * WIDTH
        assert np.array_equal(message.data.reshape(HEIGHT, WIDTH, 3), _images(truth)[index])
    for index, (_, message) in enumerate(compressed):
        image = cv2.cvtColor(cv2.imdecode(message.data, cv2.IMREAD_COLOR), cv2.COLOR_BGR2RGB)
        assert np.abs(image.astype(int) - _images(truth)[index]).mean() < 8
        assert "jpeg" in message.format
    for index, (_, message) in enumerate(depths):
        assert message.encoding == "16UC1" and message.step == 2 * WIDTH
        depth = message.data.view("<u2").reshape(HEIGHT, WIDTH) / 1000
        assert np.abs(depth - truth.depth[0, index].numpy()).max() < 6e-4


def test_bag_camera_info_belongs_to_the_images(messages: dict[str, list], truth) -> None:
    infos = messages["/camera/camera_info"]
    assert [_stamp(m.header) for _, m in infos] == [
        _stamp(m.header) for _, m in messages["/camera/image_raw"]
    ]
    info = infos[0][1]
    assert (info.height, info.width) == (HEIGHT, WIDTH)
    assert np.allclose(info.k.reshape(3, 3), truth.intrinsics[0, 0].numpy())
    assert np.allclose(info.p.reshape(3, 4)[:, :3], info.k.reshape(3, 3)) and not info.d.any()


def _matrix(position, turn) -> np.ndarray:
    pose = np.eye(4)
    pose[:3, :3] = Rotation.from_quat([turn.x, turn.y, turn.z, turn.w]).as_matrix()
    pose[:3, 3] = position.x, position.y, position.z
    return pose


def test_bag_transforms_lead_to_the_camera(messages: dict[str, list], truth) -> None:
    mount = messages["/tf_static"][0][1].transforms[0]
    assert (mount.header.frame_id, mount.child_frame_id) == ("base_link", "camera_optical_frame")
    base_from_camera = _matrix(mount.transform.translation, mount.transform.rotation)
    for index, (_, message) in enumerate(messages["/tf"]):
        (link,) = message.transforms
        assert (link.header.frame_id, link.child_frame_id) == ("odom", "base_link")
        pose = _matrix(link.transform.translation, link.transform.rotation) @ base_from_camera
        assert np.allclose(pose, truth.world_from_camera[0, index].double().numpy(), atol=1e-6)
        odometry = messages["/odom"][index][1]
        place = odometry.pose.pose
        assert np.allclose(_matrix(place.position, place.orientation) @ base_from_camera, pose, atol=1e-9)


def test_bag_odometry_velocities_integrate_to_its_poses(messages: dict[str, list]) -> None:
    odometry = [message for _, message in messages["/odom"]]
    poses = [_matrix(m.pose.pose.position, m.pose.pose.orientation) for m in odometry]
    for before, after, message in zip(poses, poses[1:], odometry[1:], strict=False):
        linear, angular = message.twist.twist.linear, message.twist.twist.angular
        moved = after[:3, :3] @ np.array([linear.x, linear.y, linear.z]) / RATE
        assert np.allclose(before[:3, 3] + moved, after[:3, 3], atol=1e-6)
        turn = Rotation.from_rotvec(np.array([angular.x, angular.y, angular.z]) / RATE).as_matrix()
        assert np.allclose(before[:3, :3] @ turn, after[:3, :3], atol=1e-6)


def test_base_looks_along_its_x_axis(messages: dict[str, list], truth) -> None:
    base = _matrix(*(lambda t: (t.translation, t.rotation))(messages["/tf"][0][1].transforms[0].transform))
    assert np.allclose(base[:3, 0], truth.world_from_camera[0, 0, :3, 2].numpy(), atol=1e-6)
    assert base[2, 2] > 0.5  # z is up, give or take the camera's pitch


def test_topics_may_be_left_out_and_renamed(tmp_path: Path) -> None:
    settings = BagSettings(
        image_topic="/left/image", depth_topic="", odom_topic="", bag_images="compressed", base_frame="robot"
    )
    config = ExportConfig(frames=2, height=28, width=28)
    export_world(config, WORLD, bag=(tmp_path / "small", settings))
    with AnyReader([tmp_path / "small"]) as reader:
        expected = {"/left/image/compressed", "/camera/camera_info", "/tf", "/tf_static"}
        assert set(reader.topics) == expected


def test_a_target_that_exists_is_kept_unless_told_otherwise(tmp_path: Path, capsys) -> None:
    flags = ["--folder", str(tmp_path / "a"), "--frames", "2", "--height", "28", "--width", "28"]
    assert main(flags) == 0
    marker = tmp_path / "a" / "mine"
    marker.touch()
    assert main(flags) == 2
    assert "exists already" in capsys.readouterr().err and marker.exists()
    assert main([*flags, "--overwrite"]) == 0 and not marker.exists()
    assert os.listdir(tmp_path) == ["a"]


SMALLEST = ["--frames", "2", "--height", "28", "--width", "28"]


@pytest.mark.parametrize("target", ["..", "../photos", "../file"])
def test_what_is_no_world_is_never_replaced(target: str, tmp_path: Path, monkeypatch, capsys) -> None:
    for name in ("photos", "here"):
        (tmp_path / name).mkdir()
    (tmp_path / "photos" / "mine.jpg").touch()
    (tmp_path / "file").touch()
    monkeypatch.chdir(tmp_path / "here")
    assert main(["--folder", target, "--overwrite", *SMALLEST]) == 2
    assert "no world or bag" in capsys.readouterr().err
    assert sorted(os.listdir(tmp_path)) == ["file", "here", "photos"]
    assert os.listdir(tmp_path / "photos") == ["mine.jpg"] and not os.listdir(tmp_path / "here")


def test_a_world_behind_a_link_is_replaced_where_it_lies(tmp_path: Path) -> None:
    (tmp_path / "world").mkdir()
    (tmp_path / "link").symlink_to("world")
    assert main(["--folder", str(tmp_path / "link"), "--overwrite", *SMALLEST]) == 0
    assert (tmp_path / "link").is_symlink() and (tmp_path / "world" / "case.json").is_file()
    assert sorted(os.listdir(tmp_path)) == ["link", "world"]


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ([], "nothing to write"),
        (["--folder", "x", "--height", "100"], "height = 100"),
        (["--folder", "x", "--frames", "1"], "ExportConfig.frames = 1"),
        (["--folder", "x", "--rooms_x", "0"], "WorldConfig.rooms_x = 0"),
        (["--folder", "x", "--path", "explore", "--frames", "99999"], "the exploring path ends after"),
        (["--bag", "x", "--bag_quality", "0"], "BagSettings.bag_quality = 0"),
        (["--bag", "x", "--image_topic", ""], "BagSettings.image_topic = ''"),
        (["--bag", "x", "--camera_info_topic", "/camera/image_raw"], "the name of image_topic already"),
        (["--bag", "x", "--odom_topic", "/tf"], "BagSettings.odom_topic = '/tf'"),
        (["--bag", "x", "--odom_frame", "base_link"], "BagSettings.base_frame = 'base_link'"),
        (["--bag", "x", "--camera_frame", ""], "BagSettings.camera_frame = ''"),
        (["--folder", "x", "--device", "toaster"], "ExportConfig.device = 'toaster'"),
        (["--folder", "x", "--device", "cuda:99"], "ExportConfig.device = 'cuda:99'"),
        (["--folder", "x", "--bag", "x"], "choose two places"),
        (["--folder", "x", "--bag", "x/y"], "choose two places"),
    ],
)
def test_bad_flags_are_refused_with_name_and_value(
    flags: list[str], message: str, tmp_path: Path, monkeypatch, capsys
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(flags) != 0
    assert message in capsys.readouterr().err
    assert os.listdir(tmp_path) == []


def _run(arguments: list[str], **options) -> subprocess.Popen:
    command = [sys.executable, "-m", "stac_core.worlds.export", *arguments]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=environment, **options)


@pytest.mark.parametrize("target", ["--folder", "--bag"])
def test_a_full_disk_is_named_and_leaves_nothing(target: str, tmp_path: Path) -> None:
    def limit() -> None:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (3000, 3000))

    flags = [target, str(tmp_path / "out"), "--frames", "9", "--height", "56", "--width", "56"]
    process = _run(flags, preexec_fn=limit)
    _, error = process.communicate(timeout=120)
    assert process.returncode == 1
    assert "File too large" in error and "Traceback" not in error
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_an_interrupt_leaves_nothing(number: int, tmp_path: Path) -> None:
    process = _run(["--folder", str(tmp_path / "out"), "--frames", "5000", "--height", "56", "--width", "56"])
    assert process.stderr is not None
    while "frame/s" not in (text := process.stderr.read(64)) and text:
        pass  # the progress bar appears once writing has begun
    process.send_signal(number)
    _, error = process.communicate(timeout=60)
    assert process.returncode == 130 and "interrupted" in error
    assert os.listdir(tmp_path) == []


def test_depth_beyond_sixteen_bits_is_not_measured() -> None:
    from stac_core.worlds.recording import millimetres

    values = millimetres(np.array([0.0, 1.2344, 65.535, 65.6, 500.0], np.float32))
    assert values.tolist() == [0, 1234, 65535, 0, 0]


def test_export_does_not_move_the_random_state() -> None:
    torch.manual_seed(0)
    expected = torch.rand(3)
    torch.manual_seed(0)
    World(1, WORLD).render(0, 2, 28, 28)
    assert torch.equal(torch.rand(3), expected)
