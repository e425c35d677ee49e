"""Files are whole or not there at all; point clouds are judged by Open3D."""

import os
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from stac_core.files import replacing, write_whole
from stac_core.ply import write_ply


def test_text_and_bytes_arrive_in_folders_made_for_them(tmp_path):
    write_whole(tmp_path / "a" / "b" / "text", "δ < 1.25\n")
    write_whole(tmp_path / "a" / "bytes", b"\x00\xff")
    assert (tmp_path / "a" / "b" / "text").read_text(encoding="utf-8") == "δ < 1.25\n"
    assert (tmp_path / "a" / "bytes").read_bytes() == b"\x00\xff"


def test_a_failure_leaves_the_old_file_and_nothing_else(tmp_path):
    path = tmp_path / "map.ply"
    write_whole(path, b"old")
    with pytest.raises(KeyboardInterrupt), replacing(path) as temporary:
        temporary.write_bytes(b"half")
        raise KeyboardInterrupt
    assert path.read_bytes() == b"old" and list(tmp_path.iterdir()) == [path]


def test_a_full_disk_is_told_with_the_file_that_was_to_be_written(tmp_path, monkeypatch):
    def full(descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match=rf"No space left on device: '{tmp_path}/map.ply'$"):
        write_whole(tmp_path / "map.ply", b"new")
    assert not list(tmp_path.iterdir())


def test_a_folder_that_cannot_be_written_to_is_named_with_the_file():
    with pytest.raises(OSError, match=r"'/proc/map.ply'$"):
        write_whole(Path("/proc/map.ply"), b"new")


def test_two_writers_of_one_file_do_not_mix(tmp_path):
    path = tmp_path / "map.ply"
    with replacing(path) as slow:
        slow.write_bytes(b"first half, ")
        write_whole(path, b"the other")
        with slow.open("ab") as file:
            file.write(b"second half")
    assert path.read_bytes() == b"first half, second half"


@pytest.mark.parametrize("coloured", [True, False])
@pytest.mark.parametrize("count", [0, 500])
def test_open3d_reads_a_written_cloud(tmp_path, coloured, count):
    open3d = pytest.importorskip("open3d")
    random = np.random.default_rng(3)
    points = random.normal(size=(count, 3)).astype(np.float32)
    colours = random.integers(0, 256, (count, 3), np.uint8) if coloured else None
    write_ply(tmp_path / "maps" / "map.ply", points, colours)
    cloud = open3d.io.read_point_cloud(str(tmp_path / "maps" / "map.ply"))
    assert np.array_equal(np.asarray(cloud.points, np.float32), points)
    if coloured and count:
        assert np.array_equal(np.rint(np.asarray(cloud.colors) * 255).astype(np.uint8), colours)
    assert [path.name for path in (tmp_path / "maps").iterdir()] == ["map.ply"]


def test_a_file_may_be_read_by_whom_any_other_may(tmp_path):
    """Also where a library writes it, for itself alone."""
    (tmp_path / "plain").write_text("")
    with replacing(tmp_path / "ours") as temporary:
        save_file({"a": np.zeros(3)}, temporary)
        temporary.chmod(0o600)
    assert (tmp_path / "ours").stat().st_mode == (tmp_path / "plain").stat().st_mode
    assert np.array_equal(load_file(tmp_path / "ours")["a"], np.zeros(3))
