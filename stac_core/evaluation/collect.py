"""Gather the rows of many runs into one table per task, with plots of quality, bytes and time."""

from __future__ import annotations

import csv
from pathlib import Path

from matplotlib.figure import Figure

from stac_core.evaluation.plots import line_plot, scatter_plot
from stac_core.evaluation.results import Row, read_rows, to_csv, to_markdown
from stac_core.evaluation.visualise import save_figure
from stac_core.files import write_whole

QUALITY = {"pose": "ate_rmse", "depth": "abs_rel", "recon": "f_score", "bag": "ate_rmse"}
_SHOWN = [
    "ate_rmse", "rpe_rmse", "rpe_rotation_rmse_deg", "abs_rel", "sq_rel", "depth_rmse", "log_rmse", "delta_1",
    "accuracy_mean", "accuracy_median", "completeness_mean", "completeness_median", "normal_consistency",
    "f_score", "latency_median_ms", "latency_p95_ms", "frames_used", "frames_dropped", "step_ms_median",
    "step_ms_p95", "cache_mib_max", "failed",
]  # fmt: skip
_WHAT = [
    "dataset", "scene", "source", "model_name", "mode", "settings", "measured", "weights", "ran_on",
    "version", "frames",
]  # fmt: skip


def find_rows(folders: list[Path]) -> list[tuple[Path, Row]]:
    """Every row below the folders once, with the folder of its run.

    Raises FileNotFoundError for a folder that is not there, ValueError where there is no row.
    """
    for folder in folders:
        if not folder.is_dir():
            raise FileNotFoundError(f"{folder}: no such folder, no rows.jsonl below it")
    files = sorted({file for folder in folders for file in folder.resolve().rglob("rows.jsonl")})
    rows = [(file.parent, row) for file in files for row in read_rows(file)]
    if not rows:
        raise ValueError(
            f"no rows.jsonl below {', '.join(map(str, folders))}; run stac-eval recon, pose or depth first"
        )
    return rows


def collect(folders: list[Path], output: Path) -> list[Path]:
    """Write `table.md`, `table_<task>.csv` and the plots; returns the files written."""
    found = find_rows(folders)
    written, markdown = [], []
    for task in sorted({row["task"] for _, row in found}):
        rows = [row for _, row in found if row["task"] == task]
        markdown.append(f"## {task}\n\n{shared_facts(rows)}{to_markdown(rows, shown_columns(rows))}")
        write_whole(output / f"table_{task}.csv", to_csv(rows))
        written.append(output / f"table_{task}.csv")
        written += _save(output / f"quality_{task}.png", quality_against_bytes(task, rows))
    written += _save(output / "time.png", time_against_frame(found))
    write_whole(output / "table.md", "\n".join(markdown))
    return [output / "table.md", *written]


def shown_columns(rows: list[Row]) -> list[str]:
    """The columns of the Markdown table: what differs, the mode, and measures that any row has.

    The CSV holds all there is.
    """
    what = [name for name in _WHAT if name not in _shared(rows)]
    if len(_different(rows, "dataset", "scene")) == len(_different(rows, "dataset", "scene", "source")):
        what = [name for name in what if name != "source"]  # long, and tells nothing that the scene does not
    return what + [name for name in _SHOWN if any(row.get(name) is not None for row in rows)]


def shared_facts(rows: list[Row]) -> str:
    """A line about what all rows have in common."""
    facts = [f"{name} {rows[0][name]}" for name in _shared(rows) if rows[0].get(name) is not None]
    return f"{', '.join(facts)}\n\n" if facts else ""


def _shared(rows: list[Row]) -> list[str]:
    """Columns that would say the same in every row of a table of several."""
    if len(rows) < 2:
        return []
    return [name for name in _WHAT if name != "mode" and len(_different(rows, name)) == 1]


def _different(rows: list[Row], *names: str) -> set[tuple[str, ...]]:
    """The values of these columns that are in any row."""
    return {tuple(str(row.get(name)) for name in names) for row in rows}


def labels(rows: list[Row]) -> list[str]:
    """A short name per row, which no other has: only what distinguishes it from the others."""
    chosen: list[str] = []
    for name in (
        "scene",
        "model_name",
        "mode",
        "settings",
        "task",
        "measured",
        "weights",
        "ran_on",
        "version",
        "source",
    ):
        if len(_different(rows, *chosen)) < len(rows) and len(_different(rows, name)) > 1:
            chosen.append(name)
    names = [" ".join(str(row.get(name)) for name in chosen or ["scene"]) for row in rows]
    earlier = [names[:number].count(name) for number, name in enumerate(names)]  # copies of one row
    return [f"{name} ({count + 1})" if count else name for name, count in zip(names, earlier, strict=True)]


def quality_against_bytes(task: str, rows: list[Row]) -> Figure | None:
    """One point per row, one series per mode."""
    measure = QUALITY.get(task, "")
    series: dict[str, tuple[list[float], list[float]]] = {}
    for row in rows:
        if row.get(measure) is not None and row.get("cache_mib_max") is not None:
            x, y = series.setdefault(str(row["mode"]), ([], []))
            x.append(row["cache_mib_max"])
            y.append(row[measure])
    if not series:
        return None
    label = f"{measure} (m)" if measure == "ate_rmse" else measure
    return scatter_plot(series, "cache, most at any step (MiB)", label, f"{task}: quality against bytes")


def time_against_frame(found: list[tuple[Path, Row]]) -> Figure | None:
    """Step time per frame of every scene that kept its `frames.csv`."""
    timed = [(folder / row["frames_file"], row) for folder, row in found if row.get("frames_file")]
    timed = [(file, row) for file, row in timed if file.is_file()]  # they may have been deleted
    series = {}
    for (file, _), label in zip(timed, labels([row for _, row in timed]), strict=True):
        with file.open() as lines:
            steps = list(csv.DictReader(lines))
        series[label] = ([float(step["frame"]) for step in steps], [float(step["step_ms"]) for step in steps])
    return line_plot(series, "frame", "ms per frame", "Time against frame number") if series else None


def _save(path: Path, figure: Figure | None) -> list[Path]:
    if figure is None:
        return []
    save_figure(path, figure)
    return [path]
