"""Command: write the trained network as the bundled model.

    python -m stac_core.training.ship --out out/training
    python -m stac_core.training.ship --weights out/camera_head/weights.safetensors

Float16 safetensors of at most 16 MiB; the metadata hold the sizes of the network, the command that
trained it, seed, steps and the figures it reached. The heads of the matching loss stay behind.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import torch
from safetensors.torch import save
from torch import Tensor

from stac_core.checkpoint import BOX, load_weights, read_metadata
from stac_core.command import status_of
from stac_core.config import NETWORKS
from stac_core.files import write_whole
from stac_core.training.config import TrainingConfig
from stac_core.training.evaluate import (
    RECORDINGS_HELP,
    as_numbers,
    default_recordings,
    evaluate,
    network_of_run,
    table,
)
from stac_core.training.state import State, check_weights, commands, network_weights, read_state

LIMIT_BYTES = 16 * 2**20


def about_run(state: State) -> dict[str, str]:
    """Where the weights of a run come from."""
    return {
        "config": json.dumps(state.config["network"]),
        "command": commands(state),
        "seed": str(state.config["run"]["seed"]),
        "step": str(state.step),
    }


def about_weights(path: Path) -> dict[str, str]:
    """What a file of weights says itself, as `camera_head` writes it; ValueError where it is silent,
    damaged or missing."""
    about = read_metadata(path)
    lacking = {"config", "command", "seed", "step"} - set(about)
    if lacking:
        raise ValueError(f"{path}: its metadata lack {', '.join(sorted(lacking))}")
    return about


def box_bytes(
    weights: dict[str, Tensor], about: dict[str, str], figures: dict[str, dict[str, float | None]]
) -> bytes:
    """Content of the shipped file; ValueError where it would exceed the limit."""
    metadata = {**about, "figures": json.dumps(figures)}
    content = save({key: value.half().contiguous() for key, value in weights.items()}, metadata)
    if len(content) > LIMIT_BYTES:
        raise ValueError(
            f"the file would have {len(content)} bytes, more than {LIMIT_BYTES}; train fewer weights"
        )
    return content


def main(arguments: list[str] | None = None) -> int:
    """Evaluate the state of a run, or weights, and ship them."""
    parser = argparse.ArgumentParser(prog="python -m stac_core.training.ship", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument(
        "--out",
        type=Path,
        default=Path(TrainingConfig().out),
        help="folder of the run (default: %(default)s)",
    )
    parser.add_argument("--weights", type=Path, help="ship this file of `camera_head` instead")
    parser.add_argument("--target", type=Path, default=BOX, help="file to write (default: bundled)")
    parser.add_argument("--recordings", type=Path, default=default_recordings(), help=RECORDINGS_HELP)
    given = parser.parse_args(arguments)
    return status_of(parser.prog, lambda: _run(given))


def _run(given: argparse.Namespace) -> int:
    if given.weights:
        about = about_weights(given.weights)
        network = load_weights(NETWORKS["embedded"], given.weights, torch.float32, torch.device("cpu")).eval()
        weights = network.state_dict()
        check_weights(weights)
    else:
        state = read_state(given.out / "state.safetensors")
        weights, about = network_weights(state), about_run(state)
        network = network_of_run(state)
    measured = evaluate(network, given.recordings)
    write_whole(given.target, box_bytes(weights, about, as_numbers(measured)))
    print(table(measured))
    print(f"{given.target}: {given.target.stat().st_size / 2**20:.2f} MiB, step {about['step']}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
