"""A stream's memory as plain tensors in one safetensors file; never code."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from stac_core.files import replacing

State = dict[str, Any]  # name → Tensor or State
FORMAT = "stac_stream 9"
ON_HOST = "host"  # what a state holds under this name belongs on the host, whatever the stream runs on


def tally(counts: Any) -> Tensor:
    """A dataclass of integers as one tensor."""
    return torch.tensor([getattr(counts, f.name) for f in dataclasses.fields(counts)], dtype=torch.int64)


def untally(counts: Any, numbers: Tensor) -> None:
    """Set the integers of a dataclass from what `tally` made of them."""
    for field, number in zip(dataclasses.fields(counts), numbers.tolist(), strict=True):
        setattr(counts, field.name, number)


def write_state(path: Path, state: State, about: dict[str, Any]) -> None:
    """Write the state, whole or not at all. about: what must agree before it may be used."""
    tensors = _apart({name: t.detach().cpu().contiguous() for name, t in _flatten(state)})
    with replacing(path) as temporary:
        save_file(tensors, temporary, {"format": FORMAT, "about": json.dumps(about)})


def read_state(path: Path, about: dict[str, Any], device: torch.device) -> State:
    """The inverse of `write_state`, on the device but for what belongs on the host.

    ValueError for a file that is damaged or of another kind of stream.
    """
    try:
        with safe_open(path, "pt") as file:
            notes = file.metadata() or {}
            if notes.get("format") != FORMAT:
                raise ValueError(f"{path} is not a saved stream of this version ({FORMAT})")
            _compare(path, json.loads(notes["about"]), about)
            names = file.keys()
            # A copy on the host, too: what is read there is the mapped file, which others may write into.
            tensors = {n: file.get_tensor(n).to(_home(n, device), copy=True) for n in names}
            return _nest(tensors)
    except FileNotFoundError:
        raise ValueError(f"{path}: no such file; save a stream first") from None
    except (SafetensorError, OSError) as cause:
        raise ValueError(
            f"{path} is damaged or no safetensors file ({cause}): save the stream again"
        ) from cause


def _home(name: str, device: torch.device) -> torch.device:
    """Where the tensor of this name belongs."""
    return torch.device("cpu") if ON_HOST in name.split("/") else device


def _apart(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The same, no two of them in one piece of memory, which the file format refuses."""
    known: set[int] = set()
    for name, tensor in tensors.items():
        memory = tensor.untyped_storage().data_ptr()
        tensors[name] = tensor.clone() if memory in known else tensor
        known.add(memory)
    return tensors


def _compare(path: Path, saved: dict[str, Any], about: dict[str, Any]) -> None:
    different = [k for k in sorted({*saved, *about}) if saved.get(k) != about.get(k)]
    if different:
        listed = ", ".join(f"{k} = {saved.get(k)!r} (here {about.get(k)!r})" for k in different)
        raise ValueError(f"{path} was saved under other settings: {listed}; resume with the same ones")


def _flatten(state: State, prefix: str = "") -> list[tuple[str, Tensor]]:
    flat: list[tuple[str, Tensor]] = []
    for name, value in state.items():
        flat += _flatten(value, f"{prefix}{name}/") if isinstance(value, dict) else [(prefix + name, value)]
    return flat


def _nest(tensors: dict[str, Tensor]) -> State:
    nested: State = {}
    for name, tensor in tensors.items():
        *folders, last = name.split("/")
        at = nested
        for folder in folders:
            at = at.setdefault(folder, {})
        at[last] = tensor
    return nested
