"""The resumable state of a run: weights, optimiser moments, step, configuration.

One safetensors file, or a folder of pieces small enough to be kept in a repository. Nothing random
needs storing: every step draws from (seed, step, process).
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor, nn
from torch.optim import Optimizer

from stac_core.config import NetworkConfig
from stac_core.files import write_whole
from stac_core.settings import in_one_line
from stac_core.training.config import TrainingConfig, changed_flags

FORMAT = "stac-training-2"
PIECE_BYTES = 15 * 2**20
NETWORK_PREFIX = "model.network."
MOMENTS = ("step", "exp_avg", "exp_avg_sq", "momentum_buffer")  # what AdamW or Muon remember of a parameter


@dataclasses.dataclass(frozen=True)
class State:
    """What a file holds."""

    tensors: dict[str, Tensor]  # "model.<parameter>", "<moment>.<parameter>"
    step: int
    config: dict[str, Any]  # of the run, of the network, and the commands `before` this one


def capture(
    model: nn.Module,
    optimizers: Sequence[Optimizer],
    step: int,
    config: TrainingConfig,
    network: NetworkConfig,
    before: str = "",
) -> State:
    """The state between two steps. network: whose the weights are; before: the commands that led to them."""
    names: dict[Tensor, str] = {parameter: name for name, parameter in model.named_parameters()}
    tensors = {f"model.{name}": value for name, value in model.state_dict().items()}
    for optimizer in optimizers:
        for parameter, moments in optimizer.state.items():
            tensors |= {f"{key}.{names[parameter]}": value for key, value in moments.items()}
    stored = {key: value.detach().cpu().contiguous() for key, value in tensors.items()}
    about = {"run": dataclasses.asdict(config), "network": dataclasses.asdict(network), "before": before}
    return State(stored, step, about)


def training_command(run: dict[str, Any]) -> str:
    """The command line of a run of these settings."""
    return "python -m stac_core.training.train" + changed_flags(run, TrainingConfig)


def commands(state: State) -> str:
    """All that led to a state, in their order."""
    return "; then ".join(filter(None, [state.config.get("before"), training_command(state.config["run"])]))


def restore(state: State, model: nn.Module, optimizers: Sequence[Optimizer], network: NetworkConfig) -> None:
    """Put weights and moments back; ValueError names the setting in which the networks differ."""
    check_network(state, network)
    prefix = "model."
    model.load_state_dict({k[len(prefix) :]: v for k, v in state.tensors.items() if k.startswith(prefix)})
    names: dict[Tensor, str] = {parameter: name for name, parameter in model.named_parameters()}
    for optimizer in optimizers:
        ordered = [names[parameter] for group in optimizer.param_groups for parameter in group["params"]]
        found = [
            {
                key: state.tensors[f"{key}.{name}"].clone()
                for key in MOMENTS
                if f"{key}.{name}" in state.tensors
            }
            for name in ordered
        ]
        moments = {index: values for index, values in enumerate(found) if values}
        # Each moment to the device and type where its optimizer wants it: fused ones count steps on the GPU.
        optimizer.load_state_dict({**optimizer.state_dict(), "state": moments})


def check_network(state: State, network: NetworkConfig) -> None:
    """Raise ValueError naming the first size in which a checkpoint belongs to another network."""
    stored = state.config["network"]
    for name, value in json.loads(json.dumps(dataclasses.asdict(network))).items():
        if json.loads(json.dumps(stored.get(name))) != value:
            raise ValueError(
                f"the state was trained with {name} = {stored.get(name)!r}, the network has {value!r}; "
                "train into another folder (--out) or restore that row of NETWORKS"
            )


def network_weights(state: State) -> dict[str, Tensor]:
    """The weights of the network alone, float32; ValueError where one is not finite."""
    weights = {
        key[len(NETWORK_PREFIX) :]: value
        for key, value in state.tensors.items()
        if key.startswith(NETWORK_PREFIX)
    }
    check_weights(weights)
    return weights


def check_weights(weights: dict[str, Tensor]) -> None:
    """ValueError naming a weight that is not finite once it is rounded to float16."""
    for key, value in weights.items():
        if not torch.isfinite(value.half()).all():
            raise ValueError(f"weight {key} does not fit into float16; the training has diverged")


def write_state(state: State, path: Path) -> None:
    """One file, complete or not there at all."""
    write_whole(path, save(state.tensors, _header(state)))


def export_state(state: State, folder: Path) -> list[Path]:
    """Pieces of at most 16 MiB, moments in bfloat16; `read_state(folder)` reads them together.

    Every piece names the export by a digest of all its tensors.
    """
    folder.mkdir(parents=True, exist_ok=True)
    pieces: list[dict[str, Tensor]] = [{}]
    size = 0
    for key, value in state.tensors.items():
        value = value.bfloat16() if key.startswith(MOMENTS[1:]) else value
        if size + value.nbytes > PIECE_BYTES and pieces[-1]:
            pieces.append({})
            size = 0
        pieces[-1][key] = value
        size += value.nbytes
    paths = [folder / f"state-{i + 1}-of-{len(pieces)}.safetensors" for i in range(len(pieces))]
    header = {**_header(state), "export": _digest(pieces)}
    for path, piece in zip(paths, pieces, strict=True):
        write_whole(path, save(piece, header))
    for stale in set(folder.glob("state-*-of-*.safetensors")) - set(paths):
        stale.unlink()
    return paths


def read_state(path: Path) -> State:
    """A file written by `write_state`, or a folder written by `export_state`.

    ValueError where a file is no state or damaged, where pieces are missing, or where two belong to different
    exports; FileNotFoundError where there is none.
    """
    if not path.exists():
        raise FileNotFoundError(f"{path}: no training state is there; name the folder or the file of one")
    files = sorted(path.glob("state-*-of-*.safetensors")) if path.is_dir() else [path]
    if not files:
        raise FileNotFoundError(f"{path}: no training state (state-*-of-*.safetensors) in this folder")
    if path.is_dir() and not files[0].name.endswith(f"-of-{len(files)}.safetensors"):
        raise ValueError(f"{path}: pieces are missing, {len(files)} present like {files[0].name}")
    tensors: dict[str, Tensor] = {}
    first: dict[str, str] = {}  # header of the first file
    for file in files:
        header, stored = _read(file)
        if header.get("format") != FORMAT:
            raise ValueError(f"{file}: not a training state ({FORMAT})")
        first = first or header
        differ = sorted(key for key in first | header if first.get(key) != header.get(key))
        if differ:
            raise ValueError(
                f"{path}: {files[0].name} (step {first['step']}) and {file.name} (step {header['step']}) "
                f"belong to two exports, which differ in {', '.join(differ)}; export the state again"
            )
        tensors |= stored
    return State(tensors, int(header["step"]), json.loads(header["config"]))


def _read(file: Path) -> tuple[dict[str, str], dict[str, Tensor]]:
    """Header and tensors of one file."""
    try:
        with safe_open(file, framework="pt") as opened:
            return opened.metadata() or {}, {key: opened.get_tensor(key) for key in opened.keys()}  # noqa: SIM118
    except SafetensorError as error:
        raise ValueError(f"{file} is damaged or no training state ({in_one_line(error)})") from error


def _header(state: State) -> dict[str, str]:
    return {"format": FORMAT, "step": str(state.step), "config": json.dumps(state.config)}


def _digest(pieces: list[dict[str, Tensor]]) -> str:
    """Of all names and values: equal for one state exported twice, never for those of two runs."""
    found = hashlib.sha256()
    for piece in pieces:
        found.update(save(piece))
    return found.hexdigest()
