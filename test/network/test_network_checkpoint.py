"""Weights: found, renamed, loaded strictly, never executed; anything else refused with its cause."""

import dataclasses
import json
import logging
import os
import pickle
import re

import pytest
import torch
from safetensors.torch import save_file
from tiny import GOLDEN, TINY, golden, golden_images, golden_weights, tiny_network

from stac_core import checkpoint
from stac_core.cache.one_pass import OnePass
from stac_core.checkpoint import CheckpointError, find_weights, load_network, load_weights
from stac_core.config import NETWORKS, ModelConfig
from stac_core.network.causal_vggt import CausalVGGT

CPU = torch.device("cpu")


def load(path):
    return load_weights(TINY, path, torch.float32, CPU)


@pytest.fixture
def weights():
    return golden_weights()


@pytest.mark.parametrize("name", ["stream3r", "streamvggt"])
def test_full_size_keys_equal_the_manifests(name):
    manifest = json.loads((GOLDEN / "manifests" / f"state_dict_{name}.json").read_text())
    with torch.device("meta"):
        network = CausalVGGT(NETWORKS[name])
    ignored = NETWORKS[name].ignored_prefixes
    wanted = {key: shape for key, (shape, _) in manifest.items() if not key.startswith(ignored)}
    assert {key: list(value.shape) for key, value in network.state_dict().items()} == wanted
    assert sum(value.numel() for value in network.parameters()) == 1_190_596_120


SAVERS = {
    "model.safetensors": save_file,
    "model.pt": torch.save,
    "model.pth": torch.save,
    "old.pth": lambda w, path: torch.save(w, path, _use_new_zipfile_serialization=False),
    "wrapped_model.pt": lambda w, path: torch.save({"model": w, "epoch": 3}, path),
    "wrapped_state.pt": lambda w, path: torch.save({"state_dict": w}, path),
    "prefixed.pt": lambda w, path: torch.save({f"module.net.{k}": v for k, v in w.items()}, path),
    "nested.pth": lambda w, path: torch.save({"state_dict": {f"net.{k}": v for k, v in w.items()}}, path),
    "halves.safetensors": lambda w, path: save_file({k: v.half() for k, v in w.items()}, path),
}


@pytest.mark.parametrize("name", SAVERS)
def test_every_layout_loads(tmp_path, weights, name):
    SAVERS[name](weights, tmp_path / name)
    network = load(tmp_path / name)
    tolerance = 1e-3 if "halves" in name else 0
    for key, value in network.state_dict().items():
        assert value.dtype == torch.float32
        torch.testing.assert_close(value, weights[key], rtol=tolerance, atol=tolerance / 10, msg=key)


def test_a_loaded_network_computes_and_outlives_its_file(tmp_path, weights):
    path = tmp_path / "model.safetensors"
    save_file(weights, path)
    network = load(path)
    path.write_bytes(b"gone")
    images = golden_images(2)
    with torch.inference_mode():
        found = network(images, OnePass("causal")).depth
        assert torch.equal(found, tiny_network()(images, OnePass("causal")).depth)


def test_the_track_head_is_dropped_by_name(tmp_path, weights, caplog):
    torch.save(weights | golden("weights_track_head"), tmp_path / "checkpoints.pth")
    with caplog.at_level(logging.INFO):
        network = load(tmp_path / "checkpoints.pth")
    assert "394 tensors of track_head." in caplog.text
    assert set(network.state_dict()) == set(weights)


def test_keys_that_do_not_fit_are_listed(tmp_path, weights):
    weights["aggregator.camera_token"] = torch.zeros(1, 2, 1, 32)
    weights["surprise.weight"] = weights.pop("camera_head.trunk_norm.bias")
    torch.save(weights, tmp_path / "model.pt")
    with pytest.raises(CheckpointError) as refusal:
        load(tmp_path / "model.pt")
    message = str(refusal.value)
    assert "1 missing: camera_head.trunk_norm.bias" in message
    assert "1 unexpected: surprise.weight" in message
    assert "1 misshapen: aggregator.camera_token [1, 2, 1, 32] instead of [1, 2, 1, 64]" in message
    assert "no checkpoint of tiny" in message and "model.name" in message


