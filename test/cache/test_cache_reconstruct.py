"""The command on real files: images and video in, cloud, path, depth maps and a picture out."""

from __future__ import annotations

import json
import shutil
import signal
import threading
from dataclasses import replace

import cv2
import numpy as np
import pytest
import torch
from tiny import synthetic_frames

from stac_core import Moves, reconstruct
from stac_core.evaluation.trajectory import read_tum
from stac_core.pipeline import OneBehind, one_ahead, with_next
from stac_core.reconstruct import main
from stac_core.session import StreamSession
from stac_core.thinned_cloud import ThinnedCloud, first_of_each

SMALL = [
    "--quiet",
    "--size",
    "70",
    "--mode",
    "stac",
    "--voxel_conf",
    "0.5",
    "-win",
    "2",
    "-ck",
    "2",
    "-hh",
    "1",
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("scene")
    for i, image in enumerate(synthetic_frames(9, 48, 64)):
        cv2.imwrite(str(folder / f"{i}.png"), image[..., ::-1])
    return folder


def run(source, output, *flags) -> int:
    return main(["--scene_dir", str(source), "--output_dir", str(output), *SMALL, *flags])


def test_a_folder_becomes_a_cloud_a_path_depth_maps_and_a_picture(folder, tmp_path):
    assert run(folder, tmp_path) == 0
    assert len(read_tum(tmp_path / "trajectory.tum")) == 9
    depth = cv2.imread(str(tmp_path / "depth" / "000008.png"), cv2.IMREAD_UNCHANGED)
    assert depth.shape == (48, 64) and depth.dtype == np.uint16
    stats = json.loads((tmp_path / "stats.json").read_text())
    assert stats["frames"] == 9 and stats["stats"]["cache"]["frames_seen"] == 9
    assert "members" in stats["stats"]["cache"]
    header = (tmp_path / "cloud.ply").read_bytes()[:200].decode("latin1")
    assert f"element vertex {stats['points']}" in header and stats["points"] > 100
    assert cv2.imread(str(tmp_path / "report.png")).std() > 0
    assert not list(tmp_path.rglob("*.part*"))


def test_nothing_of_an_earlier_run_is_left_among_what_a_run_writes(folder, tmp_path, monkeypatch):
    output, short = tmp_path / "out", tmp_path / "short"
    assert run(folder, output, "--repose_frames", "5", "--reach", "0", "--landmarks", "0") == 0
    (output / "notes.txt").touch()
    (output / "depth" / "mine.png").touch()
    short.mkdir()
    (short / "0.png").write_bytes((folder / "0.png").read_bytes())
    (short / "1.png").touch()  # no image: nothing is mapped, and all stays
    before = {path: path.stat().st_mtime_ns for path in output.rglob("*.*")}
    assert run(short, output) == 1
    assert before == {path: path.stat().st_mtime_ns for path in output.rglob("*.*")}
    (short / "1.png").unlink()
    assert run(short, output) == 0
    assert sorted(path.name for path in output.rglob("*.*")) == [
        "000000.png",
        "cloud.ply",
        "mine.png",
        "notes.txt",
        "report.png",
        "stats.json",
        "trajectory.tum",
    ]


def test_a_run_that_breaks_off_while_writing_leaves_no_figures_of_an_earlier_one(
    folder, tmp_path, monkeypatch, capsys
):
    assert run(folder, tmp_path) == 0

    def full(path, *_):
        raise OSError(28, "No space left on device", str(path))

    with monkeypatch.context() as patch:
        patch.setattr(reconstruct, "write_ply", full)
        assert run(folder, tmp_path) == 1
    assert "cloud.ply" in capsys.readouterr().err and not (tmp_path / "stats.json").exists()
    assert run(folder, tmp_path) == 0  # its depth maps give way
    assert (tmp_path / "stats.json").exists() and not (tmp_path / "unfinished").exists()


def test_depth_maps_of_others_are_never_removed(folder, tmp_path, capsys):
    """Data sets keep colour and depth in folders side by side."""
    shutil.copytree(folder, tmp_path / "color")
    (tmp_path / "depth").mkdir()
    (tmp_path / "depth" / "000000.png").touch()
    assert run(tmp_path / "color", tmp_path) == 1
    assert "are of no run of this command" in capsys.readouterr().err
    assert (tmp_path / "depth" / "000000.png").exists()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_an_interrupted_run_writes_what_it_has_and_says_so(folder, tmp_path, monkeypatch, capsys, number):
    before = signal.getsignal(number)
    step, steps = StreamSession.step, []

    def interrupted(session, images, *rest, **more):
        steps.append(images)
        if len(steps) == 3:
            signal.raise_signal(number)
        return step(session, images, *rest, **more)

    monkeypatch.setattr(StreamSession, "step", interrupted)
    assert run(folder, tmp_path) == 130
    error = capsys.readouterr().err
    assert "interrupted" in error and "Traceback" not in error
    assert len(read_tum(tmp_path / "trajectory.tum")) == 4
    assert (tmp_path / "stats.json").exists() and signal.getsignal(number) == before


def test_nothing_is_written_among_the_source(folder, tmp_path, monkeypatch, capsys):
    """A data set's own depth maps may have the names of those that are written."""
    scene = tmp_path / "scene"
    shutil.copytree(folder, scene)
    monkeypatch.chdir(scene)
    assert run(scene, ".") == 1
    assert "--output_dir .: is the source itself" in capsys.readouterr().err
    assert len(list(scene.iterdir())) == 9


def test_a_resumed_stream_continues_the_path(folder, tmp_path):
    first, second, whole = (tmp_path / name for name in ("first", "second", "whole"))
    for start, stop, name in ((0, 4, "a"), (4, 9, "b")):
        (tmp_path / name).mkdir()
        for i in range(start, stop):
            (tmp_path / name / f"{i}.png").write_bytes((folder / f"{i}.png").read_bytes())
    stream = str(tmp_path / "stream.safetensors")
    assert run(tmp_path / "a", first, "--save_stream", stream) == 0
    assert run(tmp_path / "b", second, "--resume", stream) == 0
    assert run(folder, whole) == 0
    poses = [read_tum(p / "trajectory.tum").world_from_camera for p in (first, second, whole)]
    assert np.array_equal(np.concatenate(poses[:2]), poses[2])


def test_poses_read_again_are_written_beside_the_others(folder, tmp_path):
    assert run(folder, tmp_path, "--repose_frames", "5", "--reach", "0", "--landmarks", "0") == 0
    given, again = (read_tum(tmp_path / f"trajectory{name}.tum") for name in ("", "_reposed"))
    assert again.stamps_ns.tolist() == given.stamps_ns[[0, 5, 6, 7, 8]].tolist()


def test_a_video_and_every_second_frame(folder, tmp_path):
    video = cv2.VideoWriter(str(tmp_path / "v.avi"), cv2.VideoWriter.fourcc(*"MJPG"), 10, (64, 48))
    for image in synthetic_frames(7, 48, 64):
        video.write(image)
    video.release()
    assert run(tmp_path / "v.avi", tmp_path / "out", "--kf_every", "2", "--pinned", "2", "--streaming") == 0
    assert len(read_tum(tmp_path / "out" / "trajectory.tum")) == 4


def test_a_cache_without_limit_that_will_not_fit_is_refused_after_one_chunk(
    folder, tmp_path, monkeypatch, capsys
):
    assert run(folder, tmp_path / "all", "--mode", "causal") == 0
    monkeypatch.setattr(reconstruct, "free_bytes", lambda device: 1 << 20)
    assert run(folder, tmp_path / "some", "--mode", "causal") == 1
    error = capsys.readouterr().err
    assert "7 more need" in error and "--kf_every" in error and not (tmp_path / "some" / "cloud.ply").exists()


def scene_of(frames, path):
    path.mkdir(parents=True)
    for i, image in enumerate(frames):
        cv2.imwrite(str(path / f"{i}.png"), image[..., ::-1])
    return path


@pytest.mark.parametrize("mode", ["causal", "stac"])
def test_a_stream_that_no_chunk_is_good_enough_to_begin_says_so(folder, tmp_path, capsys, mode):
    flags = ["--mode", mode, "--first_confidence"]
    assert run(folder, tmp_path / "refused", *flags, "1000") == 1
    error = capsys.readouterr().err
    assert "no chunk reaches cache.first_confidence = 1000.0" in error
    assert len(read_tum(tmp_path / "refused" / "trajectory.tum")) == 9
    assert run(folder, tmp_path / "begun", *flags, error.split()[-1]) == 0


def test_a_stream_that_begins_late_is_checked_for_memory_when_it_begins(tmp_path, monkeypatch, capsys):
    flags, found = ["--mode", "causal", "--first_confidence"], []
    for frames in ([np.zeros((48, 64, 3), np.uint8)] * 2, synthetic_frames(2, 48, 64)):
        scene = scene_of(frames, tmp_path / f"{len(found)}")
        assert run(scene, tmp_path / "alone", *flags, "1000") == 1
        found.append((float(capsys.readouterr().err.split()[-1]), frames))
    (worse, refused), (better, good) = sorted(found, key=lambda each: each[0])
    monkeypatch.setattr(reconstruct, "free_bytes", lambda device: 1 << 20)
    scene = scene_of([*refused, *good * 4], tmp_path / "late")
    assert run(scene, tmp_path / "out", *flags, f"{(worse + better) / 2}") == 1
    assert "6 more need" in capsys.readouterr().err
    assert len(read_tum(tmp_path / "out" / "trajectory.tum")) == 2


def points_of(frames, output, *flags) -> int:
    assert run(scene_of(frames, output / "scene"), output, *flags) == 0
    return json.loads((output / "stats.json").read_text())["points"]


def test_a_tall_image_of_which_the_network_sees_less_than_half_becomes_as_dense_a_cloud(tmp_path):
    tall = synthetic_frames(3, 192, 64)
    middle = [image[64:128] for image in tall]
    square, portrait = (points_of(f, tmp_path / n) for f, n in ((middle, "square"), (tall, "portrait")))
    assert portrait == pytest.approx(square, rel=0.3)


def test_no_frame_gives_more_points_than_the_limit(tmp_path, monkeypatch):
    monkeypatch.setattr(reconstruct, "CELL", 1e-6)  # nothing is thinned
    monkeypatch.setattr(reconstruct, "POINTS_PER_FRAME", 1000)
    frames = synthetic_frames(1, 48, 64)
    assert 500 <= points_of(frames, tmp_path / "half") <= 1000
    assert points_of(frames, tmp_path / "few", "--conf_percent", "90") == pytest.approx(307, abs=3)


def test_a_last_merge_that_fails_loses_nothing_else(folder, tmp_path, monkeypatch, capsys):
    """As on a GPU without room for it, where tokens wait to be merged until somebody asks."""
    told = StreamSession.stats

    def stats(session, members=False):
        if members:
            raise torch.OutOfMemoryError("too many rows")
        return told(session)

    monkeypatch.setattr(StreamSession, "stats", stats)
    assert run(folder, tmp_path) == 0
    assert "the last chunk is not merged: too many rows" in capsys.readouterr().err
    assert len(read_tum(tmp_path / "trajectory.tum")) == 9
    assert json.loads((tmp_path / "stats.json").read_text())["stats"]["cache"]["frames_seen"] == 9


def test_frames_whose_poses_are_no_numbers_are_left_out_of_cloud_and_path(folder, tmp_path, monkeypatch):
    step, steps = StreamSession.step, iter(range(99))

    def second_is_lost(*arguments, **named):
        prediction, nan = step(*arguments, **named), torch.nan if next(steps) == 1 else 1
        return replace(prediction, world_from_camera=prediction.world_from_camera * nan)

    monkeypatch.setattr(StreamSession, "step", second_is_lost)
    assert run(folder, tmp_path) == 0
    assert len(read_tum(tmp_path / "trajectory.tum")) == 7
    _, _, vertices = (tmp_path / "cloud.ply").read_bytes().partition(b"end_header\n")
    points = np.frombuffer(vertices, [("position", "<f4", 3), ("colour", "u1", 3)])["position"]
    assert np.isfinite(points).all() and len(points) > 100
    assert json.loads((tmp_path / "stats.json").read_text())["frames"] == 9
    assert len(list((tmp_path / "depth").iterdir())) == 9


def test_offline_modes_take_everything_at_once(folder, tmp_path):
    assert run(folder, tmp_path, "--mode", "full") == 0
    assert len(read_tum(tmp_path / "trajectory.tum")) == 9


def test_what_is_mapped_before_an_image_of_another_size_is_kept(folder, tmp_path, capsys):
    mixed = tmp_path / "mixed"
    shutil.copytree(folder, mixed)
    cv2.imwrite(str(mixed / "7.png"), synthetic_frames(1, 40, 64)[0])
    assert run(mixed, tmp_path / "out") == 1
    error = capsys.readouterr().err
    assert f"{mixed / '7.png'} is 64×40 pixels, those before it are 64×48" in error
    assert len(read_tum(tmp_path / "out" / "trajectory.tum")) == 6  # in chunks of two
    assert (tmp_path / "out" / "cloud.ply").exists()


def test_chunks_are_made_one_ahead_and_break_off_in_their_place():
    made, threads = [threading.Semaphore(0) for _ in range(4)], set()

    def chunks():
        for number in range(3):
            threads.add(threading.current_thread())
            made[number].release()
            yield number
        made[3].release()
        raise ValueError("the fourth")

    used = []
    with pytest.raises(ValueError, match="the fourth"):
        for number in one_ahead(chunks()):
            assert made[number + 1].acquire(timeout=10)  # while this one is in use
            assert not any(later.acquire(blocking=False) for later in made[number + 2 :])
            used.append(number)
    assert used == [0, 1, 2]
    assert len(threads) == 1 and not any(thread.is_alive() for thread in threads)


def test_each_chunk_comes_with_the_next_and_what_breaks_off_does_so_in_its_place():
    def chunks():
        yield from "abc"
        raise ValueError("the fourth")

    assert list(with_next(iter("abc"))) == [("a", "b"), ("b", "c"), ("c", None)]
    assert list(with_next(iter(""))) == []
    used = []
    with pytest.raises(ValueError, match="the fourth"):
        for pair in with_next(chunks()):
            used.append(pair)
    assert used == [("a", "b"), ("b", "c"), ("c", None)]


def test_whoever_stops_early_leaves_no_thread():
    before = threading.active_count()
    coming = one_ahead(iter("abc"))
    assert next(coming) == "a"
    coming.close()
    assert threading.active_count() == before and list(one_ahead(iter(""))) == []


def test_work_is_done_behind_in_its_order_and_all_of_it_before_the_end():
    may_go_on, done = threading.Semaphore(0), []

    def work(number):
        assert may_go_on.acquire(timeout=10)
        done.append((number, threading.current_thread()))

    with OneBehind() as behind:
        behind.do(lambda: work(0))
        assert not done  # its caller has gone on
        may_go_on.release(3)
        behind.do(lambda: work(1))
        behind.do(lambda: work(2))
    numbers, threads = zip(*done, strict=True)
    assert numbers == (0, 1, 2)
    assert len(set(threads)) == 1 and threads[0] is not threading.current_thread()


@pytest.mark.parametrize("last", [True, False])
def test_what_fails_behind_is_raised(last):
    with pytest.raises(OSError, match="full"), OneBehind() as behind:
        behind.do(lambda: (_ for _ in ()).throw(OSError("full")))
        if not last:
            behind.do(lambda: None)


def test_what_the_caller_raises_comes_before_what_failed_behind():
    with pytest.raises(KeyboardInterrupt), OneBehind() as behind:
        behind.do(lambda: (_ for _ in ()).throw(OSError("full")))
        raise KeyboardInterrupt


def test_the_first_of_each_key_is_found():
    for keys in ([5], [2, 2, 2], [3, -1, 3, 7, -1, 0], np.random.default_rng(0).integers(0, 50, 2000)):
        for found, expected in zip(
            first_of_each(np.array(keys)), np.unique(keys, return_index=True), strict=True
        ):
            np.testing.assert_array_equal(found, expected)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--mode", "full", "--streaming"], "choose a streaming mode"),
        (["--mode", "full", "--save_stream", "x"], "remembers nothing"),
        (["--kf_every", "0"], "nearest value that works: 1"),
        (["--voxel_size", "-1"], "voxel_size"),
        (["--resume", "missing.safetensors"], "no such file"),
        (["--resume", __file__], "damaged or no safetensors file"),
    ],
)
def test_what_cannot_work_is_refused_in_one_line(folder, tmp_path, capsys, flags, message):
    assert run(folder, tmp_path / "out", *flags) == 1
    lines = capsys.readouterr().err.strip().splitlines()
    assert lines[-1].startswith("stac-reconstruct:") and message in lines[-1]


