"""A folder described by `case.json`: frames, camera, poses and the unit of depth in one file."""

from __future__ import annotations

import json
from decimal import Decimal
from pathlib import Path
from typing import Any

import numpy as np

from stac_core.evaluation.datasets.sequence import (
    FRAME_PERIOD_NS,
    FileSequence,
    FrameFiles,
    pinhole,
    read_depth_png,
)
from stac_core.evaluation.trajectory import parse_stamp


def recognises(path: Path) -> bool:
    return (path / "case.json").is_file()


def read(path: Path) -> FileSequence:
    """Poses are camera to world in metres; frames without a time are stamped at 30 frames/s."""
    try:
        case = json.loads((path / "case.json").read_text(), parse_float=Decimal)  # stamps lose no digit
        camera = pinhole(*(float(case["camera"][key]) for key in ("fx", "fy", "cx", "cy")))
        frames = [_frame(path, row, index, camera) for index, row in enumerate(case["frames"])]
        units_per_metre = float(case.get("gt", {}).get("depth_scale", 1000.0))
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{path / 'case.json'}: not a case description: {error!r}") from error
    return FileSequence(path.name, frames, lambda file: read_depth_png(file, units_per_metre))


def _frame(path: Path, row: dict[str, Any], index: int, camera: np.ndarray) -> FrameFiles:
    pose = np.array(row["T_wc"], float).reshape(4, 4) if row.get("T_wc") is not None else None
    depth = path / row["depth"] if row.get("depth") else None
    return FrameFiles(path / row["rgb"], _stamp(row, index), depth, pose, camera)


def _stamp(row: dict[str, Any], index: int) -> int:
    """Nanoseconds where they are told, else seconds: a number, or a text with all its digits."""
    if row.get("stamp_ns") is not None:
        return int(str(row["stamp_ns"]))
    return index * FRAME_PERIOD_NS if row.get("t") is None else parse_stamp(str(row["t"]))
