"""Command: train a network on synthetic worlds; goes on from the state in its folder, if there is one.

    stac-train --steps 12000
    stac-train --weights stac_core/weights/embedded.safetensors
    torchrun --nproc-per-node 8 -m stac_core.training.train

Interrupt it (SIGINT, SIGTERM, SIGHUP) whenever you like: it writes its state first.
"""

from __future__ import annotations

import argparse
import logging
from pathlib import Path

import torch

from stac_core.command import status_of
from stac_core.settings import add_flags, read_flags
from stac_core.training.config import TrainingConfig
from stac_core.training.processes import join_processes
from stac_core.training.state import export_state, read_state
from stac_core.training.trainer import Trainer


def main(arguments: list[str] | None = None) -> int:
    """Train, or export the state of an earlier run."""
    parser = argparse.ArgumentParser(prog="stac-train", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    add_flags(parser, TrainingConfig)
    parser.add_argument(
        "--resume",
        type=Path,
        help="start from this state: a file, or a folder of pieces; not where --out has one already",
    )
    parser.add_argument(
        "--weights",
        type=Path,
        help="begin with the network weights of this file, such as the bundled one; not where --out has a "
        "state already, from which the run goes on",
    )
    parser.add_argument("--export-state", type=Path, metavar="DIR", help="write the state in pieces and stop")
    given = parser.parse_args(arguments)
    logging.basicConfig(level=logging.INFO, format="%(levelname)s %(name)s: %(message)s")
    return status_of(parser.prog, lambda: _run(given))


def _run(given: argparse.Namespace) -> int:
    config = read_flags(TrainingConfig, given)
    if given.export_state:
        for path in export_state(read_state(Path(config.out) / "state.safetensors"), given.export_state):
            print(f"{path}  {path.stat().st_size / 2**20:.1f} MiB")
        return 0
    if config.threads:
        torch.set_num_threads(config.threads)
    with join_processes(config.device) as processes:
        return 0 if Trainer(config, processes, given.resume, given.weights).run() else 130


if __name__ == "__main__":
    raise SystemExit(main())
