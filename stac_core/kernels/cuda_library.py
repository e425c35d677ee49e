"""Load the compiled kernels (`cuda_ext/`) and describe their operators to PyTorch's tracing."""

from __future__ import annotations

import functools
import importlib.util

import torch
from torch import Tensor

REACHABLE = ("cuda",)  # types of devices whose memory the kernels read


@functools.cache
def load() -> None:
    """Make `torch.ops.stac` available; ImportError where it is not installed, OSError where it is no use."""
    found = importlib.util.find_spec("stac_cuda")
    if found is None or found.origin is None:
        raise ImportError("the library stac_cuda is not installed")
    try:
        torch.ops.load_library(found.origin)
    except OSError as error:  # PyTorch keeps what the loader said to itself
        raise OSError(f"{found.origin} does not load: {error.__cause__ or error}") from error
    torch.library.register_fake("stac::attend_forward", _fake_attend_forward)
    torch.library.register_fake("stac::attend_mass", _fake_attend_mass)
    torch.library.register_fake("stac::voxel_merge", _fake_voxel_merge)
    torch.library.register_fake("stac::gather", lambda *arguments: None)  # it writes to its arguments


def require(device_type: str) -> None:
    """Raise where the kernels cannot run: ImportError, OSError (wrong build) or RuntimeError."""
    load()
    if device_type != "cuda":
        raise RuntimeError(f"the device is {device_type!r}")
    if not torch.cuda.is_available():
        raise RuntimeError(f"PyTorch {torch.__version__} sees no CUDA device")


def check_on_cuda(name: str, x: Tensor) -> None:
    """ValueError naming the argument where it is out of the kernels' reach."""
    if x.device.type not in REACHABLE:
        raise ValueError(f"{name}: is on {x.device}, the cuda backend computes on CUDA devices")


def _fake_attend_forward(q: Tensor, *segments: list[Tensor | None] | list[int]) -> tuple[Tensor, Tensor]:
    return q.new_empty(q.shape), q.new_empty(q.shape[:2], dtype=torch.float32)


def _fake_attend_mass(q: Tensor, keys: list[Tensor], *rest: object) -> Tensor:
    return q.new_empty((q.shape[0], sum(part.shape[1] for part in keys)), dtype=torch.float32)


def _fake_voxel_merge(
    state: list[Tensor],
    order: Tensor,
    start: Tensor,
    keys: Tensor,
    values: Tensor,
    score: Tensor,
    threshold: float,
    gate: float,
    heaviest: float,
) -> list[Tensor]:
    counts = keys.new_empty((state[0].shape[0], 5), dtype=torch.int32)
    return [*(part.new_empty(part.shape) for part in state), counts]
