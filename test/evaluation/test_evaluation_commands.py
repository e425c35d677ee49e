"""`stac-eval` as a user runs it: rows, resuming, sweeps, tables, and what it says when it cannot."""

import csv
import errno
import json
import os
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from evaluation.evaluation_scene import BagWriter, image_message, tiny_frames, write_depth, write_image

from stac_core.config import MODES, Config
from stac_core.evaluation import collect
from stac_core.evaluation.datasets.world import WorldSequence
from stac_core.evaluation.evaluate import main
from stac_core.evaluation.flags import configure, describe, settings_of, sweep
from stac_core.evaluation.results import KEY, ResultTable, read_rows, to_markdown
from stac_core.evaluation.scene_run import peak_process_bytes
from stac_core.evaluation.trajectory import Trajectory, read_tum, write_tum
from stac_core.version import version

DATA = Path(os.environ.get("STAC_TEST_DATA", Path(__file__).resolve().parents[3] / "shared" / "data"))
WORLD = "world:3,frames=6,height=56,width=70,kind=room"
SMALL = ["--size", "70", "--eval_cpu"]


def write_case(folder: Path, count: int) -> None:
    """A scene of `case.json` with depth, poses and intrinsics."""
    listed = []
    for index, frame in enumerate(tiny_frames(count, 56, 70)):
        write_image(folder / f"{index}.png", frame.image)
        write_depth(folder / f"{index}.depth.png", frame.depth_m, 1000)
        pose = frame.world_from_camera.tolist()
        listed.append({"rgb": f"{index}.png", "depth": f"{index}.depth.png", "T_wc": pose})
    camera = {"fx": 20.0, "fy": 21.0, "cx": 35.0, "cy": 28.0}
    (folder / "case.json").write_text(json.dumps({"camera": camera, "frames": listed}))


def rows_of(output: Path) -> list[dict]:
    return read_rows(output / "embedded" / "rows.jsonl")


def test_recon_measures_all_that_is_asked_in_one_pass(tmp_path, capsys):
    flags = ["--eval_depth", "--eval_cam", "--vis_tag", "look", "--output_dir", str(tmp_path)]
    assert main(["recon", WORLD, *SMALL, *flags]) == 0
    (row,) = rows_of(tmp_path)
    for column in ("accuracy_mean", "f_score", "abs_rel", "ate_rmse", "step_ms_p95", "cache_mib_max"):
        assert np.isfinite(row[column])
    assert row["frames"] == 6 and row["mode"] == Config().cache.mode
    threads = torch.get_num_threads()
    assert row["ran_on"] == f"cpu, float32, eager, {threads} threads, PyTorch {torch.__version__}"
    assert row["version"] == version()
    told = capsys.readouterr().out.splitlines()[-2]
    for text in ("ATE", "RPE", "AbsRel", "F-score", "6 frames", row["scene"], f"{row['f_score']:.4g}"):
        assert text in told
    with (tmp_path / "embedded" / "rows.csv").open() as lines:
        assert next(csv.DictReader(lines))["scene"] == row["scene"]
    steps = (tmp_path / "embedded" / row["frames_file"]).read_text().splitlines()
    assert len(steps) == 7
    folder = (tmp_path / "embedded" / row["frames_file"]).parent
    assert len(read_tum(folder / "trajectory.tum")) == 6
    pictures = tmp_path / "embedded" / "vis_look" / folder.name
    for name in ("cloud.png", "path.png", "depth.png"):
        assert cv2.imread(str(pictures / name)).std() > 5
    assert (pictures / "cloud.ply").read_bytes().startswith(b"ply\n")