def test_another_network_is_refused(tmp_path, weights):
    torch.save(weights, tmp_path / "model.pt")
    with pytest.raises(CheckpointError, match=r"no checkpoint of stream3r .*missing.*and [0-9]+ more"):
        load_weights(NETWORKS["stream3r"], tmp_path / "model.pt", torch.float32, CPU)


class Code:
    def __reduce__(self):
        return (os.mkdir, ("executed",))


def truncated(path, keep):
    path.write_bytes(path.read_bytes()[: int(path.stat().st_size * keep)])


@pytest.mark.parametrize("write", [torch.save, lambda what, path: path.write_bytes(pickle.dumps(what, 2))])
def test_code_is_never_run(tmp_path, monkeypatch, write):
    monkeypatch.chdir(tmp_path)
    write({"weight": Code()}, tmp_path / "model.pt")
    with pytest.raises(CheckpointError, match=r"carries code .*mkdir.*never run"):
        load(tmp_path / "model.pt")
    assert not (tmp_path / "executed").exists()


def test_a_file_of_anything_is_told_without_the_advice_to_run_it(tmp_path):
    (tmp_path / "model.pt").write_bytes(b"gibberish")
    with pytest.raises(CheckpointError, match=r"no \.pt file; .* \(Unsupported operand") as told:
        load(tmp_path / "model.pt")
    assert "weights_only" not in str(told.value)


@pytest.mark.parametrize("name", ["model.safetensors", "model.pt", "old.pth"])
@pytest.mark.parametrize("keep", [0, 0.001, 0.5, 0.999])
def test_truncated_files(tmp_path, weights, name, keep):
    SAVERS[name](weights, tmp_path / name)
    truncated(tmp_path / name, keep)
    with pytest.raises(CheckpointError, match=f"{name} cannot be read: it is truncated"):
        load(tmp_path / name)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ([torch.zeros(2)], "holds no named tensors, but list"),
        ({}, "holds no named tensors"),
        ({"step": 3, "lr": 0.1}, "not tensors: step, lr"),
    ],
)
def test_other_contents(tmp_path, content, words):
    torch.save(content, tmp_path / "model.pt")
    with pytest.raises(CheckpointError, match=words):
        load(tmp_path / "model.pt")


def test_text_is_no_checkpoint(tmp_path):
    for name in ("model.pt", "model.safetensors"):
        (tmp_path / name).write_text("<html>not found</html>")
        with pytest.raises(CheckpointError, match="cannot be read"):
            load(tmp_path / name)
    with pytest.raises(CheckpointError, match=r"model.bin: expected a file ending in .safetensors"):
        load(tmp_path / "model.bin")


@pytest.mark.parametrize(
    "place", ["model.pth", "checkpoints.pth", "streamvggt/model.pt", "ckpt/streamvggt/model.pt"]
)
def test_where_weights_are_looked_for(tmp_path, monkeypatch, place):
    path = tmp_path / place
    path.parent.mkdir(parents=True, exist_ok=True)
    path.touch()
    assert find_weights(ModelConfig("streamvggt", str(tmp_path))) == path
    assert find_weights(ModelConfig("streamvggt", str(path))) == path
    if place.startswith("ckpt"):
        monkeypatch.chdir(tmp_path)
        assert find_weights(ModelConfig("streamvggt")).resolve() == path


def test_a_directory_with_one_file_of_any_name(tmp_path):
    (tmp_path / "mine.pt").touch()
    assert find_weights(ModelConfig("stream3r", str(tmp_path))) == tmp_path / "mine.pt"
    (tmp_path / "other.pt").touch()
    with pytest.raises(CheckpointError, match=r"holds mine.pt, other.pt, expected one of model.safetensors"):
        find_weights(ModelConfig("stream3r", str(tmp_path)))


