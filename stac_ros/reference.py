"""All parameters of the mapping node as Markdown, from the dataclasses that declare them."""

from __future__ import annotations

import dataclasses
import json
from typing import Any

from stac_core.config import Config
from stac_ros.settings import RosConfig, is_live

_HEAD = """# Parameters of the mapping node

Written by `stac-ros parameters`; the declarations are in `stac_core/config/` and `stac_ros/settings.py`.
Names are those of `ros2 param`, of YAML files and of `-p name:=value` alike.
"""


def parameter_reference() -> str:
    """One table per section: name, default, limits, meaning."""
    lines = [_HEAD]
    for config in (RosConfig(), Config()):
        for section in dataclasses.fields(config):
            values = getattr(config, section.name)
            lines += [
                f"## {section.name}\n",
                f"{_first_line(values)} {_when(section.name, values)}\n",
                "| parameter | default | limits | meaning |",
                "|---|---|---|---|",
            ]
            lines += [_row(section.name, field) for field in dataclasses.fields(values)]
            lines.append("")
    return "\n".join(lines)


def _first_line(section: Any) -> str:
    return (type(section).__doc__ or "").strip().splitlines()[0]


def _when(section: str, values: Any) -> str:
    names = [f"{section}.{field.name}" for field in dataclasses.fields(values)]
    live = [name for name in names if is_live(name)]
    if live == names:
        return "Takes effect while the node runs."
    exceptions = f", but {' and '.join(f'`{name}`' for name in live)} while the node runs" if live else ""
    return f"Takes effect at start{exceptions}."


def _row(section: str, field: dataclasses.Field[Any]) -> str:
    metadata = field.metadata
    default = f"`{json.dumps(field.default)}`"  # as YAML takes it
    unit = f" {metadata['unit']}" if metadata["unit"] else ""
    if metadata["choices"]:
        limits = ", ".join(f"`{choice}`" for choice in metadata["choices"])
    else:
        bounds = [("≥", metadata["minimum"]), ("≤", metadata["maximum"])]
        limits = ", ".join(f"{sign} {bound}" for sign, bound in bounds if bound is not None)
    meaning = metadata["help"].replace("|", "\\|")
    return f"| `{section}.{field.name}` | {default}{unit} | {limits} | {meaning} |"