def test_figures_do_not_depend_on_whether_a_run_was_interrupted(tmp_path, capsys):
    """A scene that fails leaves the others; the next run adds only what is missing."""
    broken = tmp_path / "7scenes" / "broken" / "seq-01"
    write_image(broken / "frame-000000.color.png", tiny_frames(1)[0].image)
    output = ["--output_dir", str(tmp_path / "out")]
    assert main(["depth", str(broken), WORLD, *SMALL, *output]) == 1
    (first,) = rows_of(tmp_path / "out")
    stamp = (tmp_path / "out" / "embedded" / "rows.jsonl").stat().st_mtime_ns
    told = capsys.readouterr().out
    assert main(["depth", WORLD, *SMALL, *output]) == 0
    assert "AbsRel" in told and capsys.readouterr().out == told  # figures that are there are told again
    assert rows_of(tmp_path / "out") == [first]
    assert (tmp_path / "out" / "embedded" / "rows.jsonl").stat().st_mtime_ns == stamp
    assert main(["depth", WORLD, *SMALL, *output, "--align", "scale_shift"]) == 0
    assert [row["measured"] for row in rows_of(tmp_path / "out")] == [
        "stride=1 depth=scale/sequence",
        "stride=1 depth=scale_shift/sequence",
    ]


def test_a_sweep_fills_a_table_with_plots(tmp_path, capsys):
    output = ["--output_dir", str(tmp_path / "out")]
    axes = ["--sweep", "cache.mode=causal,window_kv", "cache.window_size=1,2"]
    assert main(["pose", WORLD, *SMALL, *output, *axes, "--pose_eval_stride", "2"]) == 0
    rows = rows_of(tmp_path / "out")
    assert [(row["mode"], row["frames"]) for row in rows] == [("causal", 3)] * 2 + [("window_kv", 3)] * 2
    assert len({row["settings"] for row in rows}) == 4
    assert main(["table", str(tmp_path / "out"), "--output_dir", str(tmp_path / "table")]) == 0
    markdown = (tmp_path / "table" / "table.md").read_text()
    assert markdown.count("\n| causal |") == markdown.count("\n| window_kv |") == 2 and "ate_rmse" in markdown
    assert "dataset world, scene world_3_frames6" in markdown  # what is the same everywhere is said once
    for name in ("quality_pose.png", "time.png"):
        assert cv2.imread(str(tmp_path / "table" / name)).std() > 5


def test_a_measure_that_fails_leaves_the_others(tmp_path, capsys):
    """A scene without poses keeps its depth figures, and is tried again by the next run."""
    scene, output = tmp_path / "tum" / "desk", ["--output_dir", str(tmp_path / "out")]
    for index, frame in enumerate(tiny_frames(3, 56, 70)):
        write_image(scene / f"{index}.png", frame.image)
        write_depth(scene / f"{index}.depth.png", frame.depth_m, 5000)
    (scene / "rgb.txt").write_text("1.0 0.png\n1.1 1.png\n1.2 2.png\n")
    (scene / "depth.txt").write_text("1.0 0.depth.png\n1.1 1.depth.png\n1.2 2.depth.png\n")
    command = ["depth", str(scene), "--eval_cam", *SMALL, *output]
    assert main(command) == 1
    said = capsys.readouterr()
    assert "pose: desk: 0 frames with a true pose" in said.err
    assert "AbsRel" in said.out and "ATE" not in said.out
    (row,) = rows_of(tmp_path / "out")
    assert row["abs_rel"] > 0 and "0 frames with a true pose" in row["failed"]
    pose = "0 0 0 0 0 0 1"
    (scene / "groundtruth.txt").write_text(f"1.0 {pose}\n1.1 1{pose[1:]}\n1.2 3{pose[1:]}\n")
    assert main(command) == 0
    (row,) = rows_of(tmp_path / "out")
    assert row["ate_rmse"] >= 0 and "failed" not in row


def test_scenes_of_one_name_do_not_pass_for_each_other(tmp_path, monkeypatch):
    for place, count in (("a", 3), ("b", 4)):
        write_case(tmp_path / place / "desk", count)
    output = ["--output_dir", str(tmp_path / "out")]
    scenes = [str(tmp_path / place / "desk") for place in "ab"]
    assert main(["depth", *scenes, *SMALL, *output]) == 0
    assert [row["frames"] for row in rows_of(tmp_path / "out")] == [3, 4]
    monkeypatch.chdir(tmp_path / "a" / "desk")  # the same scene, called otherwise
    assert main(["depth", ".", *SMALL, *output]) == 0
    assert [(row["scene"], row["source"]) for row in rows_of(tmp_path / "out")] == [
        ("desk", scene) for scene in scenes
    ]


