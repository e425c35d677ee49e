"""Command: train the camera head alone, on the camera tokens that the rest of the network gives.

    python -m stac_core.training.camera_head --prepare 0 150
    python -m stac_core.training.camera_head --prepare 150 300
    python -m stac_core.training.camera_head
    python -m stac_core.training.ship --weights out/camera_head/weights.safetensors

The head reads one token per frame. Once these are known, a step over many long sequences takes a second on
one core, where a step of the whole network has room for a few short ones. Tokens are kept by clip, so that
helpers may prepare them side by side.
"""

from __future__ import annotations

import argparse
import dataclasses
import hashlib
import json
import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file, save
from torch import Tensor
from tqdm import tqdm

from stac_core.cache.one_pass import OnePass
from stac_core.checkpoint import BOX, load_weights, read_metadata
from stac_core.command import status_of
from stac_core.config import NETWORKS, PATCH_SIZE
from stac_core.device import computes_in_bfloat16
from stac_core.files import write_whole
from stac_core.geometry import encode_pose
from stac_core.network.camera_head import CameraHead
from stac_core.network.causal_vggt import CausalVGGT
from stac_core.settings import add_flags, check_settings, read_flags, refuse, setting
from stac_core.training.batches import mirror, resize
from stac_core.training.clips import render_clips
from stac_core.training.config import LARGEST_SEED, changed_flags
from stac_core.training.losses import camera_loss
from stac_core.training.schedule import SHORTEST
from stac_core.training.sequences import Sequences, join, normalise
from stac_core.worlds.config import check_count

LARGEST_RESCALE = 3.0  # of the way of a long sequence before it is compared
SMOOTHING = 0.98  # the head that is kept is a moving mean of the heads of the steps
Tokens = tuple[Tensor, Tensor]  # camera tokens [n, S, 2C], pose encodings [n, S, 9]


@dataclass(frozen=True)
class CameraHeadConfig:
    """One run: its clips, what is drawn from them, and how long it lasts."""

    seed: int = setting(0, "seed of all worlds and draws", minimum=0, maximum=LARGEST_SEED)
    clips: int = setting(300, "clips to learn from, each whole and mirrored", minimum=1)
    clip_frames: int = setting(64, "frames of a clip", minimum=SHORTEST)
    clip_width: int = setting(168, "width of its 4:3 images", minimum=56, unit="px")
    windows: int = setting(8, "short sequences cut from a clip, half of them mirrored", minimum=2)
    window_frames: int = setting(8, "frames of one", minimum=SHORTEST)
    clips_per_step: int = setting(8, "whole clips of one step", minimum=1)
    windows_per_step: int = setting(48, "short sequences of one step", minimum=1)
    learning_rate: float = setting(1e-4, "peak of the learning rate", minimum=1e-7, maximum=1.0)
    weight_decay: float = setting(0.01, "AdamW decay", minimum=0.0, maximum=1.0)
    steps: int = setting(1650, "steps of the training", minimum=1)
    threads: int = setting(1, "CPU threads", minimum=1)
    out: str = setting("out/camera_head", "folder of tokens and weights")

    def __post_init__(self) -> None:
        check_settings(self)
        if self.clip_width % PATCH_SIZE:
            nearest = round(self.clip_width / PATCH_SIZE) * PATCH_SIZE
            raise refuse(self, "clip_width", f"not divisible by {PATCH_SIZE}", nearest)
        if self.window_frames > self.clip_frames:
            raise refuse(self, "window_frames", f"clips have {self.clip_frames} frames", self.clip_frames)


