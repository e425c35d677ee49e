"""Settings dataclasses ↔ ROS parameters: one parameter per field, named section.field."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import fields
from operator import attrgetter
from typing import Any, TypeVar

from rcl_interfaces.msg import (
    FloatingPointRange,
    IntegerRange,
    ParameterDescriptor,
    SetParametersResult,
)
from rclpy.node import Node
from rclpy.parameter import Parameter

from stac_core.config import Config
from stac_core.settings import RefusedSetting
from stac_ros.settings import RosConfig, class_of, is_live, settings_of, unknown

Sections = TypeVar("Sections", Config, RosConfig)
_LARGEST_INTEGER = 2**63 - 1
_SECTIONS = {
    class_of(section): section.name for sections in (Config, RosConfig) for section in fields(sections)
}
_OF_ROS = ("use_sim_time", "start_type_description_service")  # and qos_overrides.*


@contextmanager
def told_as_parameters() -> Iterator[None]:
    """A setting that is refused has the name of its parameter."""
    try:
        yield
    except RefusedSetting as refused:
        section = _SECTIONS.get(refused.section, refused.section.__name__)
        raise ValueError(refused.told_as(section)) from refused


class Parameters:
    """The node's settings, always valid: `core` as at start, `ros` as last set.

    The node must have been made with `automatically_declare_parameters_from_overrides`, because only then
    names can be seen that nobody knows. ValueError names every such parameter, or a value that is refused.
    """

    def __init__(self, node: Node) -> None:
        self._node = node
        self._fields = settings_of(Config, RosConfig)
        given = _take_given(node, self._fields)
        self.core, self.ros = _build(Config, given), _build(RosConfig, given)
        values = _values(self.core) | _values(self.ros)
        for name, setting in self._fields.items():
            # Not the given value again but the one built from it: YAML's 1 has become a setting's 1.0.
            node.declare_parameter(name, values[name], _descriptor(name, setting), ignore_override=True)
        node.add_on_set_parameters_callback(self._check)
        node.add_post_set_parameters_callback(self._take)

    def describe(self) -> str:
        """The effective configuration, a line per section; * marks what is not the default."""
        lines: dict[str, list[str]] = {}
        for name, setting in self._fields.items():
            section, key = name.split(".")
            value = self._node.get_parameter(name).value
            star = "" if value == setting.default else "*"
            lines.setdefault(section, []).append(f"{star}{key}={value!r}")
        return "\n".join(f"  {section}: {' '.join(values)}" for section, values in lines.items())

    def _check(self, parameters: list[Parameter]) -> SetParametersResult:
        changes = {parameter.name: parameter.value for parameter in parameters}
        try:
            _build(RosConfig, _values(self.ros) | changes)
        except ValueError as error:
            return SetParametersResult(successful=False, reason=str(error))
        return SetParametersResult(successful=True)

    def _take(self, parameters: list[Parameter]) -> None:
        changes = {parameter.name: parameter.value for parameter in parameters}
        self.ros = _build(RosConfig, _values(self.ros) | changes)


def _build(sections: type[Sections], given: dict[str, Any]) -> Sections:
    """The dataclasses of the given values, defaults elsewhere; ValueError if they refuse."""
    with told_as_parameters():
        return sections(**{one.name: _section(one, given) for one in fields(sections)})


def _section(section: dataclasses.Field[Any], given: dict[str, Any]) -> Any:
    names = [f"{section.name}.{setting.name}" for setting in fields(class_of(section))]
    return class_of(section)(**{name.split(".")[1]: given[name] for name in names if name in given})


def _values(config: Config | RosConfig) -> dict[str, Any]:
    """Every value by its dotted name."""
    return {name: attrgetter(name)(config) for name in settings_of(type(config))}


def _take_given(node: Node, known: dict[str, dataclasses.Field[Any]]) -> dict[str, Any]:
    """The values given by YAML and command line; ValueError naming every name that is no setting."""
    given, problems = {}, []
    for name in map(str, node.list_parameters([], 0).names):
        if name in known:
            given[name] = _as_wanted(node.get_parameter(name).value, known[name].default)
            node.undeclare_parameter(name)  # declared again, with its description and limits
        elif name not in _OF_ROS and not name.startswith("qos_overrides."):
            problems.append(unknown(name, known))
    if problems:
        raise ValueError(f"unknown parameters: {', '.join(problems)}; remove them or correct the names")
    return given


def _as_wanted(value: Any, default: Any) -> Any:
    """To YAML 1e9 is a float and 1 an integer, whichever of the two is wanted; a message takes no other."""
    if type(default) is float and type(value) is int:
        return float(value)
    wanted = type(default) is int and isinstance(value, float) and value.is_integer()
    return int(value) if wanted else value


def _descriptor(name: str, setting: dataclasses.Field[Any]) -> ParameterDescriptor:
    metadata = setting.metadata
    unit = f" [{metadata['unit']}]" if metadata["unit"] else ""
    found = ParameterDescriptor(name=name, description=metadata["help"] + unit)
    found.read_only = not is_live(name)
    if metadata["choices"] is not None:
        found.additional_constraints = "one of " + ", ".join(map(repr, metadata["choices"]))
    minimum, maximum = metadata["minimum"], metadata["maximum"]
    if minimum is None and maximum is None:
        return found
    if isinstance(setting.default, float):
        largest = sys.float_info.max
        low, high = -largest if minimum is None else minimum, largest if maximum is None else maximum
        found.floating_point_range = [FloatingPointRange(from_value=float(low), to_value=float(high))]
    else:
        low = -_LARGEST_INTEGER if minimum is None else minimum
        high = _LARGEST_INTEGER if maximum is None else maximum
        found.integer_range = [IntegerRange(from_value=int(low), to_value=int(high))]
    return found
