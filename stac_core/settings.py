"""Declare a setting once: default, help, unit and limits; check it with one wording.

Every configuration dataclass builds its fields with `setting` and calls `check_settings` in
`__post_init__`; command-line flags and ROS parameters are derived from the same metadata.
"""

from __future__ import annotations

import argparse
import dataclasses
import math
from typing import Any, TypeVar

Section = TypeVar("Section")


def setting(
    default: Any,
    help: str,
    *,
    minimum: float | None = None,
    maximum: float | None = None,
    choices: tuple[Any, ...] | None = None,
    unit: str = "",
) -> Any:
    """A dataclass field that knows its description and its limits (both inclusive)."""
    metadata = {"help": help, "minimum": minimum, "maximum": maximum, "choices": choices, "unit": unit}
    return dataclasses.field(default=default, metadata=metadata)


def check_settings(section: Any) -> None:
    """Raise ValueError naming the first setting of a dataclass instance outside its limits.

    The message holds the setting's name, the value and the nearest value that works.
    """
    for field in dataclasses.fields(section):
        if field.metadata:
            _check_one(type(section).__name__, field, getattr(section, field.name))


def refuse(section: Any, name: str, why: str, nearest: Any) -> ValueError:
    """The error of a rule that spans several settings, worded like `check_settings`."""
    value = getattr(section, name)
    return ValueError(
        f"{type(section).__name__}.{name} = {value!r}: {why}; nearest value that works: {nearest!r}"
    )


def _check_one(section: str, field: dataclasses.Field[Any], value: Any) -> None:
    where = f"{section}.{field.name} = {value!r}"
    expected = type(field.default)
    if expected is float and type(value) is int:
        value = float(value)
    if not isinstance(value, expected) or (expected is int and isinstance(value, bool)):
        raise ValueError(f"{where}: expected {expected.__name__}, got {type(value).__name__}")
    if isinstance(value, float) and not math.isfinite(value):
        raise ValueError(f"{where}: must be finite; the default is {field.default!r}")
    choices = field.metadata["choices"]
    if choices is not None and value not in choices:
        raise ValueError(f"{where}: choose one of {', '.join(map(repr, choices))}")
    minimum, maximum = field.metadata["minimum"], field.metadata["maximum"]
    if minimum is not None and value < minimum:
        raise ValueError(f"{where}: below the minimum; nearest value that works: {minimum!r}")
    if maximum is not None and value > maximum:
        raise ValueError(f"{where}: above the maximum; nearest value that works: {maximum!r}")


def add_flags(parser: argparse._ActionsContainer, section: type[Any], separator: str = "-") -> None:
    """`--some-name` for every setting, a switch for a boolean; one that is not given is absent."""
    for field in dataclasses.fields(section):
        flag, text = "--" + field.name.replace("_", separator), flag_help(field)
        if isinstance(field.default, bool):
            switch = argparse.BooleanOptionalAction
            parser.add_argument(flag, action=switch, default=argparse.SUPPRESS, help=text)
            continue
        kind, choices = type(field.default), field.metadata["choices"]
        parser.add_argument(flag, type=kind, choices=choices, default=argparse.SUPPRESS, help=text)


def flag_help(field: dataclasses.Field[Any]) -> str:
    """What a setting is, with its default, for the help of a command."""
    unit = f" {field.metadata['unit']}" if field.metadata["unit"] else ""
    return f"{field.metadata['help']} (default: {field.default!r}{unit})".replace("%", "%%")


def read_flags(section: type[Section], given: argparse.Namespace) -> Section:
    """The section with the flags that were given. Raises ValueError for a value outside its limits."""
    names = [field.name for field in dataclasses.fields(section)]  # type: ignore[arg-type]
    return section(**{name: getattr(given, name) for name in names if hasattr(given, name)})


def in_one_line(error: BaseException) -> str:
    """What an error says, short enough for a log or another message."""
    return (str(error) or type(error).__name__).splitlines()[0][:200]
