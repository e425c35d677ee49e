"""One self-contained page out of a report: tables and pictures, no script, nothing to fetch."""

from __future__ import annotations

from html import escape
from typing import Any

from stac_core.evaluation.bag_report import BagReport

_STYLE = """
body { font: 15px/1.45 system-ui, sans-serif; max-width: 1080px; color: #222;
       margin: 2rem auto; padding: 0 1rem }
h1 { font-size: 1.5rem } h2 { font-size: 1.1rem; margin-top: 2rem }
table { border-collapse: collapse } td { padding: .15rem .9rem .15rem 0; border-bottom: 1px solid #e4e4e4 }
td:last-child { text-align: right; font-variant-numeric: tabular-nums }
.sections { display: flex; flex-wrap: wrap; gap: 0 3rem } .note { color: #8a4b00 }
.pictures { display: flex; flex-wrap: wrap; gap: 1rem; margin-top: 2rem }
figure { margin: 0; flex: 0 1 33rem } img { width: 100% }
"""


def to_html(title: str, facts: dict[str, Any], report: BagReport) -> str:
    """The page as text. facts: what was run, shown on top."""
    sections = "".join(_section(name, values) for name, values in report.figures.items())
    notes = "".join(
        f'<p class="note">{escape(name)}: not judged, {escape(why)}</p>'
        for name, why in (report.untold | report.failed).items()
    )
    pictures = "".join(
        f'<figure><img alt="{escape(name)}" src="data:image/png;base64,{data}"></figure>'
        for name, data in report.pictures.items()
    )
    return (
        f'<!doctype html><html lang="en"><meta charset="utf-8"><title>{escape(title)}</title>'
        f"<style>{_STYLE}</style><h1>{escape(title)}</h1>{_table(facts)}{notes}"
        f'<div class="sections">{sections}</div><div class="pictures">{pictures}</div></html>\n'
    )


def _section(name: str, values: dict[str, Any]) -> str:
    return f"<section><h2>{escape(name.capitalize())}</h2>{_table(values)}</section>"


def _table(values: dict[str, Any]) -> str:
    rows = "".join(
        f"<tr><td>{escape(name)}</td><td>{_number(value)}</td></tr>" for name, value in values.items()
    )
    return f"<table>{rows}</table>"


def _number(value: Any) -> str:
    if not isinstance(value, float):
        return escape(str(value))
    return f"{value:,.0f}" if value.is_integer() else f"{value:.5g}"