def test_another_truth_or_topic_of_a_bag_is_another_row(tmp_path):
    with BagWriter(tmp_path / "drive.1") as bag:
        for frame in tiny_frames(4, 56, 70):
            for side in ("left", "right"):
                image = image_message(frame.image, frame.stamp_ns, "rgb8")
                bag.write(f"/{side}/image", "sensor_msgs/msg/Image", image, frame.stamp_ns)
    for name, scale in (("one", 1.0), ("ten", 10.0)):
        poses = np.array([frame.world_from_camera for frame in tiny_frames(4)])
        poses[:, :3, 3] *= scale
        stamps = np.array([frame.stamp_ns for frame in tiny_frames(4)])
        write_tum(tmp_path / f"{name}.tum", Trajectory(stamps, poses))
    command = ["pose", str(tmp_path / "drive.1"), *SMALL, "--output_dir", str(tmp_path / "out")]
    for side, truth in (("left", "one"), ("left", "ten"), ("right", "one")):
        assert main([*command, "--topic", f"/{side}/image", "--truth", str(tmp_path / f"{truth}.tum")]) == 0
    rows = rows_of(tmp_path / "out")
    assert {row["scene"] for row in rows} == {"drive.1"} and len(rows) == 3
    assert rows[1]["ate_rmse"] == pytest.approx(10 * rows[0]["ate_rmse"])
    assert "topic=/right/image" in rows[2]["measured"] and "one.tum" in rows[2]["measured"]


def test_a_scene_that_does_not_finish_leaves_no_large_files(tmp_path, monkeypatch):
    """Neither where no measure succeeds, nor where an image is damaged, nor after Ctrl-C."""
    for name in ("untrue", "damaged"):
        write_case(tmp_path / name, 8)
    (tmp_path / "damaged" / "6.png").write_bytes(b"no image")
    case = json.loads((tmp_path / "untrue" / "case.json").read_text())
    for row in case["frames"]:
        del row["depth"]
    (tmp_path / "untrue" / "case.json").write_text(json.dumps(case))
    output = ["--output_dir", str(tmp_path / "out"), "--vis_tag", "look"]
    assert main(["depth", str(tmp_path / "untrue"), str(tmp_path / "damaged"), *SMALL, *output]) == 1

    def ctrl_c(sequence, index):
        if index == 4:
            raise KeyboardInterrupt
        return world_frame(sequence, index)

    world_frame = WorldSequence.frame
    monkeypatch.setattr(WorldSequence, "frame", ctrl_c)
    assert main(["depth", WORLD, *SMALL, *output]) == 130
    left = {path.name for path in (tmp_path / "out").rglob("*") if path.is_file()}
    assert left == {"trajectory.tum", "frames.csv"}  # of the one that ran to its end
    assert len(list((tmp_path / "out").rglob("scenes/*"))) == 1


def test_a_full_disk_is_told_before_a_scene_is_computed(tmp_path, capsys, monkeypatch):
    """Files that are written through memory would end the program without a word."""

    def is_full(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "posix_fallocate", is_full)
    assert main(["depth", WORLD, *SMALL, "--output_dir", str(tmp_path)]) == 1
    assert "No space left" in (told := capsys.readouterr().err) and "depth.npy" in told


def test_memory_is_that_of_the_scene(tmp_path):
    """Not of one before it, nor of anything else that the process has done."""
    if not os.access("/proc/self/clear_refs", os.W_OK):
        pytest.skip("the system does not let the most memory be forgotten")
    assert np.ones(2**30, np.uint8)[-1] == 1  # 1 GiB, and free again
    before = peak_process_bytes() / 2**20
    assert main(["depth", WORLD, *SMALL, "--output_dir", str(tmp_path)]) == 0
    (row,) = rows_of(tmp_path)
    assert 100 < row["process_mib_max"] < before - 500


