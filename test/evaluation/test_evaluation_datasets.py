"""Every reader on a sample in its dataset's true layout, written here, and on real recordings."""

import json
import os
from collections.abc import Callable
from pathlib import Path

import cv2
import numpy as np
import pytest
from evaluation.evaluation_scene import PERIOD_NS, tiny_frames, write_depth, write_image, write_text

from stac_core.evaluation.datasets import Frame, find_scenes, open_sequence
from stac_core.evaluation.evaluate import main
from stac_core.evaluation.results import read_rows
from stac_core.evaluation.trajectory import Trajectory, write_tum
from stac_core.ply import write_ply

DATA = Path(os.environ.get("STAC_TEST_DATA", Path(__file__).resolve().parents[3] / "shared" / "data"))


def write_seven_scenes(root: Path, frames: list[Frame]) -> Path:
    folder = root / "chess" / "seq-01"
    for index, frame in enumerate(frames):
        write_image(folder / f"frame-{index:06d}.color.png", frame.image)
        write_depth(folder / f"frame-{index:06d}.depth.png", frame.depth_m, 1000, invalid=65535)
        write_text(folder / f"frame-{index:06d}.pose.txt", frame.world_from_camera)
    return folder


def write_tum_rgbd(root: Path, frames: list[Frame], name: str = "rgbd_dataset_freiburg3_desk") -> Path:
    folder = root / name
    rgb, depth = ["# timestamp filename"], ["# timestamp filename"]
    for frame in frames:
        stamp = f"{frame.stamp_ns // 10**9}.{frame.stamp_ns % 10**9 // 1000:06d}"
        later = f"{frame.stamp_ns // 10**9}.{frame.stamp_ns % 10**9 // 1000 + 7000:06d}"
        write_image(folder / "rgb" / f"{stamp}.png", frame.image)
        write_depth(folder / "depth" / f"{later}.png", frame.depth_m, 5000)
        rgb.append(f"{stamp} rgb/{stamp}.png")
        depth.append(f"{later} depth/{later}.png")
    (folder / "rgb.txt").write_text("\n".join(rgb))
    (folder / "depth.txt").write_text("\n".join(depth))
    stamps = np.array([frame.stamp_ns + 3_000_000 for frame in frames])
    write_tum(folder / "groundtruth.txt", Trajectory(stamps, np.array([f.world_from_camera for f in frames])))
    return folder


def write_bonn(root: Path, frames: list[Frame]) -> Path:
    return write_tum_rgbd(root, frames, "rgbd_bonn_balloon")


def write_nrgbd(root: Path, frames: list[Frame]) -> Path:
    folder, rows = root / "breakfast_room", []
    for index, frame in enumerate(frames):
        write_image(folder / "images" / f"img{index}.png", frame.image)
        write_depth(folder / "depth" / f"depth{index}.png", frame.depth_m, 1000)
        rows.append(frame.world_from_camera @ np.diag([1, -1, -1, 1]))
    write_text(folder / "poses.txt", np.concatenate(rows))
    (folder / "focal.txt").write_text("20.5\n")
    return folder


def write_dtu(root: Path, frames: list[Frame]) -> Path:
    folder = root / "scan1"
    for index, frame in enumerate(frames):
        write_image(folder / "images" / f"{index:08d}.jpg", frame.image)
        camera_from_world = np.linalg.inv(frame.world_from_camera)
        camera_from_world[:3, 3] *= 1000
        lines = ["extrinsic", *(" ".join(f"{x:.12g}" for x in row) for row in camera_from_world), ""]
        lines += ["intrinsic", *(" ".join(f"{x:.12g}" for x in row) for row in frame.intrinsics), ""]
        (folder / "cams").mkdir(exist_ok=True)
        (folder / "cams" / f"{index:08d}_cam.txt").write_text("\n".join([*lines, "425.0 2.5"]))
        (folder / "depths").mkdir(exist_ok=True)
        np.save(folder / "depths" / f"{index:08d}.npy", frame.depth_m * 1000)
    return folder