def test_a_stream_of_other_settings_is_refused(folder, tmp_path, capsys):
    stream = str(tmp_path / "stream.safetensors")
    assert run(folder, tmp_path / "a", "--save_stream", stream) == 0
    assert run(folder, tmp_path / "b", "--resume", stream, "-hh", "2") == 1
    assert "cache.hh_size = 1 (here 2)" in capsys.readouterr().err
    cut = tmp_path / "cut.safetensors"
    cut.write_bytes((tmp_path / "stream.safetensors").read_bytes()[:5000])
    assert run(folder, tmp_path / "c", "--resume", str(cut)) == 1
    assert "damaged" in capsys.readouterr().err


def test_the_cloud_keeps_one_point_per_cell():
    cloud = ThinnedCloud()
    cloud.cell = 1.0
    points = np.array([[0.1, 0, 0], [0.2, 0, 0], [1.5, 0, 0]], np.float32)
    colours = np.array([[1, 0, 0], [2, 0, 0], [3, 0, 0]], np.uint8)
    cloud.add(0, points, colours)
    cloud.add(1, points + 0.1, colours + 10)
    cloud.add(1, np.empty((0, 3), np.float32), np.empty((0, 3), np.uint8))
    kept, colour = cloud.points()
    assert kept[:, 0].tolist() == pytest.approx([0.1, 1.5]) and colour[:, 0].tolist() == [1, 3]


