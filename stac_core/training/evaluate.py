"""Command: what the bundled model reaches, beside what is asked of it.

    python -m stac_core.training.evaluate
    python -m stac_core.training.evaluate --out out/training      # the state of a run instead

Synthetic worlds have fixed seeds that no run trains on; real recordings are never trained on. A stream is
what the node makes of the images, all settings at their defaults, and a calibrated one what it makes of them
with their camera_info, both as all lies in the end; all else is one causal pass of the network.
"""

from __future__ import annotations

import argparse
import json
import math
import os
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from stac_core.cache.one_pass import OnePass
from stac_core.checkpoint import load_network
from stac_core.command import status_of
from stac_core.config import NETWORKS, Config, ImageConfig, ModelConfig
from stac_core.evaluation.datasets import Frame, open_sequence
from stac_core.files import write_whole
from stac_core.images import prepare_images
from stac_core.network.causal_vggt import CausalVGGT
from stac_core.prediction import moved_on
from stac_core.session import StreamSession
from stac_core.training.figures import Figures, figures_of, mean_figures
from stac_core.training.held_out import held_out_worlds, measure
from stac_core.training.sequences import Sequences
from stac_core.training.state import State, check_network, network_weights, read_state

FIRST_WORLD = 1000  # beyond the worlds of the training curve
SHORT_WORLDS, SHORT_FRAMES = 32, 8
LONG_WORLDS, LONG_FRAMES = 8, 64
RECORDINGS = ("hololens_office_start", "tum_fr3_cabinet")
RECORDINGS_HELP = (
    f"folder of {RECORDINGS[0]} and {RECORDINGS[1]}, by default what STAC_TEST_DATA names; where one is "
    "missing, the table says so"
)
CLEARLY_BETTER = 0.75  # of what standing still in front of constant depth gives
STREAM, CALIBRATED = "stream of ", "calibrated stream of "  # before the source of the figures
Measured = dict[str, Figures]


@dataclass(frozen=True)
class Row:
    """One line of the table. A goal is a number, or a share of what standing still gives."""

    title: str
    source: str  # key of Measured
    reached: str  # field of Figures
    still: str = ""  # field of Figures
    required: float = math.nan  # NaN = only reported
    wanted: float = math.nan
    relative: bool = False  # the goals are shares of `still`

    def cells(self, figures: Figures) -> tuple[float, float, float, float]:
        """Reached, still, required, wanted."""
        still = getattr(figures, self.still) if self.still else math.nan
        unit = still if self.relative else 1.0
        return getattr(figures, self.reached), still, self.required * unit, self.wanted * unit


def _of_recording(name: str, source: str, required: float, wanted: float) -> list[Row]:
    goals = dict(required=required, wanted=wanted, relative=True)
    return [
        Row(f"{name}: depth AbsRel", source, "depth", "depth_still", **goals),  # type: ignore[arg-type]
        Row(f"{name}: rotation, deg", source, "rotation_deg", "rotation_still_deg", **goals),  # type: ignore[arg-type]
        Row(f"{name}: ATE / path", source, "trajectory"),
    ]


def _of_streams(name: str, source: str) -> list[Row]:
    return [
        row
        for title, stream in ((f"{name}, stream", STREAM), (f"{name}, calibrated", CALIBRATED))
        for row in (
            Row(f"{title}: depth AbsRel", stream + source, "depth", "depth_still"),
            Row(f"{title}: rotation, deg", stream + source, "rotation_deg", "rotation_still_deg"),
            Row(f"{title}: ATE / path", stream + source, "trajectory"),
        )
    ]


ROWS = [
    Row("synthetic: depth AbsRel", "short", "depth", "depth_still", 0.10, 0.05),
    Row(
        "synthetic: rotation, deg",
        "short",
        "rotation_deg",
        "rotation_still_deg",
        1 / 4,
        1 / 10,
        relative=True,
    ),
    Row("synthetic: ATE / path, 64 frames", "long", "trajectory", "", 0.08, 0.03),
    Row("synthetic: depth AbsRel, 64 frames", "long", "depth", "depth_still"),
    Row("synthetic: rotation, deg, 64 frames", "long", "rotation_deg", "rotation_still_deg"),
    *_of_streams("synthetic", "short"),
    *_of_streams("synthetic, 64 frames", "long"),
    *_of_recording("hololens_office_start", "hololens_office_start", CLEARLY_BETTER, 1 / 3),
    *_of_recording("hololens_office_start by 8", "hololens_office_start by 8", math.nan, math.nan),
    *_of_streams("hololens_office_start", "hololens_office_start"),
    *_of_recording("tum_fr3_cabinet", "tum_fr3_cabinet", math.nan, 1 / 2),
    *_of_streams("tum_fr3_cabinet", "tum_fr3_cabinet"),
]


def evaluate(network: CausalVGGT, recordings: Path) -> Measured:
    """Measure on held-out worlds, and on the real recordings that are there."""
    width = network.config.image_size
    measured: Measured = {}
    for name, count, length in (("short", SHORT_WORLDS, SHORT_FRAMES), ("long", LONG_WORLDS, LONG_FRAMES)):
        worlds = held_out_worlds(FIRST_WORLD, count, length, width)
        measured[name] = measure(network, worlds)
        sequences = [_frames_of(world) for world in worlds]
        for stream in (STREAM, CALIBRATED):
            figures = [measure_stream(network, frames, stream == CALIBRATED) for frames in sequences]
            measured[stream + name] = mean_figures(figures)
    for name in RECORDINGS:
        if (recordings / name).is_dir():
            frames = read_frames(recordings / name)
            measured[name] = measure_frames(network, frames)
            for stream in (STREAM, CALIBRATED):
                measured[stream + name] = measure_stream(network, frames, stream == CALIBRATED)
            clips = [frames[i : i + SHORT_FRAMES] for i in range(0, len(frames), SHORT_FRAMES)]
            measured[f"{name} by {SHORT_FRAMES}"] = mean_figures([measure_frames(network, c) for c in clips])
    return measured