class ClipTokens:
    """One file per clip, made where it is missing; in a folder named after the weights that make them."""

    def __init__(self, network: CausalVGGT, config: CameraHeadConfig) -> None:
        self._network, self._config = network, config
        self._folder = Path(config.out) / f"tokens-{digest(network.aggregator)}"
        self._folder.mkdir(parents=True, exist_ok=True)

    def make(self, clip: int) -> Path:
        """File of one clip."""
        c = self._config
        size = f"{c.clip_frames}x{c.clip_width}-{c.windows}x{c.window_frames}"
        path = self._folder / f"{c.seed}-{size}-{clip:07d}.safetensors"
        if not path.exists():
            (tokens, poses), (window_tokens, window_poses) = self._compute(clip)
            content = {"tokens": tokens, "poses": poses}
            content |= {"window_tokens": window_tokens, "window_poses": window_poses}
            write_whole(path, save({name: x.contiguous() for name, x in content.items()}))
        return path

    def read(self) -> tuple[Tokens, Tokens]:
        """Of all clips of the run: whole ones, and windows."""
        clips = tqdm(range(self._config.clips), "tokens", unit="clip", leave=False)
        files = [load_file(self.make(clip)) for clip in clips]
        names = (("tokens", "poses"), ("window_tokens", "window_poses"))
        whole, windows = ([torch.cat([file[n].float() for file in files]) for n in pair] for pair in names)
        return (whole[0], whole[1]), (windows[0], windows[1])

    def _compute(self, clip: int) -> tuple[Tokens, Tokens]:
        c = self._config
        clips = range(clip, clip + 1)
        world = render_clips(c.seed, c.clip_frames, c.clip_width, clips, torch.device("cpu"))
        seen = Sequences(**vars(world))
        both, random = as_it_is_and_mirrored(seen), np.random.default_rng([c.seed, clip])
        windows = [draw_window(both[i % 2], c.window_frames, random) for i in range(c.windows)]
        whole = [self._tokens(sequence) for sequence in both]  # one by one, as long ones need much memory
        return tuple(map(torch.cat, zip(*whole, strict=True))), self._tokens(join(windows))  # type: ignore[return-value]

    @torch.no_grad()
    def _tokens(self, sequences: Sequences) -> Tokens:
        with torch.autocast("cpu", torch.bfloat16, enabled=computes_in_bfloat16(torch.device("cpu"))):
            tokens = self._network.aggregator(sequences.images, OnePass("causal")).camera
        truth = normalise(sequences)
        poses = encode_pose(truth.world_from_camera, truth.intrinsics, *sequences.depth.shape[-2:])
        return tokens.half(), poses


def digest(module: torch.nn.Module) -> str:
    """Eight digits that tell its weights from others."""
    found = hashlib.sha256()
    for value in module.state_dict().values():
        found.update(value.numpy().tobytes())
    return found.hexdigest()[:8]


def as_it_is_and_mirrored(clip: Sequences) -> list[Sequences]:
    """Two clips of one size, the optical axis in the middle of both, where the pose encoding supposes it."""
    return [clip, resize(mirror(clip), *clip.depth.shape[-2:])]


def draw_window(sequence: Sequences, frames: int, random: np.random.Generator) -> Sequences:
    """So many frames of a sequence, one to three apart, in either direction of time."""
    furthest = (sequence.depth.shape[1] - 1) // (frames - 1)
    stride = int(random.integers(1, min(3, furthest) + 1))
    first = int(random.integers(0, sequence.depth.shape[1] - stride * (frames - 1)))
    chosen = torch.arange(frames) * stride + first
    return sequence.frames(chosen.flip(0) if random.random() < 0.3 else chosen)


def train(head: CameraHead, whole: Tokens, windows: Tokens, config: CameraHeadConfig) -> None:
    """Train in place."""
    mean = {name: value.detach().clone() for name, value in head.named_parameters()}
    optimizer = torch.optim.AdamW(
        head.parameters(), lr=config.learning_rate, betas=(0.9, 0.99), weight_decay=config.weight_decay
    )
    random = np.random.default_rng(config.seed)
    bar = tqdm(range(config.steps), "training", unit="step", mininterval=2.0)
    for step in bar:
        far = loss_of(head, draw(whole, config.clips_per_step, random), any_scale=True)
        near = loss_of(head, draw(windows, config.windows_per_step, random))
        fading = 0.5 * (1 + math.cos(math.pi * step / config.steps))
        optimizer.param_groups[0]["lr"] = config.learning_rate * fading
        optimizer.zero_grad()
        (far + near).backward()
        torch.nn.utils.clip_grad_norm_(head.parameters(), 1.0)
        optimizer.step()
        keep = min(SMOOTHING, (step + 1) / (step + 11))
        for name, value in head.named_parameters():
            mean[name].lerp_(value.detach(), 1 - keep)
        bar.set_postfix(far=f"{far.item():.3f}", near=f"{near.item():.3f}", refresh=False)
    head.load_state_dict(mean)


