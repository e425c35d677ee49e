"""Find weights, read them without running code, load them strictly; say what does not fit.

Source of the layouts: the published files of STream3R (flat safetensors) and StreamVGGT (pickled flat
state dict with a track head, which serves no output here).
"""

from __future__ import annotations

import dataclasses
import json
import logging
import pickle
import re
import zipfile
from collections.abc import Iterable, Mapping
from os.path import expanduser
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor

from stac_core.config import NETWORKS, KernelConfig, ModelConfig, NetworkConfig
from stac_core.device import choose_device, choose_dtype
from stac_core.network.causal_vggt import CausalVGGT
from stac_core.network.execution import choose_execution, prepare
from stac_core.network.initial_weights import initialise
from stac_core.settings import in_one_line

BOX = Path(__file__).parent / "weights" / "embedded.safetensors"
SUFFIXES = (".safetensors", ".pt", ".pth")
NAMES = (*(f"model{suffix}" for suffix in SUFFIXES), "checkpoints.pth")  # the last is StreamVGGT's own
MOST_LISTED = 6  # names in a message
WRAPPERS, PREFIXES = ("model", "state_dict"), ("module.", "net.")

logger = logging.getLogger(__name__)


class CheckpointError(ValueError):
    """Weights that are missing, damaged, of another network, or that carry code."""


@dataclasses.dataclass(frozen=True)
class LoadedNetwork:
    """A network ready for inference: eval mode, no gradients.

    dtype is that of the aggregator; heads and residual stream are float32. Measured on the golden
    network, whose tokens average 1.5 in magnitude, against float32: bfloat16 moves tokens by at most
    0.05, poses by 0.007, depth by 0.006 and points by 0.02; float16 by about a sixth of that.
    """

    network: CausalVGGT
    config: NetworkConfig
    device: torch.device
    dtype: torch.dtype
    weights: str  # for people: "bundled model, step 12000"
    execution: str  # what `model.execution` came to: eager, compiled or recorded

    @property
    def machine(self) -> str:
        """What predictions also depend on, in their last digits."""
        dtype, threads = str(self.dtype).removeprefix("torch."), torch.get_num_threads()
        return f"{self.device}, {dtype}, {self.execution}, {threads} threads, PyTorch {torch.__version__}"


def load_network(model: ModelConfig, kernels: KernelConfig | None = None) -> LoadedNetwork:
    """The network that the settings name, with its weights, on its device.

    kernels: those that its blocks may use; as by default where nothing is said.
    Without weights the embedded network runs with random ones, and a warning says so. CheckpointError where
    weights are asked for and cannot serve; ValueError for a device that does not exist.
    """
    config = NETWORKS[model.name]
    device = choose_device(model.device)
    dtype = choose_dtype(model.dtype, device)
    choose_execution(model.execution, device)  # refused before weights are read
    path, weights = find_weights(model), describe_weights(model)
    if path is None:
        network = initialise(CausalVGGT(config), model.seed).set_precision(dtype)
        logger.warning("no trained weights found (%s): %s", BOX.name, weights)
    else:
        network = load_weights(config, path, dtype, device)
        logger.info("loaded %s: %s", config.name, weights)
    network = network.to(device).eval().requires_grad_(False)
    execution = prepare(network, model.execution, kernels)
    return LoadedNetwork(network, config, device, dtype, weights, execution)


def describe_weights(model: ModelConfig) -> str:
    """Whose weights the settings name, for people; CheckpointError where there are none."""
    path = find_weights(model)
    return _describe(path) if path else f"random weights, seed {model.seed}: geometry is noise"


def find_weights(model: ModelConfig) -> Path | None:
    """The file to load; None = none for the embedded network, the only one that runs without."""
    if model.checkpoint:
        return _find_given(Path(expanduser(model.checkpoint)), model.name)
    usual = Path("ckpt") / model.name
    if usual.is_dir():
        return _find_in(usual, model.name)
    if model.name != "embedded":
        raise CheckpointError(
            f"no weights for {model.name}: {usual.absolute()} does not exist; download the checkpoint to "
            f"{NAMES[0]} in it, or name a file or a directory as model.checkpoint"
        )
    return BOX if BOX.exists() else None


def load_weights(config: NetworkConfig, path: Path, dtype: torch.dtype, device: torch.device) -> CausalVGGT:
    """A network with the weights of one file, each tensor converted on its way; CheckpointError if any
    key is missing, unexpected or misshapen, apart from the prefixes that the network ignores."""
    _check_config(read_metadata(path), config, path)
    with torch.device("meta"):
        network = CausalVGGT(config).set_precision(dtype)
    expected = network.state_dict()
    stored = _drop_ignored(_unwrap(_read(path), path), config, path)
    _check_keys(stored, expected, config, path)
    state = {key: stored[key].to(device, like.dtype, copy=True) for key, like in expected.items()}
    network.load_state_dict(state, assign=True)
    return network


def _find_given(path: Path, name: str) -> Path:
    if path.is_dir():
        return _find_in(path, name)
    if not path.is_file():
        raise CheckpointError(f"checkpoint {path} does not exist: check model.checkpoint")
    return path


def _find_in(folder: Path, name: str) -> Path:
    """The weights file in a directory, or in its subdirectory of the network's name."""
    for candidate in (folder, folder / name, folder / "ckpt" / name):
        for usual in NAMES:
            if (candidate / usual).is_file():
                return candidate / usual
    files = sorted(path for path in folder.iterdir() if path.suffix in SUFFIXES)
    if len(files) == 1:
        return files[0]
    found = _listed(file.name for file in files) if files else "no weights file"
    raise CheckpointError(f"{folder} holds {found}, expected one of {', '.join(NAMES)}: name the file itself")