def test_missing_weights(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    place = re.escape(str(tmp_path / "ckpt" / "stream3r"))
    with pytest.raises(CheckpointError, match=f"no weights for stream3r: {place} does not exist; download"):
        load_network(ModelConfig("stream3r"))
    with pytest.raises(CheckpointError, match=r"~nobody_at_all/model.pt does not exist: check"):
        find_weights(ModelConfig(checkpoint="~nobody_at_all/model.pt"))
    with pytest.raises(CheckpointError, match=r"nowhere.pt does not exist"):
        load_network(ModelConfig(checkpoint="nowhere.pt"))
    with pytest.raises(CheckpointError, match="holds no weights file"):
        load_network(ModelConfig(checkpoint=str(tmp_path)))


def test_without_weights_the_box_network_warns_and_runs(tmp_path, monkeypatch, caplog):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(checkpoint, "BOX", tmp_path / "embedded.safetensors")
    first, again, other = (load_network(ModelConfig(device="cpu", seed=seed)) for seed in (0, 0, 1))
    assert first.weights == "random weights, seed 0: geometry is noise"
    assert [r.levelname for r in caplog.records] == ["WARNING"] * 3
    weights = [n.network.aggregator.patch_embed.patch_embed.proj.weight for n in (first, again, other)]
    assert torch.equal(weights[0], weights[1]) and not torch.equal(weights[0], weights[2])
    assert (first.config.name, first.dtype, first.device) == ("embedded", torch.float32, CPU)
    assert not first.network.training
    assert not any(p.requires_grad for p in first.network.parameters())
    with torch.inference_mode():
        prediction = first.network(torch.rand(1, 2, 3, 56, 84), OnePass(), points=True)
    prediction.map(lambda t: torch.testing.assert_close(t.isfinite(), torch.ones_like(t, dtype=torch.bool)))
    centres = prediction.world_from_camera[..., :3, 3]
    assert centres.norm(dim=-1).max() < 1, "an untrained camera stands still"
    assert prediction.pose_encoding[..., 7:].min() > 0.3, "its field of view is alive"


@pytest.mark.parametrize("config", ["resnet", "[3]", "{}", '"{', '{"depth": 3}'])
def test_metadata_of_others_say_nothing(tmp_path, weights, config):
    save_file(weights, tmp_path / "model.safetensors", {"config": config})
    network = load(tmp_path / "model.safetensors")
    assert torch.equal(network.aggregator.camera_token, weights["aggregator.camera_token"])
    del weights["aggregator.camera_token"]
    save_file(weights, tmp_path / "model.safetensors", {"config": config})
    with pytest.raises(CheckpointError, match=r"1 missing: aggregator\.camera_token"):
        load(tmp_path / "model.safetensors")


def test_the_state_of_a_training_is_told_from_weights(tmp_path, weights):
    about = {"format": "stac-training-2", "config": json.dumps({"run": {}, "network": {}})}
    save_file({f"model.network.{k}": v for k, v in weights.items()}, tmp_path / "state.safetensors", about)
    with pytest.raises(CheckpointError, match=r"is the state of a training, not weights.*--resume.*ship"):
        load(tmp_path / "state.safetensors")


def test_the_box_names_its_training_and_must_be_of_this_network(tmp_path, monkeypatch):
    monkeypatch.setattr(checkpoint, "BOX", tmp_path / "embedded.safetensors")
    monkeypatch.chdir(tmp_path)
    state = CausalVGGT(NETWORKS["embedded"]).half().state_dict()
    sizes = dataclasses.asdict(NETWORKS["embedded"])
    save_file(state, checkpoint.BOX, {"config": json.dumps(sizes), "step": "12000"})
    loaded = load_network(ModelConfig(device="cpu", dtype="bfloat16"))
    assert loaded.weights == "bundled model, step 12000"
    assert loaded.network.aggregator.global_blocks[0].mlp.fc1.weight.dtype == torch.bfloat16
    assert loaded.network.depth_head.norm.weight.dtype == torch.float32
    save_file(state, checkpoint.BOX, {"config": json.dumps(sizes | {"heads": 6}), "step": "12000"})
    with pytest.raises(CheckpointError, match=r"written for another embedded .heads 6 instead of 3"):
        load_network(ModelConfig(device="cpu"))


def test_devices_and_dtypes_that_do_not_exist_here():
    with pytest.raises(ValueError, match=r"model.device = 'warp:3' does not work here"):
        load_network(ModelConfig(device="warp:3"))
    with pytest.raises(ValueError, match=r"model.dtype = 'float16' needs a GPU"):
        load_network(ModelConfig(device="cpu", dtype="float16"))
    if not torch.cuda.is_available():
        with pytest.raises(ValueError, match=r"model.device = 'cuda'.*use auto or cpu"):
            load_network(ModelConfig(device="cuda"))