def draw(tokens: Tokens, count: int, random: np.random.Generator) -> Tokens:
    """So many of the sequences."""
    chosen = torch.from_numpy(random.integers(0, len(tokens[0]), count))
    return tokens[0][chosen], tokens[1][chosen]


def loss_of(head: CameraHead, sequences: Tokens, any_scale: bool = False) -> Tensor:
    """Of one causal pass; any_scale: ways count up to a factor per sequence, as trajectories are judged."""
    tokens, truth = sequences
    context = OnePass("causal")
    context.begin(tokens.shape[1], 1)
    encodings = torch.stack(head(tokens, context))
    if any_scale:
        ways = encodings[..., :3]
        encodings = torch.cat([ways * rescale(ways.detach(), truth[..., :3]), encodings[..., 3:]], -1)
    return camera_loss(encodings, truth)


def rescale(ways: Tensor, truth: Tensor) -> Tensor:
    """The factor [R, B, 1, 1] that brings ways [R, B, S, 3] nearest to the true ones [B, S, 3]."""
    factor = (ways * truth).sum((2, 3), keepdim=True) / ways.square().sum((2, 3), keepdim=True).clamp(
        min=1e-6
    )
    return factor.clamp(1 / LARGEST_RESCALE, LARGEST_RESCALE)


def main(arguments: list[str] | None = None) -> int:
    """Prepare tokens, train, write the network with its new head."""
    parser = argparse.ArgumentParser(prog="python -m stac_core.training.camera_head", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    add_flags(parser, CameraHeadConfig)
    parser.add_argument("--weights", type=Path, default=BOX, help="network to begin with (default: bundled)")
    parser.add_argument(
        "--prepare",
        type=int,
        nargs=2,
        metavar=("FIRST", "STOP"),
        help="make the tokens of clips FIRST to STOP - 1, and no more",
    )
    given = parser.parse_args(arguments)
    return status_of(parser.prog, lambda: _run(given))


def _run(given: argparse.Namespace) -> int:
    config = read_flags(CameraHeadConfig, given)
    torch.set_num_threads(config.threads)
    network = load_weights(NETWORKS["embedded"], given.weights, torch.float32, torch.device("cpu"))
    tokens = ClipTokens(network.eval(), config)
    if given.prepare:
        first, stop = given.prepare
        check_count("FIRST", first, 0)
        check_count("STOP", stop, first + 1)
        for clip in range(first, stop):
            tokens.make(clip)
        return 0
    whole, windows = tokens.read()
    train(network.camera_head, whole, windows, config)
    target = Path(config.out) / "weights.safetensors"
    write_whole(target, save(rounded(network), metadata(given.weights, config)))
    print(f"{target}: {config.steps} steps")
    return 0


def rounded(network: CausalVGGT) -> dict[str, Tensor]:
    """Its weights as they ship."""
    return {name: value.detach().half().contiguous() for name, value in network.state_dict().items()}


def metadata(begun_with: Path, config: CameraHeadConfig) -> dict[str, str]:
    """Where the weights come from: what their file said, and this run."""
    before = read_metadata(begun_with)
    begun = before.get("command", begun_with.name)
    flags = changed_flags(dataclasses.asdict(config), CameraHeadConfig)
    return {
        "config": json.dumps(dataclasses.asdict(NETWORKS["embedded"])),
        "command": f"{begun}; then python -m stac_core.training.camera_head{flags}",
        "seed": str(config.seed),
        "step": str(int(before.get("step", 0)) + config.steps),
    }


if __name__ == "__main__":
    raise SystemExit(main())