def test_two_poses_are_no_path_to_judge(tmp_path, capsys):
    """Moved and scaled, any two lie upon any two others; the error would be 0."""
    scene, output = tmp_path / "desk", ["--output_dir", str(tmp_path / "out")]
    write_case(scene, 2)
    assert main(["pose", str(scene), *SMALL, *output]) == 1
    assert "at least 3" in capsys.readouterr().err
    assert main(["pose", str(scene), *SMALL, *output, "--align", "none"]) == 0


def test_pictures_may_be_asked_for_later(tmp_path):
    command = ["depth", WORLD, *SMALL, "--output_dir", str(tmp_path)]
    assert main(command) == 0
    assert not list(tmp_path.rglob("*.png"))
    assert main([*command, "--vis_tag", "look"]) == 0
    assert len(list(tmp_path.rglob("vis_look/*/*.png"))) == 3 and len(rows_of(tmp_path)) == 1
    drawn = next(tmp_path.rglob("depth.png")).stat().st_mtime_ns
    assert main([*command, "--vis_tag", "look"]) == 0
    assert next(tmp_path.rglob("depth.png")).stat().st_mtime_ns == drawn


@pytest.mark.slow
def test_every_mode_of_the_cache_is_in_one_table(tmp_path):
    output, modes = ["--output_dir", str(tmp_path / "out"), "--camera_window", "4"], list(MODES)
    world = "world:5,frames=12,height=56,width=70,kind=room"
    assert (
        main(["recon", world, *SMALL, *output, "--eval_cam", "--sweep", "cache.mode=" + ",".join(modes)]) == 0
    )
    assert main(["table", str(tmp_path / "out"), "--output_dir", str(tmp_path / "table")]) == 0
    with (tmp_path / "table" / "table_recon.csv").open() as lines:
        rows = list(csv.DictReader(lines))
    assert [row["mode"] for row in rows] == [m + " (offline)" * MODES[m].offline for m in modes]
    assert all(float(row["f_score"]) >= 0 and float(row["ate_rmse"]) > 0 for row in rows)
    sizes = {row["mode"]: float(row["cache_mib_max"]) for row in rows}
    assert all(0 < sizes[mode] < sizes["causal"] for mode in ("window_kv", "xstream"))


def test_real_recordings_are_measured(tmp_path):
    if not (DATA / "hololens_office_start").is_dir():
        pytest.skip(f"no sample recordings at {DATA}")
    scene = str(DATA / "hololens_office_start")
    flags = ["--kf_every", "13", "--eval_cam", "--eval_depth", "--no_recon", "--output_dir", str(tmp_path)]
    assert main(["recon", scene, *SMALL, *flags]) == 0
    (row,) = rows_of(tmp_path)
    assert row["poses"] == 4 and 0 < row["abs_rel"] < 10 and 0 < row["ate_rmse"] < row["path_length"]


