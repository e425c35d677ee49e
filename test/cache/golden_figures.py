"""Figures of the original implementation, and how close is equal."""

from __future__ import annotations

import json
from pathlib import Path

from safetensors.torch import load_file
from torch import Tensor

GOLDEN_CACHE = Path(__file__).parent.parent / "golden_cache"


def golden_cache(name: str) -> tuple[dict[str, Tensor], dict]:
    """Tensors and settings of one golden file."""
    settings = json.loads((GOLDEN_CACHE / f"{name}.json").read_text())
    return load_file(GOLDEN_CACHE / f"{name}.safetensors"), settings


def assert_close(actual: Tensor, expected: Tensor, what: str = "") -> None:
    """|a − b| ≤ 1e-5 · (1 + |b|), infinities equal."""
    assert actual.shape == expected.shape, f"{what}: {list(actual.shape)} against {list(expected.shape)}"
    finite = expected.isfinite()
    assert ((actual == expected) | finite).all(), what
    error = (actual - expected)[finite].abs()
    assert (error <= 1e-5 * (1 + expected[finite].abs())).all(), f"{what}: off by {error.max():.2e}"
