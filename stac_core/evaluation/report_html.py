"""One self-contained page out of a report: tables and pictures, no script, nothing to fetch."""

from __future__ import annotations

import base64
import io
from collections.abc import Iterable
from html import escape
from typing import Any

from matplotlib.figure import Figure

from stac_core.evaluation.bag_report import BagReport
from stac_core.evaluation.plots import close

_UNITS = {  # beside the title of a section
    "latency": "image sent → pose heard",
    "pose": "m, deg",
    "depth": "m; shares of 1",
    "cloud": "m; shares of 1",
}

_STYLE = """
body { font: 15px/1.45 system-ui, sans-serif; max-width: 1080px; color: #222;
       margin: 2rem auto; padding: 0 1rem }
h1 { font-size: 1.5rem } h2 { font-size: 1.1rem; margin-top: 2rem }
table { border-collapse: collapse } td { padding: .15rem .9rem .15rem 0; border-bottom: 1px solid #e4e4e4 }
section td:last-child { text-align: right; font-variant-numeric: tabular-nums }
.sections { display: flex; flex-wrap: wrap; gap: 0 3rem } .note { color: #8a4b00 }
.pictures { display: flex; flex-wrap: wrap; gap: 1rem; margin-top: 2rem }
figure { margin: 0 } .narrow { flex: 0 1 32rem } .wide { flex: 0 1 100% } img { width: 100% }
small { color: #777; font-weight: normal }
"""


def to_html(
    title: str, facts: dict[str, Any], report: BagReport, pictures: Iterable[tuple[str, Figure]]
) -> str:
    """The page as text; the figures are closed. facts: what was run, shown on top."""
    sections = "".join(_section(name, values) for name, values in report.figures.items())
    notes = "".join(
        f'<p class="note">{escape(name)}: not judged, {escape(why)}</p>'
        for name, why in (report.untold | report.failed).items()
    )
    shown = "".join(_picture(name, figure) for name, figure in pictures)
    return (
        f'<!doctype html><html lang="en"><meta charset="utf-8"><title>{escape(title)}</title>'
        f"<style>{_STYLE}</style><h1>{escape(title)}</h1>{_table(facts)}{notes}"
        f'<div class="sections">{sections}</div><div class="pictures">{shown}</div></html>\n'
    )


def _section(name: str, values: dict[str, Any]) -> str:
    unit = f" <small>({escape(_UNITS[name])})</small>" if name in _UNITS else ""
    return f"<section><h2>{escape(name.capitalize())}{unit}</h2>{_table(values)}</section>"


def _picture(name: str, figure: Figure) -> str:
    """A wide one takes a line of its own."""
    content = io.BytesIO()
    figure.savefig(content, format="png", dpi=110)
    kind = "wide" if figure.get_figwidth() > 8 else "narrow"
    close(figure)
    data = base64.b64encode(content.getvalue()).decode()
    return f'<figure class="{kind}"><img alt="{escape(name)}" src="data:image/png;base64,{data}"></figure>'


def _table(values: dict[str, Any]) -> str:
    rows = "".join(
        f"<tr><td>{escape(name)}</td><td>{_number(value)}</td></tr>" for name, value in values.items()
    )
    return f"<table>{rows}</table>"


def _number(value: Any) -> str:
    if not isinstance(value, float):
        return escape(str(value))
    return f"{value:,.0f}" if value.is_integer() else f"{value:.5g}"