def _read(path: Path) -> object:
    """What the file holds; nothing in it is executed."""
    if path.suffix not in SUFFIXES:
        raise CheckpointError(f"{path}: expected a file ending in {', '.join(SUFFIXES)}")
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        # Mapped where the format allows: a second copy in memory is saved.
        return torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except Exception as error:  # damaged bytes fail in any way
        code = re.search(r"GLOBAL (\S+)", str(error))
        if code:
            raise CheckpointError(
                f"{path} carries code ({code[1]}), not weights alone, and code is never run: use the "
                "published file, or convert it to .safetensors where you trust it"
            ) from error
        # Around its own error, PyTorch puts the advice to run whatever code the file holds.
        own = error.__context__ if isinstance(error, pickle.UnpicklingError) else None
        raise _damaged(path, own or error) from error


def read_metadata(path: Path) -> dict[str, str]:
    """What weights say about themselves: the header of a .safetensors file; others are silent.

    CheckpointError where the file is damaged or missing.
    """
    if path.suffix != ".safetensors":
        return {}
    try:
        with safe_open(path, framework="pt") as file:
            return file.metadata() or {}
    except (SafetensorError, OSError) as error:
        raise _damaged(path, error) from error


def _unwrap(stored: object, path: Path) -> dict[str, Tensor]:
    """The state dict itself: one wrapping level and one prefix of all keys taken off."""
    for wrapper in WRAPPERS:
        if isinstance(stored, Mapping) and isinstance(stored.get(wrapper), Mapping):
            stored = stored[wrapper]
            break
    if not isinstance(stored, Mapping) or not stored:
        raise CheckpointError(f"{path} holds no named tensors, but {type(stored).__name__}: wrong file?")
    strangers = [str(key) for key, value in stored.items() if not isinstance(value, Tensor)]
    if strangers:
        raise CheckpointError(f"{path} holds entries that are not tensors: {_listed(strangers)}: wrong file?")
    for prefix in PREFIXES:
        if all(key.startswith(prefix) for key in stored):
            stored = {key.removeprefix(prefix): value for key, value in stored.items()}
    return dict(stored)


def _drop_ignored(stored: dict[str, Tensor], config: NetworkConfig, path: Path) -> dict[str, Tensor]:
    kept = {key: value for key, value in stored.items() if not key.startswith(config.ignored_prefixes)}
    if len(kept) < len(stored):
        names = ", ".join(config.ignored_prefixes)
        logger.info("%s: %d tensors of %s serve nothing here", path, len(stored) - len(kept), names)
    return kept


def _check_keys(
    stored: Mapping[str, Tensor], expected: Mapping[str, Tensor], config: NetworkConfig, path: Path
) -> None:
    """Refuse weights of another network, with the list of differences."""
    problems = {
        "missing": [key for key in expected if key not in stored],
        "unexpected": [key for key in stored if key not in expected],
        "misshapen": [
            f"{key} {list(stored[key].shape)} instead of {list(like.shape)}"
            for key, like in expected.items()
            if key in stored and stored[key].shape != like.shape
        ],
    }
    found = "; ".join(f"{len(keys)} {what}: {_listed(keys)}" for what, keys in problems.items() if keys)
    if found:
        raise CheckpointError(
            f"{path} is no checkpoint of {config.name} ({found}): choose the network that it belongs to "
            "as model.name, or its own weights"
        )


def _check_config(metadata: Mapping[str, str], config: NetworkConfig, path: Path) -> None:
    """Refuse a file whose metadata name other sizes: not all of them show in the shapes."""
    if metadata.get("format", "").startswith("stac-training"):
        raise CheckpointError(
            f"{path} is the state of a training, not weights: go on from it with stac-train --resume, or "
            "have python -m stac_core.training.ship make weights of it"
        )
    stored, wanted = _sizes(metadata), json.loads(json.dumps(dataclasses.asdict(config)))
    if not stored:
        return
    differing = [
        f"{name} {stored.get(name)} instead of {value}"
        for name, value in wanted.items()
        if stored.get(name) != value
    ]
    if differing:
        raise CheckpointError(
            f"{path} was written for another {config.name} ({_listed(differing)}): use weights of this "
            "version, or train them again"
        )


def _sizes(metadata: Mapping[str, str]) -> dict[str, Any]:
    """Of the network, as this project writes them; none where a file is of others."""
    try:
        stored = json.loads(metadata.get("config", "{}"))
    except ValueError:
        return {}
    return stored if isinstance(stored, dict) and "name" in stored else {}


def _describe(path: Path) -> str:
    """Whose weights these are, for people."""
    name, step = "bundled model" if path == BOX else str(path), read_metadata(path).get("step")
    return f"{name}, step {step}" if step else name


def _damaged(path: Path, error: BaseException) -> CheckpointError:
    if not path.exists():
        return CheckpointError(f"weights {path} do not exist")
    return CheckpointError(
        f"{path} cannot be read: it is truncated or no {path.suffix} file; download it again "
        f"({in_one_line(error)})"
    )


def _listed(names: Iterable[Any]) -> str:
    listed = [str(name) for name in names]
    rest = f" and {len(listed) - MOST_LISTED} more" if len(listed) > MOST_LISTED else ""
    return ", ".join(listed[:MOST_LISTED]) + rest