def test_images_that_add_nothing_to_the_cloud_cost_nothing_where_it_moves(monkeypatch):
    cloud, rng, moved, points = ThinnedCloud(), np.random.default_rng(0), [], Moves.points
    cloud.cell = 0.5
    for image in range(300):
        seen = rng.random((20, 3)).astype(np.float32)
        cloud.add(image, seen, np.zeros((20, 3), np.uint8))

    def counted(moves, submap, positions):
        moved.append(len(positions))
        return points(moves, submap, positions)

    monkeypatch.setattr(Moves, "points", counted)
    for _ in range(2):
        cloud.move(Moves.none(300))
    assert moved == [8, 8] and len(cloud.points()[0]) == 8


def test_the_cloud_moves_with_its_submaps_and_still_keeps_one_point_per_cell():
    """The second submap comes to lie on the first, the third shrinks; what they leave is free."""
    cloud = ThinnedCloud()
    cloud.cell = 1.0
    cloud.move(Moves.none(1))
    points, along = np.array([[0.5, 0, 0], [2.5, 0, 0]], np.float32), np.array([1, 0, 0], np.float32)
    for submap in range(3):
        cloud.add(submap, points + 10 * submap * along, np.full((2, 3), submap, np.uint8))
    moves = Moves.none(3)
    moves.translation[1, 0], moves.scale[2] = -10, 0.5
    cloud.move(moves)
    cloud.add(3, points + 20 * along, np.full((2, 3), 3, np.uint8))
    cloud.add(4, points + 0.1 * along, np.full((2, 3), 4, np.uint8))
    kept, colour = cloud.points()
    assert kept[:, 0].tolist() == [0.5, 2.5, 10.25, 11.25, 20.5, 22.5]
    assert colour[:, 0].tolist() == [0, 0, 2, 2, 3, 3]