def write_scannet(root: Path, frames: list[Frame]) -> Path:
    folder = root / "scene0000_00"
    for index, frame in enumerate(frames):
        write_image(folder / "color" / f"{index}.jpg", cv2.resize(frame.image, None, fx=2, fy=2))
        write_depth(folder / "depth" / f"{index}.png", frame.depth_m, 1000)
        write_text(folder / "pose" / f"{index}.txt", frame.world_from_camera)
    camera = np.eye(4)
    camera[:3, :3] = np.diag([2, 2, 1]) @ frames[0].intrinsics
    write_text(folder / "intrinsic" / "intrinsic_color.txt", camera)
    return folder


def write_sintel(root: Path, frames: list[Frame]) -> Path:
    training = root / "training"
    for index, frame in enumerate(frames, 1):
        write_image(training / "final" / "alley_2" / f"frame_{index:04d}.png", frame.image)
        for kind in ("depth", "camdata_left"):
            (training / kind / "alley_2").mkdir(parents=True, exist_ok=True)
        tag = np.float32(202021.25).tobytes()
        size = np.array(frame.depth_m.shape[::-1], "<i4").tobytes()
        (training / "depth" / "alley_2" / f"frame_{index:04d}.dpt").write_bytes(
            tag + size + frame.depth_m.astype("<f4").tobytes()
        )
        camera = np.concatenate(
            [frame.intrinsics.ravel(), np.linalg.inv(frame.world_from_camera)[:3].ravel()]
        )
        (training / "camdata_left" / "alley_2" / f"frame_{index:04d}.cam").write_bytes(
            tag + camera.astype("<f8").tobytes()
        )
    return training / "final" / "alley_2"


def write_kitti_odometry(root: Path, frames: list[Frame]) -> Path:
    folder, rows = root / "sequences" / "00", []
    offset = np.array([0.06, 0.0, 0.001])  # the colour camera stands beside the grey one
    projection = np.hstack([frames[0].intrinsics, (frames[0].intrinsics @ offset)[:, None]])
    camera2_from_camera0 = np.eye(4)
    camera2_from_camera0[:3, 3] = offset
    for index, frame in enumerate(frames):
        write_image(folder / "image_2" / f"{index:06d}.png", frame.image)
        rows.append((frame.world_from_camera @ camera2_from_camera0)[:3].ravel())
    zeros = " ".join(["0"] * 12)
    numbers = " ".join(f"{x:.12g}" for x in projection.ravel())
    (folder / "calib.txt").write_text(f"P0: {zeros}\nP1: {zeros}\nP2: {numbers}\nP3: {zeros}\n")
    write_text(folder / "times.txt", np.arange(len(frames)) * PERIOD_NS / 1e9)
    write_text(root / "poses" / "00.txt", np.array(rows))
    return folder


def write_kitti_depth(root: Path, frames: list[Frame]) -> Path:
    drive = root / "2011_09_26_drive_0002_sync"
    for index, frame in enumerate(frames):
        write_image(drive / "image_02" / "data" / f"{index + 5:010d}.png", frame.image)
        write_depth(drive / "proj_depth/groundtruth/image_02" / f"{index + 5:010d}.png", frame.depth_m, 256)
    write_image(drive / "image_02" / "data" / "0000000000.png", frames[0].image)  # has no annotation
    return drive


def spoil(file: Path, old: str, new: str) -> None:
    file.write_text(file.read_text().replace(old, new))


def write_case(root: Path, frames: list[Frame]) -> Path:
    folder, rows = root / "office", []
    for index, frame in enumerate(frames):
        write_image(folder / "rgb" / f"{index:06d}.png", frame.image)
        write_depth(folder / "depth" / f"{index:06d}.png", frame.depth_m, 1000)
        rows.append({"rgb": f"rgb/{index:06d}.png", "depth": f"depth/{index:06d}.png",
                     "T_wc": frame.world_from_camera.tolist()})  # fmt: skip
    k = frames[0].intrinsics
    camera = {"fx": k[0, 0], "fy": k[1, 1], "cx": k[0, 2], "cy": k[1, 2]}
    (folder / "case.json").write_text(
        json.dumps({"camera": camera, "gt": {"depth_scale": 1000}, "frames": rows})
    )
    return folder


