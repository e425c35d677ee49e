"""From measured rows to the tables of `cache_quality`."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence

from stac_core.evaluation.cache_rows import DEFAULT, DEFAULT_ALONE, ROWS
from stac_core.evaluation.results import MIB
from stac_core.evaluation.results import Row as Result

YARDSTICK = "tokens_after_loop"
Columns = dict[str, tuple[str, float, int]]  # column of a result → heading, factor, digits
TO_REFERENCE: Columns = {
    "cache_bytes": ("MiB", 1 / MIB, 1),
    YARDSTICK: ("tokens %", 100.0, 1),
    "depth_after_loop": ("depth %", 100.0, 1),
    "rotation_after_loop": ("rotation °", 1.0, 1),
    "centre_after_loop": ("centre %", 100.0, 1),
    "points_after_loop": ("points %", 100.0, 0),
}
TO_TRUTH: Columns = {
    "abs_rel": ("AbsRel", 1.0, 3),
    "rotation_deg": ("rotation °", 1.0, 1),
    "ate_share": ("ATE % of path", 100.0, 2),
    "accuracy": ("accuracy m", 1.0, 2),
    "completeness": ("completeness m", 1.0, 2),
    "cpu_ms_per_frame": ("CPU ms/frame", 1.0, 0),
}
GROUPS = {
    "modes": "Modes and their parts",
    "storage": "Bits of each store",
    "switches": "Every switch against the default",
    "chunk": "Chunks of one frame (reference: causal in chunks of one)",
}


def tables(results: Sequence[Result]) -> str:
    """Markdown: for each group one table against the reference run and one against the truth."""
    parts = []
    for group, title in GROUPS.items():
        names = [n for n, row in ROWS.items() if row.group == group and _of(results, n)]
        if group in ("storage", "switches") and _of(results, DEFAULT):
            names = [DEFAULT, *names]
        if names:
            parts += [
                f"### {title}",
                "Distance to the reference after the loop has closed, world by world:",
                _table(results, names, TO_REFERENCE, compared=True),
                "Against the truth:",
                _table(results, names, TO_TRUTH),
            ]
    return "\n\n".join(parts) + "\n"


def against_default(results: Sequence[Result], name: str) -> tuple[float, int, int]:
    """Geometric mean over worlds of a row's yardstick over the default's; worlds it wins, worlds in all."""
    default = _default(name)
    baseline = {row["scene"]: row[YARDSTICK] for row in _of(results, default)}
    ratios = [
        row[YARDSTICK] / baseline[row["scene"]] for row in _of(results, name) if baseline.get(row["scene"])
    ]
    if not ratios or not all(ratios):
        return math.nan, 0, len(ratios)
    return statistics.geometric_mean(ratios), sum(ratio < 1 for ratio in ratios), len(ratios)


def _table(results: Sequence[Result], names: Sequence[str], columns: Columns, compared: bool = False) -> str:
    headings = [heading for heading, _, _ in columns.values()]
    headings += ["against the default"] if compared else []
    lines = ["| row | " + " | ".join(headings) + " |", "|---" * (len(headings) + 1) + "|"]
    for name in names:
        rows = _of(results, name)
        cells = [
            " · ".join(f"{row[column] * factor:.{digits}f}" for row in rows)
            for column, (_, factor, digits) in columns.items()
        ]
        if compared:
            ratio, better, worlds = against_default(results, name)
            told = name != _default(name) and not math.isnan(ratio)
            cells.append(f"×{ratio:.2f}, better in {better} of {worlds}" if told else "–")
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _default(name: str) -> str:
    """The row that this one is compared with."""
    return DEFAULT_ALONE if ROWS[name].group == "chunk" else DEFAULT


def _of(results: Sequence[Result], name: str) -> list[Result]:
    return [row for row in results if row["row"] == name]
