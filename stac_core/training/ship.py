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

from safetensors.torch import save

from stac_core.files import write_whole
from stac_core.training.config import TrainingConfig
from stac_core.training.evaluate import as_numbers, default_recordings, evaluate, network_of_run, table
from stac_core.training.state import State, network_weights, read_state

LIMIT_BYTES = 16 * 2**20
BOX = Path(__file__).parents[1] / "weights" / "embedded.safetensors"


def training_command(config: dict[str, Any]) -> str:
    """The command line that repeats a run: what differs from the defaults, apart from the folder."""
    defaults = dataclasses.asdict(TrainingConfig())
    chosen = {k: v for k, v in config.items() if k != "out" and defaults.get(k) != v}
    flags = "".join(f" --{name.replace('_', '-')} {value}" for name, value in chosen.items())
    return "python -m stac_core.training.train" + flags


def box_bytes(state: State, figures: dict[str, dict[str, float | None]]) -> bytes:
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
        raise ValueError(
            f"the file would have {len(content)} bytes, more than {LIMIT_BYTES}; train fewer weights"
        )
    return content


def main(arguments: list[str] | None = None) -> int:
    """Evaluate the state of a run and ship it."""
    parser = argparse.ArgumentParser(prog="python -m stac_core.training.ship", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--out", type=Path, default=Path(TrainingConfig().out), help="folder of the run")
    parser.add_argument("--target", type=Path, default=BOX, help="file to write (default: the box)")
    parser.add_argument(
        "--recordings", type=Path, default=default_recordings(), help="folder of real recordings"
    )
    given = parser.parse_args(arguments)
    state = read_state(given.out / "state.safetensors")
    measured = evaluate(network_of_run(state), given.recordings)
    write_whole(given.target, box_bytes(state, as_numbers(measured)))
    print(table(measured))
    print(f"{given.target}: {given.target.stat().st_size / 2**20:.2f} MiB, step {state.step}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