WRITERS: dict[str, Callable[[Path, list[Frame]], Path]] = {
    "7scenes": write_seven_scenes,
    "tum": write_tum_rgbd,
    "bonn": write_bonn,
    "nrgbd": write_nrgbd,
    "dtu": write_dtu,
    "scannet": write_scannet,
    "sintel": write_sintel,
    "kitti": write_kitti_odometry,
    "case": write_case,
}
NOMINAL_CAMERA = {"7scenes", "tum", "bonn", "nrgbd"}  # the dataset states one camera for all scenes
LOSSY = {"dtu", "scannet"}  # JPEG


@pytest.mark.parametrize("kind", WRITERS)
@pytest.mark.parametrize("named", [True, False])
def test_a_sample_in_the_true_layout_reads_back(tmp_path, kind, named):
    frames = tiny_frames(11)
    sequence = open_sequence(WRITERS[kind](tmp_path, frames), kind if named else "auto")
    assert len(sequence) == len(frames)
    stamps = [sequence.frame(index).stamp_ns for index in range(len(frames))]
    assert np.all(np.diff(stamps) > 0)
    for index in (0, 2, 10):
        read, written = sequence.frame(index), frames[index]
        np.testing.assert_allclose(read.world_from_camera, written.world_from_camera, atol=1e-6)
        if kind not in LOSSY:
            np.testing.assert_array_equal(read.image, written.image)
        assert read.image.shape == written.image.shape
        if kind == "kitti":
            assert read.depth_m is None
        else:
            np.testing.assert_allclose(read.depth_m, written.depth_m, atol=5e-4)
        if kind not in NOMINAL_CAMERA:
            np.testing.assert_allclose(read.intrinsics, written.intrinsics, rtol=1e-6)


def test_kitti_depth_uses_only_annotated_frames(tmp_path):
    frames = tiny_frames(3)
    sequence = open_sequence(write_kitti_depth(tmp_path, frames), "kitti")
    assert len(sequence) == 3
    np.testing.assert_allclose(sequence.frame(1).depth_m, frames[1].depth_m, atol=1 / 256)
    np.testing.assert_array_equal(sequence.frame(0).image, frames[0].image)


def test_gathered_kitti_depth_reads_as_the_drive_it_came_from(tmp_path):
    frames, drive = tiny_frames(3), "2011_09_26_drive_0002_sync_02"
    for index, frame in enumerate(frames):
        name = f"{index + 5:010d}.png"
        write_image(tmp_path / "image_gathered" / drive / name, frame.image)
        write_depth(tmp_path / "groundtruth_depth_gathered" / drive / name, frame.depth_m, 256)
    sequence = open_sequence(tmp_path / "image_gathered" / drive)
    assert len(sequence) == 3
    np.testing.assert_array_equal(sequence.frame(2).image, frames[2].image)
    np.testing.assert_allclose(sequence.frame(2).depth_m, frames[2].depth_m, atol=1 / 256)


def test_dtu_may_keep_depth_as_pfm_with_masks_and_the_scanned_surface(tmp_path):
    frames = tiny_frames(2)
    folder = write_dtu(tmp_path, frames)
    for index, frame in enumerate(frames):
        (folder / "depths" / f"{index:08d}.npy").unlink()
        rows = (frame.depth_m[::-1] * 1000).astype("<f4")  # from the bottom up; -1 = little endian
        head = f"Pf\n{rows.shape[1]} {rows.shape[0]}\n-1.0\n".encode()
        (folder / "depths" / f"{index:08d}.pfm").write_bytes(head + rows.tobytes())
        mask = np.zeros((*frame.depth_m.shape, 3), np.uint8)
        mask[:, 4:] = 255
        write_image(folder / "binary_masks" / f"{index:08d}.png", mask)
    surface = np.random.default_rng(0).normal(size=(50, 3))
    write_ply(folder / "points.ply", surface * 1000)
    sequence = open_sequence(folder, "dtu")
    read = sequence.frame(1).depth_m
    assert not read[:, :4].any()
    np.testing.assert_allclose(read[:, 4:], frames[1].depth_m[:, 4:], atol=1e-6)
    np.testing.assert_allclose(sequence.cloud(), surface, atol=1e-6)


