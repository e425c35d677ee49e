"""Tables and plot of a run: whole rows, and no run ends for their sake."""

import csv
import os
import resource

import pytest

from stac_core.training.progress import Progress, append_row

ROW = {"step": 10, "time": 0, "depth": 0.25, "rotation_deg": 3.5}


@pytest.fixture
def progress(tmp_path):
    progress = Progress(tmp_path, first_step=0, steps=20, log_every=1, shown=False)
    yield progress
    progress.close()


def full(descriptor: int) -> None:
    raise OSError(28, "No space left on device")


def test_held_out_rows_are_kept_and_plotted(tmp_path, progress):
    for step in (10, 20):
        progress.add_held_out({**ROW, "step": step})
    lines = (tmp_path / "held_out.csv").read_text().split()
    assert lines == ["step,time,depth,rotation_deg", "10,0,0.25,3.5", "20,0,0.25,3.5"]
    assert (tmp_path / "held_out.png").read_bytes().startswith(b"\x89PNG")


def test_a_plot_on_a_full_disk_is_one_warning_and_the_old_one_stays(tmp_path, progress, monkeypatch, caplog):
    progress.add_held_out(ROW)
    before = (tmp_path / "held_out.png").read_bytes()
    monkeypatch.setattr(os, "fsync", full)
    for step in (20, 30):
        progress.add_held_out({**ROW, "step": step})
    assert caplog.text.count("the run goes on") == 1
    assert (tmp_path / "held_out.png").read_bytes() == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["held_out.csv", "held_out.png"]


def test_a_row_of_other_figures_stands_below_their_names(tmp_path, progress):
    for row in (ROW, {"step": 20, "time": 1, "rotation_deg": 2.5, "trajectory": 0.1}, {**ROW, "step": 30}):
        progress.add_held_out(row)
    with (tmp_path / "held_out.csv").open() as file:
        table = list(csv.DictReader(file))
    assert [row["step"] for row in table] == ["10", "20", "30"]
    assert [row["depth"] for row in table] == ["0.25", "", "0.25"]
    assert [row["rotation_deg"] for row in table] == ["3.5", "2.5", "3.5"]
    assert [row["trajectory"] for row in table] == ["", "0.1", ""]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["held_out.csv", "held_out.png"]


@pytest.mark.parametrize("rows_before", [0, 1])
def test_a_row_that_does_not_fit_leaves_the_table_as_it_was(tmp_path, rows_before):
    path = tmp_path / "table.csv"
    path.touch()
    for _ in range(rows_before):
        append_row(path, ROW)
    before, limits = path.read_bytes(), resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (len(before) + 3, limits[1]))
    try:
        with pytest.raises(OSError, match="too large"):
            append_row(path, ROW)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert path.read_bytes() == before
    append_row(path, ROW)
    assert path.read_text().split() == ["step,time,depth,rotation_deg"] + (rows_before + 1) * [
        "10,0,0.25,3.5"
    ]
