"""The command behind `stac-eval bag`, as far as it refuses to begin."""

from __future__ import annotations

import sys

import pytest
from ros_recordings import write_bag

from stac_ros.bag_evaluation import main


@pytest.mark.parametrize("kind", ["folder", "file"])
def test_what_is_no_recording_is_not_replaced(tmp_path, monkeypatch, caplog, kind):
    result = tmp_path / "result"
    kept = result / "notes.txt" if kind == "folder" else result
    kept.parent.mkdir(exist_ok=True)
    kept.write_text("mine")
    words = ["bag_evaluation", str(write_bag(tmp_path / "bag", 1)), str(result)]
    monkeypatch.setattr(sys, "argv", words)
    assert main() == 1
    assert f"{result} is no recording and stays" in caplog.text and kept.read_text() == "mine"


def test_where_nothing_can_be_written_nothing_is_played(tmp_path, monkeypatch, caplog):
    (tmp_path / "file").write_text("in the way")
    result = tmp_path / "file" / "result"
    words = ["bag_evaluation", str(write_bag(tmp_path / "bag", 1)), str(result)]
    monkeypatch.setattr(sys, "argv", words)
    assert main() == 1
    assert f"{result} cannot be written: " in caplog.text