def test_seven_scenes_prefers_depth_seen_by_the_colour_camera(tmp_path):
    frames = tiny_frames(2)
    folder = write_seven_scenes(tmp_path, frames)
    write_depth(folder / "frame-000001.depth.proj.png", 2 * frames[1].depth_m, 1000, invalid=65535)
    read = [open_sequence(folder).frame(index) for index in range(2)]
    assert [frame.intrinsics[0, 0] for frame in read] == [585, 525]
    np.testing.assert_allclose(read[1].depth_m, 2 * frames[1].depth_m, atol=1e-3)


def test_tum_joins_lists_by_stamp_and_leaves_gaps(tmp_path):
    folder = write_tum_rgbd(tmp_path, tiny_frames(4))
    lines = (folder / "depth.txt").read_text().splitlines()
    (folder / "depth.txt").write_text("\n".join(lines[:2] + lines[3:]))
    sequence = open_sequence(folder)
    assert [sequence.frame(i).depth_m is None for i in range(4)] == [False, True, False, False]


def test_depth_beyond_what_is_judged_is_not_in_the_true_cloud_either(tmp_path):
    """A sky far away would have all points aligned by its own."""
    rows = []
    for sky in (0.0, 5000.0):
        frames = tiny_frames(3, 56, 70)
        for frame in frames:
            frame.depth_m[:9] = sky
        scene = write_sintel(tmp_path / f"sky{sky:g}", frames)
        output = tmp_path / f"out{sky:g}"
        flags = ["--size", "70", "--eval_cpu", "--output_dir", str(output)]
        assert main(["recon", str(scene), *flags]) == 0
        rows += read_rows(output / "embedded" / "rows.jsonl")
    for column in ("recon_scale", "points", "accuracy_mean", "completeness_mean", "f_score"):
        assert rows[1][column] == rows[0][column]


def test_truth_of_another_clock_is_told(tmp_path, caplog):
    """Else it would seem that there is none."""
    folder = write_tum_rgbd(tmp_path, tiny_frames(3))
    write_tum(folder / "groundtruth.txt", Trajectory(np.arange(3) * 10**9, np.tile(np.eye(4), (3, 1, 1))))
    sequence = open_sequence(folder)
    assert sequence.frame(0).world_from_camera is None and sequence.frame(0).depth_m is not None
    assert "groundtruth.txt: none of 3 stamps lies within 0.02 s of an image" in caplog.text
    assert "depth.txt" not in caplog.text


def test_frames_without_depth_take_the_size_of_the_others(tmp_path):
    """A stream has one size."""
    folder = write_tum_rgbd(tmp_path, tiny_frames(3))
    for depth in (folder / "depth").iterdir():
        write_depth(depth, np.full((6, 8), 2.0), 5000)
    (folder / "depth.txt").write_text((folder / "depth.txt").read_text().rpartition("\n")[0])
    frames = [open_sequence(folder).frame(index) for index in range(3)]
    assert [frame.image.shape for frame in frames] == [(6, 8, 3)] * 3 and frames[2].depth_m is None
    np.testing.assert_array_equal(frames[2].intrinsics, frames[0].intrinsics)


def test_depth_of_another_view_is_refused_where_it_is_measured(tmp_path, capsys):
    """Turned on its side, say: an image pressed into its size would show another world."""
    scene = write_case(tmp_path, tiny_frames(3, 56, 70))
    for depth in (scene / "depth").iterdir():
        write_depth(depth, np.full((70, 56), 2.0), 1000)
    flags = ["--size", "70", "--eval_cpu", "--output_dir", str(tmp_path / "out")]
    assert main(["depth", str(scene), "--eval_cam", *flags]) == 1
    told = capsys.readouterr()
    assert "(56, 70) and true depth (70, 56) differ in shape" in told.err and "ATE" in told.out


def test_lost_poses_are_absent(tmp_path):
    folder = write_scannet(tmp_path, tiny_frames(2))
    write_text(folder / "pose" / "1.txt", np.full((4, 4), -np.inf))
    assert open_sequence(folder).frame(1).world_from_camera is None