def read_frames(folder: Path) -> list[Frame]:
    """All frames of a real recording."""
    recording = open_sequence(folder)
    return [recording.frame(i) for i in range(len(recording))]


@torch.inference_mode()
def measure_frames(network: CausalVGGT, frames: list[Frame]) -> Figures:
    """One causal pass over real frames; depth is compared at the camera's own pixels."""
    images, device = [f.image for f in frames], next(network.parameters()).device
    pixels, geometry = prepare_images(images, ImageConfig(), network.config.image_size, device)
    prediction = network(pixels[None], OnePass("causal")).to_host().map(lambda t: t[0])
    return _compared(geometry.to_camera(prediction.depth), prediction.world_from_camera, frames)


def measure_stream(network: CausalVGGT, frames: list[Frame], calibrated: bool) -> Figures:
    """The same of a stream, chunk by chunk, as all lies at its end; calibrated = the intrinsics are told."""
    config = Config()
    session, size = StreamSession(network, config), config.cache.chunk_size
    chunks = [frames[i : i + size] for i in range(0, len(frames), size)]
    lens = frames[0].intrinsics if calibrated else None
    predictions = moved_on(session.step([f.image for f in chunk], lens).to_host() for chunk in chunks)
    assert session.geometry is not None  # every step sets it
    depth = session.geometry.to_camera(torch.cat([p.depth for p in predictions]))
    return _compared(depth, torch.cat([p.world_from_camera for p in predictions]), frames)


def _compared(depth: Tensor, world_from_camera: Tensor, frames: list[Frame]) -> Figures:
    """Depth [S, height, width] at the camera's pixels, 0 = none, and poses [S, 4, 4] against the truth."""
    truth = torch.from_numpy(np.stack([f.depth_m for f in frames if f.depth_m is not None]))
    poses = torch.from_numpy(
        np.stack([f.world_from_camera for f in frames if f.world_from_camera is not None])
    )
    return figures_of(depth, world_from_camera, truth.where(depth > 0, 0.0), poses)


def _frames_of(world: Sequences) -> list[Frame]:
    """The frames of one synthetic world, as a recording has them."""
    images = (255 * world.images[0]).round().byte().movedim(1, -1).numpy()
    others = (t[0].numpy() for t in (world.world_from_camera, world.depth, world.intrinsics))
    return [Frame(image, 0, *parts) for image, *parts in zip(images, *others, strict=True)]


def table(measured: Measured) -> str:
    """The figures beside the answer "stand still, constant depth", and beside what is asked for."""
    lines = [f"{'measure':<50}{'reached':>9}{'still':>9}{'required':>10}{'wanted':>9}"]
    for row in ROWS:
        if row.source in measured:
            reached, still, required, wanted = row.cells(measured[row.source])
            verdict = "" if math.isnan(required) else ("  yes" if reached <= required else "  NO")
            numbers = f"{_cell(reached):>9}{_cell(still):>9}{_cell(required):>10}{_cell(wanted):>9}"
            lines.append(f"{row.title:<50}{numbers}{verdict}")
        elif row.source in RECORDINGS:
            lines.append(f"{row.title:<50}{'no data':>9}")
    return "\n".join(lines)


def _cell(value: float) -> str:
    return "-" if math.isnan(value) else f"{value:.3f}"


def as_numbers(measured: Measured) -> dict[str, dict[str, float | None]]:
    """For the metadata of a file; None where a sequence cannot tell."""
    return {
        source: {k: round(v, 5) if math.isfinite(v) else None for k, v in vars(figures).items()}
        for source, figures in measured.items()
    }


def network_of_run(state: State) -> CausalVGGT:
    """The network in the state of a run, for inference on the CPU, rounded as it ships."""
    row = NETWORKS[state.config["run"]["network"]]
    check_network(state, row)
    network = CausalVGGT(row)
    network.load_state_dict({key: value.half() for key, value in network_weights(state).items()})
    return network.eval().requires_grad_(False)


def default_recordings() -> Path:
    """Real recordings beside the repository, or where STAC_TEST_DATA says."""
    return Path(os.environ.get("STAC_TEST_DATA", Path(__file__).parents[3] / "shared" / "data"))


def main(arguments: list[str] | None = None) -> int:
    """Print the table."""
    parser = argparse.ArgumentParser(prog="python -m stac_core.training.evaluate", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--out", type=Path, help="folder of a run; without it the bundled model is evaluated")
    parser.add_argument("--recordings", type=Path, default=default_recordings(), help=RECORDINGS_HELP)
    parser.add_argument("--json", type=Path, help="also write the figures here")
    given = parser.parse_args(arguments)
    return status_of(parser.prog, lambda: _run(given))


def _run(given: argparse.Namespace) -> int:
    network = (
        network_of_run(read_state(given.out / "state.safetensors"))
        if given.out
        else load_network(ModelConfig(device="cpu")).network
    )
    measured = evaluate(network, given.recordings)
    print(table(measured))
    if given.json:
        write_whole(given.json, json.dumps(as_numbers(measured), indent=1))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
