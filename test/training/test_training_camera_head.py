"""The camera head trained alone: on tokens that are kept, and nothing else of the network changes."""

import json

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from stac_core.checkpoint import BOX, load_network, load_weights
from stac_core.config import NETWORKS, ModelConfig
from stac_core.training import camera_head, ship
from stac_core.training import evaluate as evaluation
from stac_core.training.camera_head import CameraHeadConfig, ClipTokens, draw_window, loss_of, main, train
from stac_core.training.sequences import Sequences

SMALL = dict(clip_frames=6, clip_width=56, windows=2, window_frames=3)
FLAGS = [f"--{name.replace('_', '-')}={value}" for name, value in SMALL.items()]


@pytest.fixture
def network():
    return load_weights(NETWORKS["embedded"], BOX, torch.float32, torch.device("cpu")).eval()


def test_commands_lead_from_clips_to_a_file_that_ships(tmp_path, monkeypatch, capsys):
    out = [*FLAGS, f"--out={tmp_path}"]
    assert main([*out, "--clips=2", "--prepare", "1", "2"]) == 0
    (kept,) = tmp_path.glob("tokens-*/*")
    written = kept.stat().st_mtime_ns
    assert main([*out, "--clips=2", "--steps=2", "--clips-per-step=2", "--windows-per-step=2"]) == 0
    assert kept.stat().st_mtime_ns == written  # prepared once

    new, box = load_file(tmp_path / "weights.safetensors"), load_file(BOX)
    changed = {key for key in box if not torch.equal(new[key], box[key])}
    assert changed and all(key.startswith("camera_head.") for key in changed)

    for name, value in dict(SHORT_WORLDS=1, SHORT_FRAMES=2, LONG_WORLDS=1, LONG_FRAMES=3).items():
        monkeypatch.setattr(evaluation, name, value)
    target = tmp_path / "box.safetensors"
    weights = str(tmp_path / "weights.safetensors")
    assert ship.main(["--weights", weights, "--target", str(target), "--recordings", str(tmp_path)]) == 0
    assert "synthetic: depth AbsRel" in capsys.readouterr().out
    with safe_open(target, framework="pt") as file:
        about = file.metadata()
    assert "; then python -m stac_core.training.camera_head --clips 2 --clip-frames 6" in about["command"]
    assert json.loads(about["figures"])["short"]["depth_still"] > 0
    loaded = load_network(ModelConfig(checkpoint=str(target), device="cpu"))
    assert f"step {about['step']}" in loaded.weights


def test_a_pickled_network_may_be_begun_with(tmp_path, network):
    torch.save(network.state_dict(), tmp_path / "mine.pt")
    steps = ["--clips=1", "--steps=1", "--clips-per-step=1", "--windows-per-step=1"]
    assert main([*FLAGS, f"--out={tmp_path}", f"--weights={tmp_path / 'mine.pt'}", *steps]) == 0
    with safe_open(tmp_path / "weights.safetensors", framework="pt") as file:
        about = file.metadata()
    assert about["command"].startswith("mine.pt; then python -m stac_core.training.camera_head --clips 1")
    assert about["step"] == "1"


def test_weights_that_do_not_say_where_they_come_from_do_not_ship(tmp_path, capsys):
    save_file({"a": torch.zeros(1)}, tmp_path / "w.safetensors", {"step": "3"})
    assert ship.main(["--weights", str(tmp_path / "w.safetensors"), "--target", str(tmp_path / "box")]) == 1
    assert "w.safetensors: its metadata lack command, config, seed" in capsys.readouterr().err
    assert not (tmp_path / "box").exists()


def test_tokens_of_other_weights_are_not_taken(tmp_path, network):
    config = CameraHeadConfig(**SMALL, clips=1, out=str(tmp_path))
    kept = ClipTokens(network, config).make(0)
    with torch.no_grad():
        network.camera_head.token_norm.weight.mul_(2)  # reads tokens, does not make them
        assert ClipTokens(network, config).make(0) == kept
        network.aggregator.camera_token.mul_(2)
    other = ClipTokens(network, config).make(0)
    assert not torch.equal(load_file(other)["tokens"], load_file(kept)["tokens"])


def test_training_lowers_the_loss_of_what_it_sees(tmp_path, network):
    config = CameraHeadConfig(
        **SMALL,
        clips=2,
        steps=25,
        learning_rate=1e-4,
        clips_per_step=4,
        windows_per_step=4,
        out=str(tmp_path),
    )
    whole, windows = ClipTokens(network, config).read()
    assert whole[0].shape == (4, 6, 384) and windows[1].shape == (4, 3, 9)
    before = loss_of(network.camera_head, whole).item()
    train(network.camera_head, whole, windows, config)
    assert loss_of(network.camera_head, whole).item() < before


def test_the_scale_of_a_long_sequence_is_free(network):
    tokens = torch.randn(2, 5, 384, generator=torch.Generator().manual_seed(0))
    truth = torch.randn(2, 5, 9, generator=torch.Generator().manual_seed(1))
    scaled = torch.cat([truth[..., :3] * 1.01, truth[..., 3:]], -1)
    fixed = [loss_of(network.camera_head, (tokens, t)).item() for t in (truth, scaled)]
    ways = torch.randn(3, 2, 5, 3)
    factor = camera_head.rescale(ways, ways[0] * 2)
    assert torch.allclose(factor[0], torch.tensor(2.0), atol=1e-5)
    assert factor.abs().max() <= camera_head.LARGEST_RESCALE and fixed[0] != fixed[1]


def test_windows_keep_their_stride_and_lie_within_the_clip():
    numbers = torch.arange(10.0)
    clip = Sequences(
        numbers.view(1, 10, 1, 1, 1), numbers.view(1, 10, 1, 1),
        numbers.view(1, 10, 1, 1).expand(-1, -1, 4, 4), numbers.view(1, 10, 1, 1).expand(-1, -1, 3, 3),
    )  # fmt: skip
    strides = set()
    for seed in range(60):
        frames = draw_window(clip, 4, np.random.default_rng(seed)).depth.flatten()
        (stride,) = set(frames.diff().tolist())
        strides.add(stride)
    assert strides == {-3, -2, -1, 1, 2, 3}


@pytest.mark.parametrize(
    "setting, value, words",
    [
        ("clip_width", 60, "clip_width = 60.*not divisible by 14.*56"),
        ("window_frames", 65, "window_frames = 65.*clips have 64 frames"),
        ("clips", 0, "clips = 0"),
    ],
)
def test_impossible_settings_are_named(setting, value, words):
    with pytest.raises(ValueError, match=words):
        CameraHeadConfig(**{setting: value})
