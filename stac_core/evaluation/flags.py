"""Command-line flags made from the configuration: one flag per setting, never a second default.

A run is described by what differs from the defaults, as dotted names and texts, for example
`{"cache.mode": "stac"}`; flags, sweeps and result rows all speak this form.
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
from typing import Any

from stac_core.config import Config
from stac_core.settings import flag_help

Overrides = dict[str, str]
_NAMES = {  # flags whose name is not the setting's own
    "model.name": "--base_model",
    "image.rule": "--image_rule",
    "kernels.backend": "--attn_backend",
}
_ALSO = {  # other names of flags: as launch files call it, and short ones
    "model.name": "--model",
    "cache.window_size": "-win",
    "cache.chunk_size": "-ck",
    "cache.hh_size": "-hh",
    "cache.retrieval_size": "-ret_sz",
    "cache.retrieve_buf": "-ret_buf",
    "cache.allocator": "-alloc",
}
_BOOLEANS = {"true": True, "1": True, "yes": True, "false": False, "0": False, "no": False}


def settings_of(config: Config) -> dict[str, dataclasses.Field[Any]]:
    """Every setting by dotted name."""
    return {
        f"{section.name}.{setting.name}": setting
        for section in dataclasses.fields(config)
        for setting in dataclasses.fields(getattr(config, section.name))
    }


def add_config_flags(parser: argparse.ArgumentParser) -> None:
    """One flag per setting of the core; a flag that is not given is absent from the result."""
    group = parser.add_argument_group("settings of the core")
    for dotted, setting in settings_of(Config()).items():
        flag = _NAMES.get(dotted, f"--{setting.name}")
        also = [_ALSO[dotted]] if dotted in _ALSO else []
        choices = setting.metadata["choices"]
        group.add_argument(
            flag,
            *also,
            dest=dotted,
            # not as argparse does it, with commas: some choices hold commas themselves
            metavar="|".join(map(str, choices)) if choices else setting.name.upper(),
            default=argparse.SUPPRESS,
            help=flag_help(setting),
        )


def given_flags(arguments: argparse.Namespace) -> Overrides:
    """The settings named on the command line."""
    return {name: str(value) for name, value in vars(arguments).items() if "." in name}


def configure(overrides: Overrides) -> Config:
    """Defaults with some settings replaced. Raises ValueError naming setting, value and cure."""
    config, known = Config(), settings_of(Config())
    sections: dict[str, dict[str, Any]] = {}
    for dotted, text in overrides.items():
        if dotted not in known:
            raise ValueError(f"no setting {dotted!r}; settings: {', '.join(known)}")
        section, name = dotted.split(".")
        sections.setdefault(section, {})[name] = _parse(dotted, known[dotted].default, text)
    changed = {
        name: dataclasses.replace(getattr(config, name), **values) for name, values in sections.items()
    }
    return dataclasses.replace(config, **changed)


def _parse(dotted: str, default: Any, text: str) -> Any:
    kind = type(default)
    try:
        return _BOOLEANS[text.lower()] if kind is bool else kind(text)
    except (ValueError, KeyError) as error:
        raise ValueError(
            f"{dotted} = {text!r}: expected {kind.__name__}; the default is {default!r}"
        ) from error


def describe(overrides: Overrides) -> str:
    """What differs from the defaults, in one line that is equal for equal runs."""
    known = settings_of(Config())
    values = {name: _parse(name, known[name].default, text) for name, text in overrides.items()}
    differing = {name: value for name, value in values.items() if value != known[name].default}
    return " ".join(f"{name}={value}" for name, value in sorted(differing.items())) or "defaults"


def mode_name(config: Config) -> str:
    """The cache mode as tables call it; one that sees the future must not pass for a stream."""
    mode = config.cache.mode
    return f"{mode} (offline)" if config.cache.rules.offline else mode


def sweep(axes: list[str], base: Overrides) -> list[Overrides]:
    """Every combination of axes such as "cache.mode=stac,causal" on top of base, checked.

    Raises ValueError for an unknown setting or a combination that cannot work, before anything runs.
    """
    choices = []
    for axis in axes:
        name, equals, values = axis.partition("=")
        if not equals or not values:
            raise ValueError(
                f"--sweep {axis!r}: expected setting=value,value, such as cache.mode=stac,causal"
            )
        choices.append([(name, value) for value in values.split(",")])
    runs = [{**base, **dict(combination)} for combination in itertools.product(*choices)]
    for overrides in runs:
        configure(overrides)
    return runs
