"""Command-line flags made from a settings dataclass: one flag per field, never a second default."""

from __future__ import annotations

import argparse
import dataclasses
from typing import Any, TypeVar

Settings = TypeVar("Settings")


def add_flags(parser: argparse.ArgumentParser, settings: type[Any]) -> None:
    """`--some-name` for every field made by `setting`; switches for booleans."""
    for field in dataclasses.fields(settings):
        flag = "--" + field.name.replace("_", "-")
        unit = f" {field.metadata['unit']}" if field.metadata["unit"] else ""
        text = f"{field.metadata['help']} (default: {field.default!r}{unit})".replace("%", "%%")
        if isinstance(field.default, bool):
            parser.add_argument(flag, help=text, default=field.default, action=argparse.BooleanOptionalAction)
            continue
        parser.add_argument(
            flag,
            help=text,
            default=field.default,
            type=type(field.default),
            choices=field.metadata["choices"],
            metavar=None if field.metadata["choices"] else type(field.default).__name__.upper(),
        )


def read_flags(settings: type[Settings], arguments: argparse.Namespace) -> Settings:
    """The settings of parsed arguments. Raises ValueError for a value outside its limits."""
    names = [field.name for field in dataclasses.fields(settings)]  # type: ignore[arg-type]
    return settings(**{name: getattr(arguments, name) for name in names})
