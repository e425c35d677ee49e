"""Command-line flags made from settings: names, help, switches, and what is not given."""

from __future__ import annotations

import argparse
from dataclasses import dataclass

import pytest

from stac_core.settings import add_flags, check_settings, read_flags, setting


@dataclass(frozen=True)
class Example:
    frames_kept: int = setting(4, "0.3 % of memory each", minimum=1, unit="frames")
    rule: str = setting("crop", "how", choices=("crop", "pad"))
    loop: bool = setting(True, "begin again")

    def __post_init__(self) -> None:
        check_settings(self)


def read(*given: str, separator: str = "-") -> Example:
    parser = argparse.ArgumentParser()
    add_flags(parser, Example, separator)
    return read_flags(Example, parser.parse_args(given))


def test_what_is_not_given_keeps_its_default():
    assert read() == Example()
    assert read("--frames-kept", "9", "--no-loop") == Example(frames_kept=9, loop=False)
    assert read("--frames_kept", "9", "--loop", separator="_") == Example(frames_kept=9)


def test_values_outside_the_limits_are_refused(capsys):
    with pytest.raises(ValueError, match="frames_kept = 0"):
        read("--frames-kept", "0")
    for wrong in (("--rule", "stretch"), ("--loop", "false"), ("--frames-kept", "few")):
        with pytest.raises(SystemExit):
            read(*wrong)
        assert wrong[1] in capsys.readouterr().err


def test_help_shows_percent_signs_units_and_defaults(capsys):
    with pytest.raises(SystemExit):
        read("--help")
    shown = capsys.readouterr().out
    assert "0.3 % of memory each (default: 4 frames)" in shown and "--no-loop" in shown
    assert "{crop,pad}" in shown
