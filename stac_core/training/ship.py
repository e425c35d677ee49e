"""Command: write the trained network as the model in the box.

    python -m stac_core.training.ship --out out/training

Float16 safetensors of at most 16 MiB; the metadata hold the sizes of the network, the command that
trained it, seed, steps and the figures it reached. The heads of the matching loss stay behind.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save
from torch import Tensor

from stac_core.config import NETWORKS
from stac_core.training.config import TrainingConfig
from stac_core.training.evaluate import evaluate, table
from stac_core.training.state import State, check_network, read_state, write_atomically

LIMIT_BYTES = 16 * 2**20
BOX = Path(__file__).parents[1] / "weights" / "embedded.safetensors"
PREFIX = "model.network."


def network_weights(state: State) -> dict[str, Tensor]:
    """The weights of the network alone, float32; ValueError where one is not finite."""
    weights = {key[len(PREFIX) :]: value for key, value in state.tensors.items() if key.startswith(PREFIX)}
    for key, value in weights.items():
        if not torch.isfinite(value.half()).all():
            raise ValueError(f"weight {key} does not fit into float16; the training has diverged")
    return weights


def training_command(config: dict[str, Any]) -> str:
    """The command line that repeats a run: what differs from the defaults, apart from the folder."""
    defaults = dataclasses.asdict(TrainingConfig())
    chosen = {k: v for k, v in config.items() if k != "out" and defaults.get(k) != v}
    flags = "".join(f" --{name.replace('_', '-')} {value}" for name, value in chosen.items())
    return "python -m stac_core.training.train" + flags


def box_bytes(state: State, figures: dict[str, float]) -> bytes:
    """Content of the shipped file; ValueError where it would exceed the limit."""
    metadata = {
        "config": json.dumps(state.config["network"]),
        "command": training_command(state.config["run"]),
        "seed": str(state.config["run"]["seed"]),
        "step": str(state.step),
        "figures": json.dumps(figures),
    }
    content = save({key: value.half() for key, value in network_weights(state).items()}, metadata)
    if len(content) > LIMIT_BYTES:
        raise ValueError(f"the file would have {len(content)} bytes, more than {LIMIT_BYTES}; train fewer weights")
    return content


def main(arguments: list[str] | None = None) -> int:
    """Evaluate the state of a run and ship it."""
    parser = argparse.ArgumentParser(prog="python -m stac_core.training.ship", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--out", type=Path, default=Path(TrainingConfig().out), help="folder of the run")
    parser.add_argument("--target", type=Path, default=BOX, help="file to write (default: the box)")
    given = parser.parse_args(arguments)
    source = given.out / "state.safetensors"
    state = read_state(source)
    check_network(state, NETWORKS[state.config["run"]["network"]], source)
    figures = evaluate(network_weights(state), state.config["run"]["network"])
    write_atomically(given.target, box_bytes(state, figures))
    print(table(figures))
    print(f"{given.target}: {given.target.stat().st_size / 2**20:.2f} MiB, step {state.step}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