def test_image_folders_read_in_natural_order(tmp_path):
    frames = tiny_frames(11)
    for index, frame in enumerate(frames):
        write_image(tmp_path / "7scenes" / "chess" / "images" / f"img{index}.png", frame.image)
    for kind in ("images", "7scenes", "auto"):
        sequence = open_sequence(tmp_path / "7scenes" / "chess", kind)
        np.testing.assert_array_equal(sequence.frame(10).image, frames[10].image)
    assert [p.name for p in find_scenes(tmp_path / "7scenes", "7scenes")] == ["chess"]


def test_hidden_files_and_folders_are_no_images(tmp_path):
    frames = tiny_frames(2, 24, 32)
    for name, frame in zip(("m²3.png", "m²12.png"), frames, strict=True):  # of digits only ², no decimal
        write_image(tmp_path / name, frame.image)
    (tmp_path / "._m²3.png").write_bytes(b"beside it")
    (tmp_path / "x.png").mkdir()
    scene = open_sequence(tmp_path)
    assert [f.image.name for f in scene.frames] == ["m²3.png", "m²12.png"]
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty" / ".png.png").touch()
    with pytest.raises(ValueError, match="no images in it"):
        open_sequence(tmp_path / "empty")


@pytest.mark.parametrize("name", ["1²3", "٣", "①2"])
def test_any_name_may_be_sorted(tmp_path, name):
    write_image(tmp_path / f"{name}.png", tiny_frames(1, 24, 32)[0].image)
    assert len(open_sequence(tmp_path)) == 1


def test_video_frames_come_in_any_order(tmp_path):
    path = tmp_path / "walk.avi"
    writer = cv2.VideoWriter(str(path), cv2.VideoWriter.fourcc(*"MJPG"), 10, (64, 48))
    for index in range(8):
        writer.write(np.full((48, 64, 3), (10, 20, 30 * index), np.uint8))
    writer.release()
    sequence = open_sequence(path)
    for index in (0, 1, 7, 3):
        frame = sequence.frame(index)
        assert abs(int(frame.image[24, 32, 0]) - 30 * index) < 8  # red, through JPEG
        assert frame.stamp_ns == index * PERIOD_NS
    (tmp_path / "broken.avi").write_bytes(path.read_bytes()[:500])
    with pytest.raises(ValueError, match=r"broken\.avi"):
        open_sequence(tmp_path / "broken.avi")


def test_scenes_are_found_below_a_root(tmp_path):
    write_seven_scenes(tmp_path, tiny_frames(1))
    write_sintel(tmp_path / "sintel", tiny_frames(1))
    assert [p.name for p in find_scenes(tmp_path, "7scenes")] == ["seq-01"]
    assert [p.name for p in find_scenes(tmp_path / "sintel", "sintel")] == ["alley_2"]


def test_scenes_in_single_files_are_found_however_they_are_called(tmp_path):
    names = ["WALK.MP4", "walk.mp4", "drive.mcap", "drive.db3"]
    for name in (*names, "notes.txt", "cloud.ply"):
        (tmp_path / name).touch()
    assert sorted(p.name for p in find_scenes(tmp_path)) == sorted(names)
    assert [p.name for p in find_scenes(tmp_path, "video")] == ["WALK.MP4", "walk.mp4"]


