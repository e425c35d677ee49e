"""The bundled model, and walks through synthetic worlds for it to see; each made once per process."""

from __future__ import annotations

import functools

import numpy as np

from stac_core import load_network
from stac_core.config import ModelConfig
from stac_core.evaluation.datasets import Frame, open_sequence
from stac_core.evaluation.trajectory_metrics import rotation_angles
from stac_core.network.causal_vggt import CausalVGGT

LAP = "world:7187,frames=40,height=126,width=168"  # closes after 32 frames, turning on the spot


@functools.cache
def bundled() -> CausalVGGT:
    return load_network(ModelConfig(device="cpu")).network


@functools.cache
def frames_of(walk: str) -> list[Frame]:
    """Of a source such as world:50,frames=24,height=126,width=168."""
    sequence = open_sequence(walk)
    return [sequence.frame(i) for i in range(len(sequence))]


def images_of(frames: list[Frame]) -> list[np.ndarray]:
    return [frame.image for frame in frames]


def turn_deg(a: np.ndarray, b: np.ndarray) -> float:
    """Between two poses [4, 4]."""
    return float(rotation_angles((a[:3, :3].T @ b[:3, :3])[None])[0])
