"""Command: what the box model reaches, beside what is asked of it.

    python -m stac_core.training.evaluate
    python -m stac_core.training.evaluate --out out/training      # the state of a run instead

Synthetic worlds have fixed seeds that no run trains on; real recordings are never trained on.
"""

from __future__ import annotations

import argparse
import json
import math
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from stac_core.cache.one_pass import OnePass
from stac_core.checkpoint import load_network
from stac_core.config import NETWORKS, ImageConfig, ModelConfig
from stac_core.evaluation.datasets import open_sequence
from stac_core.images import prepare_images
from stac_core.network.causal_vggt import CausalVGGT
from stac_core.training.figures import Figures, figures_of
from stac_core.training.held_out import held_out_worlds, measure
from stac_core.training.state import State, check_network, network_weights, read_state

FIRST_WORLD = 1000  # beyond the worlds of the training curve
SHORT_WORLDS, SHORT_FRAMES = 32, 8
LONG_WORLDS, LONG_FRAMES = 8, 64
RECORDINGS = ("hololens_office_start", "tum_fr3_cabinet")
Measured = dict[str, Figures]


@dataclass(frozen=True)
class Row:
    """One line of the table: where its figure comes from and what it has to reach."""

    title: str
    source: str  # key of Measured
    reached: Callable[[Figures], float]
    still: Callable[[Figures], float]
    required: Callable[[Figures], float]  # NaN = only reported


def _rows() -> list[Row]:
    def unknown(figures: Figures) -> float:
        return math.nan

    depth, depth_still = (lambda f: f.depth), (lambda f: f.depth_still)
    turn, turn_still = (lambda f: f.rotation_deg), (lambda f: f.rotation_still_deg)
    rows = [
        Row("synthetic: depth AbsRel", "short", depth, depth_still, lambda f: 0.10),
        Row("synthetic: rotation, deg", "short", turn, turn_still, lambda f: f.rotation_still_deg / 4),
        Row("synthetic: ATE / path, 64 frames", "long", lambda f: f.trajectory, unknown, lambda f: 0.08),
        Row("synthetic: depth AbsRel, 64 frames", "long", depth, depth_still, unknown),
        Row("synthetic: rotation, deg, 64 frames", "long", turn, turn_still, unknown),
    ]
    for name in RECORDINGS:
        rows += [
            Row(f"{name}: depth AbsRel", name, depth, depth_still, unknown),
            Row(f"{name}: rotation, deg", name, turn, turn_still, unknown),
            Row(f"{name}: ATE / path", name, lambda f: f.trajectory, unknown, unknown),
        ]
    return rows


def evaluate(network: CausalVGGT, recordings: Path) -> Measured:
    """Measure on held-out worlds, and on the real recordings that are there."""
    width = network.config.image_size
    measured = {
        "short": measure(network, held_out_worlds(FIRST_WORLD, SHORT_WORLDS, SHORT_FRAMES, width)),
        "long": measure(network, held_out_worlds(FIRST_WORLD, LONG_WORLDS, LONG_FRAMES, width)),
    }
    for name in RECORDINGS:
        if (recordings / name).is_dir():
            measured[name] = measure_recording(network, recordings / name)
    return measured


@torch.inference_mode()
def measure_recording(network: CausalVGGT, folder: Path) -> Figures:
    """One causal pass over a real recording; depth is compared at the camera's own pixels."""
    recording = open_sequence(folder)
    frames = [recording.frame(i) for i in range(len(recording))]
    pixels, geometry = prepare_images([f.image for f in frames], ImageConfig(), network.config.image_size)
    device = next(network.parameters()).device
    prediction = network(pixels[None].to(device), OnePass("causal")).to_host().map(lambda t: t[0])
    depth = geometry.to_camera(prediction.depth)
    truth = torch.from_numpy(np.stack([f.depth_m for f in frames if f.depth_m is not None]))
    poses = torch.from_numpy(
        np.stack([f.world_from_camera for f in frames if f.world_from_camera is not None])
    )
    return figures_of(depth, prediction.world_from_camera, truth.where(depth > 0, 0.0), poses)


def table(measured: Measured) -> str:
    """The figures beside the answer "stand still, constant depth" and what is required."""
    lines = [f"{'measure':<42}{'reached':>9}{'still':>9}{'required':>10}"]
    for row in _rows():
        if row.source in measured:
            figures = measured[row.source]
            cells = (row.reached(figures), row.still(figures), row.required(figures))
            verdict = "" if math.isnan(cells[2]) else ("  yes" if cells[0] <= cells[2] else "  NO")
            lines.append(
                f"{row.title:<42}{_cell(cells[0]):>9}{_cell(cells[1]):>9}{_cell(cells[2]):>10}{verdict}"
            )
        elif row.source in RECORDINGS:
            lines.append(f"{row.title:<42}{'no data':>9}")
    return "\n".join(lines)


def _cell(value: float) -> str:
    return "-" if math.isnan(value) else f"{value:.3f}"


def as_numbers(measured: Measured) -> dict[str, dict[str, float]]:
    """For the metadata of a file."""
    return {
        source: {k: round(v, 5) for k, v in vars(figures).items()} for source, figures in measured.items()
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
    parser.add_argument("--out", type=Path, help="folder of a run; without it the box model is evaluated")
    parser.add_argument(
        "--recordings", type=Path, default=default_recordings(), help="folder of real recordings"
    )
    parser.add_argument("--json", type=Path, help="also write the figures here")
    given = parser.parse_args(arguments)
    network = (
        network_of_run(read_state(given.out / "state.safetensors"))
        if given.out
        else load_network(ModelConfig(device="cpu")).network
    )
    measured = evaluate(network, given.recordings)
    print(table(measured))
    if given.json:
        given.json.write_text(json.dumps(as_numbers(measured), indent=1))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