@pytest.mark.parametrize(
    ("kind", "harm", "says"),
    [
        ("7scenes", lambda p: (p / "frame-000001.depth.png").unlink(), "frame-000001.depth.png: missing"),
        ("7scenes", lambda p: (p / "frame-000001.pose.txt").write_text("1 2 3"), "3 numbers"),
        ("nrgbd", lambda p: (p / "depth" / "depth1.png").unlink(), "3 depth maps"),
        ("nrgbd", lambda p: (p / "poses.txt").write_text("1 0 0 0\n" * 5), "5 lines"),
        ("dtu", lambda p: (p / "cams" / "00000001_cam.txt").write_text("nothing"), "extrinsic"),
        (
            "sintel",
            lambda p: next((p.parents[1] / "depth").rglob("*0002.dpt")).write_bytes(b"12345678"),
            "tag",
        ),
        ("kitti", lambda p: write_text(p.parents[1] / "poses" / "00.txt", np.zeros((2, 12))), "2 poses"),
        ("scannet", lambda p: write_image(p / "depth" / "1.png", np.zeros((4, 4, 3), np.uint8)), "16-bit"),
        ("tum", lambda p: (p / "rgb.txt").write_text("12.5\n"), r"rgb.txt:1"),
        ("tum", lambda p: (p / "rgb.txt").write_text("nan rgb/1.png\n"), r"rgb.txt:1"),
        ("tum", lambda p: (p / "rgb.txt").write_text("1403636579763555584 1\n"), r"rgb.txt:1: .* seconds"),
        ("nrgbd", lambda p: (p / "poses.txt").write_text("a 0 0 0\n" * 16), "poses.txt"),
        ("case", lambda p: (p / "case.json").write_text("{}"), "not a case"),
        ("case", lambda p: spoil(p / "case.json", '"rgb"', '"t": NaN, "rgb"'), "not a case.* no stamp"),
        ("case", lambda p: spoil(p / "case.json", '"rgb"', '"stamp_ns": 1.5, "rgb"'), "not a case.*1.5"),
        ("case", lambda p: (p / "rgb" / "000001.png").write_bytes(b"no"), "damaged"),
    ],
)
def test_damage_is_named(tmp_path, kind, harm, says):
    folder = WRITERS[kind](tmp_path, tiny_frames(4))
    harm(folder)
    with pytest.raises((ValueError, OSError), match=says):
        open_sequence(folder, kind).frame(1)


@pytest.mark.parametrize(
    ("told", "stamp_ns"),
    [
        ({"t": "1341841279.582200123"}, 1341841279582200123),
        ({"t": 1341841279.5822}, 1341841279582200000),  # as files written so far: the digits that are there
        ({"t": 12}, 12_000_000_000),
        ({"t": 1.0666666666666667}, 1_066_666_667),
        ({"t": 12.25, "stamp_ns": 12_250_000_001}, 12_250_000_001),
        ({"t": None}, 33_333_333),
    ],
)
def test_stamps_of_a_case_are_exact(tmp_path, told, stamp_ns):
    folder = write_case(tmp_path, tiny_frames(2))
    case = json.loads((folder / "case.json").read_text())
    case["frames"][1] |= told
    (folder / "case.json").write_text(json.dumps(case))
    assert open_sequence(folder).frame(1).stamp_ns == stamp_ns


def test_unknown_places_and_kinds_are_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match="nowhere"):
        open_sequence(tmp_path / "nowhere")
    with pytest.raises(ValueError, match="none of the known layouts"):
        open_sequence(tmp_path)
    with pytest.raises(ValueError, match="choose one of auto"):
        open_sequence(tmp_path, "lidar")


@pytest.mark.parametrize("name", ["hololens_office_start", "tum_fr3_cabinet"])
def test_real_recordings_have_truth_that_belongs_together(name):
    """Depth of one frame, moved by the poses, agrees with the depth measured two frames on."""
    if not (DATA / name).is_dir():
        pytest.skip(f"no sample recordings at {DATA}")
    sequence = open_sequence(DATA / name)
    first, second = sequence.frame(10), sequence.frame(12)
    v, u = np.nonzero(first.depth_m)
    z = first.depth_m[v, u]
    rays = np.linalg.inv(first.intrinsics) @ np.stack([u, v, np.ones_like(u)])
    points = np.vstack([rays * z, np.ones_like(z)])
    moved = (np.linalg.inv(second.world_from_camera) @ first.world_from_camera @ points)[:3]
    pixels = (second.intrinsics @ moved / moved[2])[:2].round().astype(int)
    height, width = second.depth_m.shape
    inside = (moved[2] > 0) & (pixels >= 0).all(0) & (pixels[0] < width) & (pixels[1] < height)
    measured = second.depth_m[pixels[1, inside], pixels[0, inside]]
    error = np.abs(moved[2, inside] - measured)[measured > 0] / measured[measured > 0]
    assert len(sequence) == 40
    assert np.median(error) < 0.03
