"""The shipped file: small, strict, self-describing, and nothing of it belongs to training alone."""

import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

from stac_core.checkpoint import BOX, load_network
from stac_core.config import NETWORKS, ModelConfig
from stac_core.network.causal_vggt import CausalVGGT
from stac_core.network.initial_weights import initialise
from stac_core.training import evaluate as evaluation
from stac_core.training.config import TrainingConfig
from stac_core.training.ship import LIMIT_BYTES, main
from stac_core.training.state import capture, network_weights, write_state
from stac_core.training.supervised import Supervised
from stac_core.training.trainer import make_optimizers


@pytest.fixture
def state():
    config = TrainingConfig(seed=3, steps=777)
    model = Supervised(initialise(CausalVGGT(NETWORKS["embedded"]), 3), config)
    return capture(model, make_optimizers(model, config), 55, config, NETWORKS["embedded"])


def metadata(path: Path) -> dict[str, str]:
    with safe_open(path, framework="pt") as file:
        assert all(file.get_tensor(key).dtype == torch.float16 for key in file.keys())  # noqa: SIM118
        return file.metadata()


def test_command_ships_what_load_network_loads(tmp_path, state, monkeypatch, capsys):
    for name, value in dict(SHORT_WORLDS=1, SHORT_FRAMES=2, LONG_WORLDS=1, LONG_FRAMES=3).items():
        monkeypatch.setattr(evaluation, name, value)
    write_state(state, tmp_path / "state.safetensors")
    target = tmp_path / "box.safetensors"
    assert main(["--out", str(tmp_path), "--target", str(target), "--recordings", str(tmp_path)]) == 0
    printed = capsys.readouterr().out
    assert "synthetic: depth AbsRel" in printed and "required" in printed and "no data" in printed
    assert target.stat().st_size <= LIMIT_BYTES
    about = metadata(target)
    assert about["step"] == "55" and about["seed"] == "3"
    assert about["command"] == "python -m stac_core.training.train --seed 3 --steps 777"
    assert json.loads(about["figures"])["short"]["depth_still"] > 0
    loaded = load_network(ModelConfig(checkpoint=str(target), device="cpu"))
    assert "step 55" in loaded.weights
    for key, value in network_weights(state).items():
        assert torch.equal(loaded.network.state_dict()[key], value.half().float())


def test_diverged_weights_are_refused_by_name(state):
    state.tensors["model.network.camera_head.trunk_norm.weight"][0] = float("inf")
    with pytest.raises(ValueError, match=r"camera_head\.trunk_norm\.weight"):
        network_weights(state)


def test_box_model_fits_its_limit_and_says_where_it_comes_from():
    assert BOX.stat().st_size <= LIMIT_BYTES
    about = metadata(BOX)
    assert about["command"].startswith("python -m stac_core.training.train")
    assert int(about["step"]) > 0 and int(about["seed"]) >= 0
    figures = json.loads(about["figures"])
    assert figures["short"]["depth"] < figures["short"]["depth_still"]
    assert figures["short"]["rotation_deg"] < figures["short"]["rotation_still_deg"]
    assert load_network(ModelConfig(device="cpu", checkpoint=str(BOX))).config.name == "embedded"
