"""Wrong input of the training's commands ends in one line that names it, and what was there stays."""

from __future__ import annotations

import importlib
import os

import pytest
import torch
from safetensors.torch import save_file

from stac_core.training import train
from stac_core.training.config import TrainingConfig
from stac_core.training.state import FORMAT, State, write_state
from stac_core.training.trainer import Trainer

SMALL = "--first-width 56 --last-width 56 --first-frames 2 --last-frames 2 --clip-frames 3 --clip-width 56 "
SMALL += "--first-clips 2 --patches-per-step 24 --warmup-steps 0 --execution eager --evaluate-every 0 "
SMALL += "--steps 2"


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    """A folder with a damaged state, a damaged file of pickles and a file that is no folder."""
    monkeypatch.chdir(tmp_path)
    os.mkdir("damaged")
    save_file({"a": torch.zeros(9999)}, "damaged/state.safetensors", {"format": FORMAT})
    os.truncate("damaged/state.safetensors", 5000)
    (tmp_path / "file").write_text("text")
    (tmp_path / "weights.pt").write_bytes(b"PK" + bytes(50))


@pytest.mark.parametrize(
    ("command", "flags", "named"),
    [
        ("train", "--steps 5", "TrainingConfig.warmup_steps = 200"),
        ("train", f"{SMALL} --out damaged", "damaged/state.safetensors is damaged"),
        ("train", f"{SMALL} --out file", "'file'"),
        ("train", f"{SMALL} --resume nowhere", "nowhere: no training state"),
        ("train", f"{SMALL} --resume file", "file is damaged or no training state"),
        ("train", f"{SMALL} --weights nowhere.safetensors", "nowhere.safetensors do not exist"),
        ("train", f"{SMALL} --weights weights.pt", "weights.pt cannot be read"),
        ("train", f"{SMALL} --device toaster", "TrainingConfig.device = 'toaster'"),
        ("train", f"{SMALL} --device cuda:99", "TrainingConfig.device = 'cuda:99'"),
        ("train", f"{SMALL} --out nowhere --export-state pieces", "nowhere/state.safetensors"),
        ("clips", "--folder c --count 0", "count = 0"),
        ("clips", "--folder c --count 1 --first -4", "first = -4"),
        ("clips", "--folder c --count 1 --seed -1", "seed = -1"),
        ("clips", "--folder c --count 1 --clip-width 57", "width = 57"),
        ("clips", "--folder c --count 1 --seed 2147483648", "nearest value that works: 2147483647"),
        ("train", f"{SMALL} --seed 2147483648", "nearest value that works: 2147483647"),
        ("camera_head", "--seed 2147483648", "nearest value that works: 2147483647"),
        ("clips", "--folder file --count 1", "'file'"),
        ("evaluate", "--out nowhere", "nowhere/state.safetensors"),
        ("evaluate", "--out damaged", "damaged/state.safetensors is damaged"),
        ("ship", "--out nowhere", "nowhere/state.safetensors"),
        ("ship", "--weights nowhere.safetensors", "nowhere.safetensors do not exist"),
        ("ship", "--weights weights.pt", "weights.pt: its metadata lack"),
        ("ship", "--weights damaged/state.safetensors", "damaged/state.safetensors cannot be read"),
        ("camera_head", "--weights nowhere.safetensors", "nowhere.safetensors do not exist"),
        ("camera_head", "--clip-width 57", "CameraHeadConfig.clip_width = 57"),
        ("camera_head", "--prepare 5 2", "STOP = 2"),
    ],
)
def test_what_is_wrong_is_named_in_one_line(command, flags, named, capsys):
    assert importlib.import_module(f"stac_core.training.{command}").main(flags.split()) == 1
    error = capsys.readouterr().err.strip().splitlines()
    assert named in error[-1] and command in error[-1].split(":")[0]


@pytest.mark.parametrize("clips", ["folder", "memory"])
def test_a_damaged_clip_is_named_and_the_state_is_written(tmp_path, clips, capsys):
    folder = tmp_path / "run" / "clips"
    folder.mkdir(parents=True)
    for number in range(32):
        (folder / f"0-3x56-{number:07d}.safetensors").write_bytes(b"half")
    assert train.main([*SMALL.split(), "--out", "run", "--clips", clips]) == 1
    error = capsys.readouterr().err.splitlines()[-1]
    assert "0-3x56-00000" in error and "is damaged" in error and "remove it" in error
    assert (tmp_path / "run" / "state.safetensors").exists()


def test_an_interrupt_before_the_first_step_is_one_line(monkeypatch, capsys):
    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(Trainer, "__init__", interrupted)
    assert train.main(SMALL.split()) == 130
    assert capsys.readouterr().err.splitlines()[-1] == "stac-train: interrupted"


def test_export_of_a_state_needs_no_flags_of_its_run(tmp_path):
    config = {"run": vars(TrainingConfig()), "network": {}}
    write_state(State({"model.a": torch.zeros(3)}, 7, config), tmp_path / "run" / "state.safetensors")
    assert train.main(["--out", "run", "--export-state", "pieces"]) == 0
    assert [p.name for p in (tmp_path / "pieces").iterdir()] == ["state-1-of-1.safetensors"]