def test_scenes_are_found_by_dataset_and_name(tmp_path, capsys):
    for scene in ("chess", "fire"):
        for index, frame in enumerate(tiny_frames(2, 56, 70)):
            write_image(tmp_path / "7scenes" / scene / "images" / f"{index}.png", frame.image)
    base = ["depth", "--dataset_type", "7scenes", "--data_root", str(tmp_path), *SMALL]
    output = ["--output_dir", str(tmp_path / "out")]
    assert main([*base, *output, "--scene_name", "chess", "moon"]) == 1
    assert "no scene moon; there is chess, fire" in capsys.readouterr().err
    assert main([*base, *output, "--scene_name", "fire"]) == 1  # images alone have no true depth
    assert "fire: no frame has true depth" in capsys.readouterr().err
    assert next((tmp_path / "out").rglob("trajectory.tum")).is_file()  # what was computed is kept


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["pose"], "name a scene"),
        (["pose", "/no/where"], "no such file"),
        (["recon", WORLD, "--no_recon"], "nothing to measure"),
        (["pose", WORLD, "--kf_every", "0"], "stride = 0"),
        (["pose", "world:x"], "world:SEED"),
        (["recon", WORLD, "--cloud_voxel", "0"], "voxel_size = 0: must be positive"),
        (["recon", WORLD, "--f_threshold", "-1"], "threshold = -1: must be positive"),
        (["recon", WORLD, "--icp_distance", "nan"], "icp_distance = nan: must be positive, or 0"),
        (["recon", WORLD, "--drop_percent", "-5"], "drop_percent = -5: must lie between 0 and 100"),
        (["recon", WORLD, "--drop_percent", "150"], "drop_percent = 150: must lie between 0 and 100"),
        (["pose", WORLD, "--window_size", "0"], "below the minimum"),
        (["pose", WORLD, "--window_size", "many"], "expected int"),
        (["pose", WORLD, "--sweep", "cache.mode=magic"], "choose one of"),
        (["pose", WORLD, "--sweep", "cache.colour=red"], "no setting 'cache.colour'"),
        (["pose", WORLD, "--sweep", "cache.mode"], "setting=value"),
        (["pose", WORLD, "--base_model", "stream3r", "--checkpoint", "/no/weights"], "does not exist"),
        (["pose", WORLD, "--model", "streamvggt", "--checkpoint", "/no/weights"], "does not exist"),
        (["table", "/no/where"], "no rows.jsonl"),
        (["bag", "/no/where.mcap"], "no such bag"),
    ],
)
def test_mistakes_are_named_and_end_with_a_status(tmp_path, capsys, monkeypatch, arguments, says):
    monkeypatch.chdir(tmp_path)
    assert main(arguments) == 1
    assert says in capsys.readouterr().err
    assert not list(tmp_path.rglob("trajectory.tum"))  # and nothing is computed in vain


@pytest.mark.parametrize("talker", ["talker_mcap", "talker_sqlite3"])
def test_a_bag_without_images_is_refused_by_the_command(capsys, tmp_path, talker):
    if not (DATA / "rosbag2_no_images").is_dir():
        pytest.skip(f"no sample recordings at {DATA}")
    arguments = ["bag", str(DATA / "rosbag2_no_images" / talker), "--output_dir", str(tmp_path)]
    assert main(arguments) == 1
    assert "no image topic" in capsys.readouterr().err


def test_every_setting_has_a_flag_and_texts_become_values():
    known = settings_of(Config())
    assert {"cache.mode", "model.name", "image.size", "kernels.backend"} <= set(known)
    same = {name: str(setting.default) for name, setting in known.items()}
    assert configure(same) == Config() and describe(same) == "defaults"
    changed = {"cache.window_size": "9", "cache.mode": "causal"}
    assert (
        describe(changed)
        == describe(dict(reversed(changed.items())))
        == "cache.mode=causal cache.window_size=9"
    )
    modes = known["cache.mode"].metadata["choices"]
    assert [run["cache.mode"] for run in sweep(["cache.mode=" + ",".join(modes)], {})] == list(modes)


def test_result_files_are_whole_and_keep_no_infinities(tmp_path):
    table = ResultTable(tmp_path)
    key = {name: name for name in KEY}
    table.add({**key, "ate_rmse": float("nan"), "frames": 3})
    assert [path.name for path in sorted(tmp_path.iterdir())] == ["rows.csv", "rows.jsonl"]
    assert json.loads((tmp_path / "rows.jsonl").read_text())["ate_rmse"] is None
    assert ResultTable(tmp_path).find(key) and not ResultTable(tmp_path).find({**key, "scene": "other"})
    assert to_markdown([{"a": 0.123456, "b": None}], ["a", "b"]).splitlines()[-1] == "| 0.1235 | – |"
    with pytest.raises(ValueError, match="without dataset"):
        table.add({"task": "pose"})
    (tmp_path / "rows.jsonl").write_text("{half")
    with pytest.raises(ValueError, match=r"rows\.jsonl:1"):
        ResultTable(tmp_path)


def test_runs_at_the_same_time_keep_each_others_rows(tmp_path):
    """Two commands write to the same folder unless told otherwise."""
    key = dict.fromkeys(KEY, "same")
    tables = [ResultTable(tmp_path) for _ in range(2)]  # both opened before either has a row
    for number in range(4):
        tables[number % 2].add({**key, "scene": f"s{number}"})
    assert [row["scene"] for row in read_rows(tmp_path / "rows.jsonl")] == ["s0", "s1", "s2", "s3"]
    assert (tmp_path / "rows.csv").read_text().count("\n") == 5
    assert all(table.find({**key, "scene": "s0"}) for table in tables)


