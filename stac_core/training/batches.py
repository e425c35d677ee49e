"""What one step trains on: sequences cut from clips, and a view of the past.

Everything is drawn from (seed, step, process), so a resumed run goes on as if never interrupted.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from stac_core.cache.one_pass import visible_frames
from stac_core.training.clips import WORLDS, Clips
from stac_core.training.config import TrainingConfig
from stac_core.training.schedule import Shape, draw_reach, draw_shape
from stac_core.training.sequences import Sequences, join
from stac_core.worlds import sample_batch

TRIES = 8  # to find a stretch that does not depart too far
SIDEWAYS = 0.15  # share of sequences that lie on their side


def step_random(config: TrainingConfig, step: int, rank: int) -> np.random.Generator:
    """The random numbers of one step of one process."""
    return np.random.default_rng([config.seed, step, rank])


def draw_sequences(
    config: TrainingConfig, step: int, random: np.random.Generator, device: torch.device
) -> Sequences:
    """Sequences of one shape on `device`: new worlds, or each from another clip."""
    shape = draw_shape(config, step, random)
    live = config.worlds == "live" or (config.worlds == "auto" and device.type == "cuda")
    return (
        _from_worlds(shape, random, device) if live else _from_clips(config, step, shape, random).to(device)
    )


def _from_worlds(shape: Shape, random: np.random.Generator, device: torch.device) -> Sequences:
    seed = 2 * int(random.integers(2**40, 2**61)) + 1  # odd like every world to train on, beyond the clips
    size = (shape.sequences, shape.frames, shape.height, shape.width)
    worlds = sample_batch(WORLDS, *size, seed=seed, device=device)
    return Sequences(worlds.images, worlds.depth, worlds.world_from_camera, worlds.intrinsics)


def _from_clips(config: TrainingConfig, step: int, shape: Shape, random: np.random.Generator) -> Sequences:
    clips = Clips(Path(config.out) / "clips", config.seed)
    ready = config.first_clips + int(step * config.clips_per_step)
    reach = draw_reach(config, step, random)
    parts: list[Sequences] = []
    while len(parts) < shape.sequences:
        for _ in range(TRIES):
            clip = int(random.integers(0, ready))
            frames = draw_frames(shape.frames, clips.departures(clip), reach, random)
            if frames is not None:
                break
        else:
            frames = torch.arange(shape.frames)
        parts.append(fit(clips.read(clip, frames), shape, random))
    return join(parts)


def draw_frames(
    frames: int, departures: np.ndarray, reach: float, random: np.random.Generator
) -> Tensor | None:
    """Frame numbers [S] within a clip: some start, either direction of time, some even stride at which the
    last frame has not departed from the first by more than `reach`; None where every stride does.

    departures [N, N]: how far frame j (column) has departed from frame i. Far strides are preferred: what
    moves too little teaches nothing, and what no longer overlaps neither.
    """
    count = len(departures)
    first = int(random.integers(0, count))
    direction = int(random.choice([-1, 1]))
    strides = [
        stride
        for stride in range(1, (count - 1) // (frames - 1) + 1)
        if 0 <= (last := first + direction * stride * (frames - 1)) < count
        and departures[first, last] <= reach
    ]
    if not strides:
        return None
    stride = strides[-1 - int(len(strides) * random.random() ** 2 * 0.999)]
    return first + direction * stride * torch.arange(frames)


def fit(sequences: Sequences, shape: Shape, random: np.random.Generator) -> Sequences:
    """Cut a centred window of the shape's aspect, zoomed at random, and resize it; mirrored half the time,
    lying on its side now and then, since recorded cameras also pitch and roll.

    The optical axis stays in the middle of the image, where the pose encoding supposes it.
    """
    sideways = random.random() < SIDEWAYS
    height, width = (shape.width, shape.height) if sideways else (shape.height, shape.width)
    fitted = _resize(_crop(sequences, height / width, random.uniform(0.75, 1.0)), height, width)
    mirrored = mirror(fitted) if random.random() < 0.5 else fitted
    return transpose(mirrored) if sideways else mirrored


def mirror(sequences: Sequences) -> Sequences:
    """The same world seen in a mirror: x of every camera and of the world points the other way."""
    flip = torch.diag(torch.tensor([-1.0, 1.0, 1.0, 1.0]))
    poses = flip @ sequences.world_from_camera @ flip
    return Sequences(sequences.images.flip(-1), sequences.depth.flip(-1), poses, sequences.intrinsics)


def transpose(sequences: Sequences) -> Sequences:
    """The same world with x and y exchanged, of every camera and of the world."""
    swap, swap3 = torch.eye(4)[[1, 0, 2, 3]], torch.eye(3)[[1, 0, 2]]
    return Sequences(
        sequences.images.mT,
        sequences.depth.mT,
        swap @ sequences.world_from_camera @ swap,
        swap3 @ sequences.intrinsics @ swap3,
    )


def _crop(sequences: Sequences, aspect: float, zoom: float) -> Sequences:
    """The middle of the images: `zoom` of the largest window of that aspect (height over width)."""
    height, width = sequences.depth.shape[-2:]
    across = zoom * min(width, height / aspect)
    rows, columns = round(across * aspect), round(across)
    top, left = (height - rows) // 2, (width - columns) // 2
    window = (..., slice(top, top + rows), slice(left, left + columns))
    intrinsics = sequences.intrinsics.clone()
    intrinsics[..., 0, 2], intrinsics[..., 1, 2] = columns / 2, rows / 2
    return Sequences(
        sequences.images[window], sequences.depth[window], sequences.world_from_camera, intrinsics
    )


def _resize(sequences: Sequences, height: int, width: int) -> Sequences:
    rows, columns = sequences.depth.shape[-2:]
    images = functional.interpolate(
        sequences.images.flatten(0, 1), (height, width), mode="bilinear", antialias=True, align_corners=False
    )
    depth = functional.interpolate(sequences.depth, (height, width), mode="nearest-exact")
    scale = torch.tensor([width / columns, height / rows, 1.0])
    return Sequences(
        images.unflatten(0, sequences.depth.shape[:2]).clamp(0, 1),
        depth,
        sequences.world_from_camera,
        sequences.intrinsics * scale[:, None],
    )


def draw_dense_frames(config: TrainingConfig, frames: int, random: np.random.Generator) -> Tensor:
    """Numbers of the frames whose dense maps a step judges, in order."""
    count = max(1, round(config.dense_share * frames))
    return torch.from_numpy(np.sort(random.permutation(frames)[:count]))


def draw_visible(frames: int, random: np.random.Generator) -> Tensor:
    """Which frame (row) sees which, bool [S, S]: causal most often; else all, a window, chunks, or causal
    with frames forgotten at random, so that a compressed cache meets a network that knows gaps."""
    kind = random.choice(["causal", "full", "window", "chunks", "gaps"], p=[0.4, 0.15, 0.15, 0.15, 0.15])
    if kind == "chunks":
        return _chunks(frames, int(random.integers(2, 5)))
    if kind == "gaps":
        return _gaps(frames, random)
    return visible_frames(str(kind), frames, int(random.integers(2, 6)))


def _chunks(frames: int, size: int) -> Tensor:
    """Frames of one chunk see each other both ways, and all before."""
    chunk = torch.arange(frames) // size
    return chunk[None] <= chunk[:, None]


def _gaps(frames: int, random: np.random.Generator) -> Tensor:
    """Causal, but each frame sees only some of the past; frame 0 is never forgotten."""
    kept = torch.from_numpy(random.random((frames, frames)) < 0.5)
    kept[:, 0] = True
    return visible_frames("causal", frames, 1) & (kept | torch.eye(frames, dtype=torch.bool))
