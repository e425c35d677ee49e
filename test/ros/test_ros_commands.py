"""Every installed command explains itself, by its own name."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path

import pytest

from stac_core.config import Config
from stac_core.evaluation.flags import settings_of
from stac_ros.mapping_node import main

SETUP = (Path(__file__).resolve().parents[2] / "setup.py").read_text()
COMMANDS = dict(
    line.strip(' ,"').split('": "') for line in SETUP.splitlines() if ":main" in line and '": "' in line
)


def help_of(command: str, monkeypatch, capsys) -> str:
    module, function = COMMANDS[command].split(":")
    monkeypatch.setattr(sys, "argv", [command, "--help"])
    with pytest.raises(SystemExit) as end:
        getattr(importlib.import_module(module), function)()
    assert end.value.code in (0, None)
    return capsys.readouterr().out


@pytest.mark.parametrize("command", COMMANDS)
def test_help_names_the_command_as_it_is_installed(command, monkeypatch, capsys):
    text = help_of(command, monkeypatch, capsys)
    assert text.startswith(f"usage: {command} ") and "python -m" not in text
    assert len(text.splitlines()) > 5


def test_help_tells_choices_apart_though_they_hold_commas(monkeypatch, capsys):
    text = help_of("stac-reconstruct", monkeypatch, capsys)
    for setting in settings_of(Config()).values():
        if choices := setting.metadata["choices"]:
            (line,) = [line for line in text.splitlines() if line.startswith(f"  --{setting.name} ")] or [""]
            if line:  # some flags have other names
                assert line.split()[1].rstrip(",").split("|") == list(map(str, choices)), line
    assert "--when_full spill,coarsen,forget|coarsen,spill,forget|forget" in text


def test_the_node_refuses_arguments_that_nobody_would_read(capsys):
    with pytest.raises(SystemExit) as end:
        main(["--device", "cpu", "--ros-args", "-p", "model.device:=quantum"])
    assert end.value.code == 2
    assert "unrecognized arguments: --device cpu" in capsys.readouterr().err
