"""What a cache costs in quality, measured on a room that is walked round once and a half."""

import numpy as np
import pytest

from stac_core.evaluation import cache_quality, loop_world
from stac_core.evaluation.cache_quality import Outputs, distances, main, needed_rows
from stac_core.evaluation.cache_quality_table import against_default
from stac_core.evaluation.cache_rows import ROWS
from stac_core.evaluation.results import read_rows
from stac_core.evaluation.score import ReconOptions

SHORT = ["--seeds", "14", "--frames", "24"]  # this camera returns after 16 frames


def outputs(frames: int = 6) -> Outputs:
    random = np.random.default_rng(3)
    poses = np.tile(np.eye(4), (frames, 1, 1))
    poses[:, 0, 3] = np.arange(frames)
    intrinsics = np.tile(np.array([[20.0, 0, 7], [0, 20, 7], [0, 0, 1]]), (frames, 1, 1))
    depth = random.uniform(1, 3, (frames, 14, 14)).astype(np.float32)
    return Outputs(depth, poses, intrinsics, random.normal(size=(frames, 5, 8)).astype(np.float16))


def test_a_run_is_no_distance_from_itself():
    assert set(distances(outputs(), outputs(), 3).values()) == {0.0}


def test_distances_are_relative_and_told_apart_from_the_loop_on():
    ours, theirs = outputs(), outputs()
    ours.depth[3:] *= 1.1
    ours.tokens[3:] *= 2
    turn = np.radians(10)
    ours.world_from_camera[3:, :2, :2] = [[np.cos(turn), -np.sin(turn)], [np.sin(turn), np.cos(turn)]]
    found = distances(ours, theirs, 3)
    assert found["depth_after_loop"] == pytest.approx(0.1, rel=1e-4)
    assert found["depth_to_reference"] == pytest.approx(0.05, rel=1e-4)
    assert found["rotation_after_loop"] == pytest.approx(10)
    assert found["tokens_after_loop"] == pytest.approx(1, rel=1e-3)
    assert found["centre_after_loop"] == 0 and found["points_after_loop"] > 0.1


def test_rows_bring_along_what_they_are_measured_by():
    assert needed_rows(["window_kv, bytes of stac"]) == [
        "causal", "window_kv 1+8", "stac", "window_kv, bytes of stac",
    ]  # fmt: skip
    assert all(row.reference in ROWS and (not row.bytes_of or row.bytes_of in ROWS) for row in ROWS.values())


def test_the_command_measures_once_and_prints_tables(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(cache_quality, "SIZE", (56, 70))  # quick: small images, coarse clouds
    monkeypatch.setattr(cache_quality, "CLOUD", ReconOptions(voxel_size=0.3, icp_distance=0.0))
    arguments = [*SHORT, "--rows", "window_kv, bytes of stac", "--out", str(tmp_path)]
    assert main(arguments) == 0
    rows = {row["row"]: row for row in read_rows(tmp_path / "rows.jsonl")}
    assert set(rows) == {"causal", "window_kv 1+8", "stac", "window_kv, bytes of stac"}
    assert rows["causal"]["tokens_after_loop"] == 0 and rows["stac"]["tokens_after_loop"] > 0
    assert rows["window_kv, bytes of stac"]["cache_bytes"] >= 0.95 * rows["stac"]["cache_bytes"]
    for row in rows.values():
        assert all(np.isfinite(row[name]) for name in ("abs_rel", "ate_share", "accuracy", "rotation_deg"))
    assert against_default(list(rows.values()), "stac")[0] == 1
    printed = capsys.readouterr().out
    assert "| stac |" in printed and printed.strip() == (tmp_path / "tables.md").read_text().strip()

    monkeypatch.setattr(cache_quality, "run_scene", lambda *_: pytest.fail("measured again"))
    assert main(arguments) == 0


def test_a_loop_that_does_not_close_is_refused(tmp_path, capsys):
    assert main(["--seeds", "14", "--frames", "12", "--out", str(tmp_path)]) == 1
    assert "nearest value that works: 17" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("flags", "named"),
    [
        ("--frames 0", "--frames = 0: below the minimum"),
        ("--worlds 0", "--worlds = 0: below the minimum; nearest value that works: 1"),
        (
            "--frames 8",
            "frames = 8: in none of the rooms 900 to 902 does the camera return after 3 to 5",
        ),
        ("--checkpoint nowhere", "nowhere does not exist"),
    ],
)
def test_what_cannot_be_measured_is_refused_in_one_line(flags, named, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(loop_world, "SEARCHED", 3)  # else two hundred
    assert main([*flags.split(), "--rows", "causal", "--out", str(tmp_path)]) == 1
    told = capsys.readouterr().err.strip()
    assert told.startswith("cache_quality: ") and named in told and "\n" not in told
