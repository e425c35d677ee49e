"""What one step trains on: sequences cut from clips, and a view of the past.

Everything is drawn from (seed, step, process), so a resumed run goes on as if never interrupted.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from stac_core.cache.one_pass import OnePass, visible_frames
from stac_core.training.clips import CLIP_FRAMES, Clips
from stac_core.training.config import TrainingConfig
from stac_core.training.schedule import Shape, draw_shape
from stac_core.training.sequences import Sequences, join


def step_random(config: TrainingConfig, step: int, rank: int) -> np.random.Generator:
    """The random numbers of one step of one process."""
    return np.random.default_rng([config.seed, step, rank])


def draw_sequences(config: TrainingConfig, step: int, random: np.random.Generator) -> Sequences:
    """Sequences of one shape, each from another clip, cropped and zoomed to that shape."""
    shape = draw_shape(config, step, random)
    clips = Clips(Path(config.out) / "clips", config.seed)
    ready = config.first_clips + int(step * config.clips_per_step)
    chosen = random.integers(0, ready, shape.sequences)
    parts = [fit(clips.read(int(i), draw_frames(shape.frames, random)), shape, random) for i in chosen]
    return join(parts)


def draw_frames(frames: int, random: np.random.Generator) -> Tensor:
    """Frame numbers [S] within a clip: some stride, some start, either direction of time."""
    stride = int(random.integers(1, max(1, min(3, (CLIP_FRAMES - 1) // (frames - 1))) + 1))
    span = stride * (frames - 1)
    first = int(random.integers(0, CLIP_FRAMES - span))
    numbers = first + stride * torch.arange(frames)
    return numbers.flip(0) if random.random() < 0.5 else numbers


def fit(sequences: Sequences, shape: Shape, random: np.random.Generator) -> Sequences:
    """Cut a centred window of the shape's aspect, zoomed at random, mirrored half the time, and resize it.

    The optical axis stays in the middle of the image, where the pose encoding supposes it.
    """
    height, width = sequences.depth.shape[-2:]
    scale = min(height / shape.height, width / shape.width) * random.uniform(0.75, 1.0)
    rows, columns = min(height, round(scale * shape.height)), min(width, round(scale * shape.width))
    top, left = (height - rows) // 2, (width - columns) // 2
    images = sequences.images[..., top : top + rows, left : left + columns].flatten(0, 1)
    depth = sequences.depth[..., top : top + rows, left : left + columns].flatten(0, 1)
    size = (shape.height, shape.width)
    images = functional.interpolate(images, size, mode="bilinear", antialias=True, align_corners=False)
    depth = functional.interpolate(depth[:, None], size, mode="nearest-exact")[:, 0]
    intrinsics = sequences.intrinsics.clone()
    intrinsics[..., 0, 0] *= shape.width / columns
    intrinsics[..., 1, 1] *= shape.height / rows
    intrinsics[..., 0, 2], intrinsics[..., 1, 2] = shape.width / 2, shape.height / 2
    fitted = Sequences(images[None].clamp(0, 1), depth[None], sequences.world_from_camera, intrinsics)
    return mirror(fitted) if random.random() < 0.5 else fitted


def mirror(sequences: Sequences) -> Sequences:
    """The same world seen in a mirror: x of every camera and of the world points the other way."""
    flip = torch.diag(torch.tensor([-1.0, 1.0, 1.0, 1.0]))
    return Sequences(
        sequences.images.flip(-1),
        sequences.depth.flip(-1),
        flip @ sequences.world_from_camera @ flip,
        sequences.intrinsics,
    )


def draw_dense_frames(config: TrainingConfig, frames: int, random: np.random.Generator) -> Tensor:
    """Numbers of the frames whose dense maps a step judges, in order."""
    count = max(1, round(config.dense_share * frames))
    return torch.from_numpy(np.sort(random.permutation(frames)[:count]))


def draw_context(frames: int, random: np.random.Generator) -> OnePass:
    """Causal most often; else full, a window, chunks, or causal with frames forgotten at random."""
    kind = random.choice(["causal", "full", "window", "chunks", "gaps"], p=[0.4, 0.15, 0.15, 0.15, 0.15])
    if kind in ("causal", "full"):
        return OnePass(str(kind))
    if kind == "window":
        return OnePass("window", window=int(random.integers(2, 6)))
    if kind == "chunks":
        return OnePass(visible=_chunks(frames, int(random.integers(2, 5))))
    return OnePass(visible=_gaps(frames, random))


def _chunks(frames: int, size: int) -> Tensor:
    """Frames of one chunk see each other both ways, and all before."""
    chunk = torch.arange(frames) // size
    return chunk[None] <= chunk[:, None]


def _gaps(frames: int, random: np.random.Generator) -> Tensor:
    """Causal, but each frame sees only some of the past; frame 0 is never forgotten."""
    kept = torch.from_numpy(random.random((frames, frames)) < 0.5)
    kept[:, 0] = True
    return visible_frames("causal", frames, 1) & (kept | torch.eye(frames, dtype=torch.bool))
