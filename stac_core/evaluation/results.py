"""Result rows on disk: one per scene, there the moment it exists, found again by the next run."""

from __future__ import annotations

import csv
import fcntl
import hashlib
import io
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from stac_core.files import write_whole

Row = dict[str, Any]
MIB = 2**20  # columns named mib are in these
# What makes two rows the same experiment.
KEY = ("task", "dataset", "scene", "source", "model_name", "settings", "measured", "weights")

_MAIN = {  # the figures that are told at the end
    "ate_rmse": "ATE {:.4g} m",
    "rpe_rmse": "RPE {:.4g} m",
    "abs_rel": "AbsRel {:.4g}",
    "f_score": "F-score {:.4g}",
    "latency_median_ms": "latency {:.4g} ms",
}


class ResultTable:
    """`rows.jsonl` (the record) and `rows.csv` (for spreadsheets) in one folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.rows = read_rows(folder / "rows.jsonl")

    def find(self, key: Row, unknown: str = "") -> Row | None:
        """The first whole row with these KEY columns, one of which may not be known yet."""
        names = [name for name in KEY if name != unknown]
        whole = (row for row in self.rows if not row.get("failed"))
        return next((row for row in whole if all(row.get(name) == key.get(name) for name in names)), None)

    def add(self, row: Row) -> None:
        """Append one row and write both files. Raises ValueError where a KEY column is missing.

        A row whose column "failed" says what is missing in it gives way to the next one with its KEY. Rows
        that other programs have written meanwhile stay.
        """
        missing = [name for name in KEY if name not in row]
        if missing:
            raise ValueError(f"result row without {', '.join(missing)}")
        with _alone(self.folder):
            there = read_rows(self.folder / "rows.jsonl")
            self.rows = [old for old in there if any(old.get(name) != row[name] for name in KEY)] + [row]
            lines = [json.dumps(_plain(row), allow_nan=False) for row in self.rows]
            write_whole(self.folder / "rows.jsonl", "\n".join(lines) + "\n")
            write_whole(self.folder / "rows.csv", to_csv(self.rows))


def digest(key: Row) -> str:
    """A short name for one experiment, so that runs of one scene do not share a folder."""
    return hashlib.sha256(repr(sorted(key.items())).encode()).hexdigest()[:8]


@contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """Nobody else is between reading and writing the rows of a folder, which is made."""
    folder.mkdir(parents=True, exist_ok=True)
    opened = os.open(folder, os.O_RDONLY)
    try:
        with suppress(OSError):  # some network file systems know no locks
            fcntl.flock(opened, fcntl.LOCK_EX)
        yield
    finally:
        os.close(opened)


def read_rows(path: Path) -> list[Row]:
    """Rows of one file, [] where there is none. Raises ValueError naming a damaged line."""
    if not path.is_file():
        return []
    rows = []
    for number, line in enumerate(path.read_text().splitlines(), 1):
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise ValueError(f"{path}:{number}: not a result row ({error}); move the file away") from error
        if not isinstance(row, dict):
            raise ValueError(f"{path}:{number}: not a result row ({line}); move the file away")
        rows.append(row)
    return rows


def in_one_line(row: Row) -> str:
    """What was run and the main figures that it has, for people who wait at a terminal."""
    told = [text.format(row[name]) for name, text in _MAIN.items() if row.get(name) is not None]
    used, sent = row.get("frames_used", row.get("frames")), row.get("frames_sent", row.get("frames"))
    frames = f"{used} frames" if used == sent else f"{used} of {sent} frames"
    return f"{row['scene']} [{row['settings']}]: {', '.join([*told, frames])}"


def columns(rows: list[Row]) -> list[str]:
    """Every column of any row, in order of first appearance."""
    return list(dict.fromkeys(name for row in rows for name in row))


def to_csv(rows: list[Row]) -> str:
    text = io.StringIO()
    writer = csv.DictWriter(text, columns(rows), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()


def to_markdown(rows: list[Row], names: list[str]) -> str:
    """A Markdown table of the named columns; numbers with four significant digits, gaps as –."""
    lines = [f"| {' | '.join(names)} |", f"|{' --- |' * len(names)}"]
    for row in rows:
        lines.append(f"| {' | '.join(_cell(row.get(name)) for name in names)} |")
    return "\n".join(lines) + "\n"


def _cell(value: object) -> str:
    if value is None or value == "":
        return "–"
    if isinstance(value, float):
        return f"{value:.4g}"
    return " ".join(str(value).replace("|", "\\|").split())


def _plain(row: Row) -> Row:
    """JSON has no infinity and no NaN; both are written as null."""
    return {
        name: None if isinstance(value, float) and value - value != 0 else value
        for name, value in row.items()
    }
