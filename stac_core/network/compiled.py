"""Pieces of the network through PyTorch's compiler: shapes are left open, so that none is compiled twice."""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Callable
from typing import Any

import torch

Backend = str | Callable[..., Any]

MOST_VARIANTS = 64  # of one piece in one process: widths, precisions, one frame or several, threads


def compiled(piece: Callable[..., Any], backend: Backend = "inductor") -> Callable[..., Any]:
    """A function that is compiled in one piece when it is first called."""
    limit = _allow_variants()
    return torch.compile(piece, backend=backend, fullgraph=True, dynamic=True, **limit)  # type: ignore[call-overload]


def _allow_variants() -> dict[str, int]:
    """What `torch.compile` takes so that no variant is refused; older versions have a setting instead."""
    if "recompile_limit" in inspect.signature(torch.compile).parameters:
        return {"recompile_limit": MOST_VARIANTS}
    dynamo: Any = importlib.import_module("torch._dynamo.config")
    dynamo.recompile_limit = max(MOST_VARIANTS, dynamo.recompile_limit)
    return {}
