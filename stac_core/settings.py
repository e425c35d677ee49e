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


class RefusedSetting(ValueError):
    """A value that does not work. The setting goes by the name of its class, or is `told_as` another's."""

    def __init__(self, section: type[Any], name: str, value: Any, why: str) -> None:
        super().__init__(section, name, value, why)
        self.section, self._told = section, f".{name} = {value!r}: {why}"

    def __str__(self) -> str:
        return self.told_as(self.section.__name__)

    def told_as(self, section: str) -> str:
        """The same where users know the section by this name."""
        return section + self._told


def check_settings(section: Any) -> None:
    """Raise RefusedSetting for the first setting of a dataclass instance outside its limits.

    The message holds the setting's name, the value and the nearest value that works.
    """
    for field in dataclasses.fields(section):
        if field.metadata:
            value = getattr(section, field.name)
            if why := _fault(field, value):
                raise RefusedSetting(type(section), field.name, value, why)


def refuse(section: Any, name: str, why: str, nearest: Any) -> RefusedSetting:
    """The error of a rule that spans several settings, worded like `check_settings`."""
    why = f"{why}; nearest value that works: {nearest!r}"
    return RefusedSetting(type(section), name, getattr(section, name), why)


def _fault(field: dataclasses.Field[Any], value: Any) -> str:
    """What is wrong with the value of a setting; empty = nothing."""
    expected, choices = type(field.default), field.metadata["choices"]
    if expected is float and type(value) is int:
        value = float(value)
    if not isinstance(value, expected) or (expected is int and isinstance(value, bool)):
        return f"expected {expected.__name__}, got {type(value).__name__}"
    if isinstance(value, float) and not math.isfinite(value):
        return f"must be finite; the default is {field.default!r}"
    if choices is not None and value not in choices:
        return f"choose one of {', '.join(map(repr, choices))}"
    minimum, maximum = field.metadata["minimum"], field.metadata["maximum"]
    if minimum is not None and value < minimum:
        return f"below the minimum; nearest value that works: {minimum!r}"
    if maximum is not None and value > maximum:
        return f"above the maximum; nearest value that works: {maximum!r}"
    return ""


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
