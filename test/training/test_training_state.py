"""A run's state: written whole or not at all, in one file or in pieces, refused where it does not fit."""

import dataclasses
import os

import pytest
import torch
from torch import nn

from stac_core.config import NETWORKS
from stac_core.training import state as states
from stac_core.training.config import TrainingConfig
from stac_core.training.state import capture, export_state, read_state, restore, write_state

NETWORK = NETWORKS["embedded"]


def trained(seed: int = 0) -> tuple[nn.Module, torch.optim.Optimizer]:
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(8, 300), nn.ReLU(), nn.Linear(300, 4))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for _ in range(3):
        optimizer.zero_grad()
        model(torch.randn(5, 8)).square().mean().backward()
        optimizer.step()
    return model, optimizer


def captured(seed: int = 0):
    model, optimizer = trained(seed)
    return capture(model, [optimizer], 3, TrainingConfig(), NETWORK)


def test_file_gives_back_weights_moments_and_step(tmp_path):
    model, optimizer = trained()
    path = tmp_path / "state.safetensors"
    write_state(capture(model, [optimizer], 3, TrainingConfig(), NETWORK), path)
    other, other_optimizer = trained(seed=1)
    state = read_state(path)
    before = {key: value.clone() for key, value in state.tensors.items()}
    restore(state, other, [other_optimizer], NETWORK)
    assert state.step == 3 and state.config["run"]["steps"] == TrainingConfig().steps
    batch = torch.randn(5, 8)
    for each, its in ((model, optimizer), (other, other_optimizer)):
        its.zero_grad()
        each(batch).square().mean().backward()
        its.step()
    for a, b in zip(model.parameters(), other.parameters(), strict=True):
        assert torch.equal(a, b)
    assert all(torch.equal(state.tensors[key], value) for key, value in before.items())


@pytest.mark.filterwarnings("ignore:.*copying from a non-meta parameter")
@pytest.mark.parametrize(("fused", "counted_on"), [(True, "meta"), (False, "cpu")])
def test_moments_go_where_the_optimizer_wants_them(fused, counted_on):
    """A fused optimizer counts its steps beside the parameters, another one on the CPU."""
    state, model = captured(), trained()[0].to("meta")
    optimizer = torch.optim.AdamW(model.parameters(), fused=fused)
    restore(state, model, [optimizer], NETWORK)
    assert len(optimizer.state) == 4
    for moments in optimizer.state.values():
        assert moments["exp_avg"].device.type == moments["exp_avg_sq"].device.type == "meta"
        assert moments["step"].device.type == counted_on


def test_moments_follow_their_parameters_through_groups_of_any_order():
    state, (model, _) = captured(), trained(seed=1)
    groups = [{"params": [p], "lr": 0.1 * i} for i, p in enumerate(reversed(list(model.parameters())))]
    optimizer = torch.optim.AdamW(groups)
    restore(state, model, [optimizer], NETWORK)
    for name, parameter in model.named_parameters():
        assert torch.equal(optimizer.state[parameter]["exp_avg"], state.tensors[f"exp_avg.{name}"])
    assert [group["lr"] for group in optimizer.param_groups] == [0.1 * i for i in range(4)]


def test_pieces_are_small_and_read_as_one(tmp_path, monkeypatch):
    monkeypatch.setattr(states, "PIECE_BYTES", 6000)
    state = captured()
    paths = export_state(state, tmp_path)
    assert len(paths) > 2
    merged = read_state(tmp_path)
    assert merged.step == state.step and merged.tensors.keys() == state.tensors.keys()
    for key, value in state.tensors.items():
        rounding = 2**-7 if key.startswith("exp_avg") else 0.0
        torch.testing.assert_close(merged.tensors[key].float(), value.float(), rtol=rounding, atol=0)
    paths[0].unlink()
    with pytest.raises(ValueError, match="missing"):
        read_state(tmp_path)


@pytest.mark.parametrize("changed", ["step", "config", "weights"])
def test_pieces_of_two_exports_are_refused(tmp_path, monkeypatch, changed):
    """What an interrupted export leaves where there was one before."""
    monkeypatch.setattr(states, "PIECE_BYTES", 6000)
    state = captured()
    other = {
        "step": dataclasses.replace(state, step=4),
        "config": dataclasses.replace(state, config={**state.config, "run": {"seed": 1}}),
        "weights": captured(seed=1),
    }[changed]
    first = export_state(state, tmp_path)[0]
    newer = first.read_bytes()
    second = export_state(other, tmp_path)[1]
    first.write_bytes(newer)
    both = rf"{first.name} \(step 3\) and {second.name} \(step {other.step}\) belong to two exports"
    difference = "export" if changed == "weights" else changed
    with pytest.raises(ValueError, match=f"{both}, which differ in {difference}"):
        read_state(tmp_path)


def test_pieces_of_one_state_exported_twice_belong_together(tmp_path, monkeypatch):
    monkeypatch.setattr(states, "PIECE_BYTES", 6000)
    once, again = export_state(captured(), tmp_path / "a"), export_state(captured(), tmp_path / "b")
    once[0].write_bytes(again[0].read_bytes())
    assert read_state(tmp_path / "a").step == 3


def test_failed_write_leaves_the_last_good_state(tmp_path, monkeypatch):
    path = tmp_path / "state.safetensors"
    write_state(captured(), path)
    before = path.read_bytes()

    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        write_state(captured(seed=1), path)
    assert path.read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == [path.name]


def test_state_of_another_network_is_refused_by_name_and_value(tmp_path):
    model, optimizer = trained()
    other = dataclasses.replace(NETWORK, registers=NETWORK.registers + 1)
    with pytest.raises(ValueError, match=rf"registers = {NETWORK.registers}, .* has {NETWORK.registers + 1}"):
        restore(captured(), model, [optimizer], other)


def test_a_file_that_is_no_state_is_refused(tmp_path):
    from safetensors.torch import save_file

    save_file({"a": torch.zeros(1)}, tmp_path / "other.safetensors")
    with pytest.raises(ValueError, match="not a training state"):
        read_state(tmp_path / "other.safetensors")
    with pytest.raises(FileNotFoundError, match="no training state"):
        read_state(tmp_path)