@pytest.mark.parametrize("line", ["5", "{half", "[1]"])
def test_lines_that_are_no_rows_are_named(tmp_path, line):
    (tmp_path / "rows.jsonl").write_text('{"task": "pose"}\n' + line)
    with pytest.raises(ValueError, match=r"rows\.jsonl:2: not a result row"):
        read_rows(tmp_path / "rows.jsonl")


def finished_run(folder: Path, frames: str = "", **columns: object) -> Path:
    """An output folder with one row of a pose run, and its frames where told."""
    row = {
        **dict.fromkeys(KEY, "same"),
        "task": "pose",
        "mode": "stac",
        "frames": 2,
        "ate_rmse": 0.5,
        **columns,
    }
    if frames:
        write_text(folder / "frames.csv", f"frame,step_ms,cache_bytes\n{frames}\n")
        row["frames_file"] = "frames.csv"
    ResultTable(folder).add(row)
    return folder


def write_text(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


def table_of(output: Path, *folders: Path) -> str:
    assert main(["table", *map(str, folders), "--output_dir", str(output)]) == 0
    return (output / "table.md").read_text()


def test_a_table_of_a_folder_that_is_not_there_is_not_written(tmp_path, capsys):
    there = finished_run(tmp_path / "a")
    assert main(["table", str(there), str(tmp_path / "b"), "--output_dir", str(tmp_path / "out")]) == 1
    assert f"{tmp_path / 'b'}: no such folder" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_a_table_tells_rows_apart_that_were_measured_otherwise(tmp_path):
    for name in ("sim3", "se3"):
        finished_run(tmp_path / name, measured=f"stride=1 pose={name}")
    text = table_of(tmp_path / "table", tmp_path)
    assert "| stride=1 pose=se3 |" in text and "| stride=1 pose=sim3 |" in text
    finished_run(tmp_path / "other", measured="stride=1 pose=se3", weights="mine, step 5")
    finished_run(tmp_path / "elsewhere", measured="stride=1 pose=se3", source="/data/other/same")
    text = table_of(tmp_path / "table", tmp_path)
    assert "mine, step 5" in text and "/data/other/same" in text


def test_a_table_holds_each_row_once_and_needs_no_frames(tmp_path, monkeypatch):
    """However its folder is called; the steps of single frames may have been deleted."""
    run = finished_run(tmp_path / "run", frames="0,5,1")
    (run / "frames.csv").unlink()
    monkeypatch.chdir(tmp_path)
    assert table_of(tmp_path / "table", run, Path("run"), Path("run/../run")).count("| 0.5 |") == 1
    assert not (tmp_path / "table" / "time.png").exists()


def test_a_table_reads_rows_of_earlier_versions(tmp_path):
    """These named neither their source nor the version."""
    for name in "ab":
        file = finished_run(tmp_path / name) / "rows.jsonl"
        file.write_text(file.read_text().replace('"source": "same", ', ""))
    assert table_of(tmp_path / "table", tmp_path).count("| 0.5 |") == 2
    finished_run(tmp_path / "c", version="0.1.0 (00fdd74206e4)")
    text = table_of(tmp_path / "table", tmp_path)
    assert text.count("| – | 0.5 |") == 2 and text.count("| 0.1.0 (00fdd74206e4) | 0.5 |") == 1


def test_every_run_has_its_curve(tmp_path, monkeypatch):
    drawn = []
    monkeypatch.setattr(collect, "line_plot", lambda series, *_: drawn.append(series))
    for name in ("pose", "depth", "copy"):
        finished_run(tmp_path / name, frames="0,5,1", task="depth" if name == "depth" else "pose")
    table_of(tmp_path / "table", tmp_path)
    assert len(drawn[0]) == 3


def test_a_cell_of_a_table_is_one_line():
    assert to_markdown([{"failed": "one\ntwo | three"}], ["failed"]).count("\n") == 3
