"""What one step trains on: sequences cut from clips, and a view of the past.

Everything is drawn from (seed, step, process), so a resumed run goes on as if never interrupted.
"""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from stac_core.cache.one_pass import visible_frames
from stac_core.device import send
from stac_core.training.clips import Clips
from stac_core.training.config import TrainingConfig
from stac_core.training.schedule import Shape, draw_reach, draw_shape
from stac_core.training.sequences import Sequences, choose

TRIES = 8  # to find a clip with a stretch that does not depart too far
SIDEWAYS = 0.15  # share of steps whose sequences lie on their side
UNVARIED = 0.3  # share of sequences that keep their own contrast, and so on, and of those that keep all


def step_random(config: TrainingConfig, step: int, rank: int) -> np.random.Generator:
    """The random numbers of one step of one process."""
    return np.random.default_rng([config.seed, step, rank])


def draw_sequences(
    config: TrainingConfig, clips: Clips, step: int, part: float, random: np.random.Generator
) -> Sequences:
    """Sequences of one shape, each from another clip."""
    shape = draw_shape(config, part, random)
    ready = clips.ready(config.first_clips + int(step * config.clips_per_step))
    reach = draw_reach(config, part, random)
    chosen, frames = draw_stretches(clips, ready, shape, reach, random)
    return vary_colours(fit(clips.read(chosen, frames), shape, random), random)


def draw_stretches(
    clips: Clips, ready: range, shape: Shape, reach: float, random: np.random.Generator
) -> tuple[np.ndarray, Tensor]:
    """Clips [B] and frame numbers [B, S] within them; the first frames where no stretch is near enough."""
    chosen = np.empty(shape.sequences, np.int64)
    frames = np.tile(np.arange(shape.frames), (shape.sequences, 1))
    missing = np.arange(shape.sequences)
    for _ in range(TRIES):
        chosen[missing] = random.integers(ready.start, ready.stop, len(missing))
        drawn, found = draw_frames(shape.frames, clips.departures(chosen[missing]), reach, random)
        frames[missing[found]] = drawn[found]
        missing = missing[~found]
        if not len(missing):
            break
    return chosen, torch.from_numpy(frames)


def draw_frames(
    frames: int, departures: np.ndarray, reach: float, random: np.random.Generator
) -> tuple[np.ndarray, np.ndarray]:
    """Frame numbers [B, S] within clips: some start, either direction of time, some even stride at which the
    last frame has not departed from the first by more than `reach`; and where there is one, bool [B].

    departures [B, F, F]: of `Clips.departures`. Far strides are preferred: what moves too little teaches
    nothing, and what no longer overlaps neither.
    """
    count, length = departures.shape[:2]
    clip = np.arange(count)[:, None]
    first = random.integers(0, length, (count, 1))
    direction = random.choice([-1, 1], (count, 1))
    strides = np.arange(max(1, (length - 1) // (frames - 1)), 0, -1)  # far ones first
    last = first + direction * strides * (frames - 1)
    within = (last >= 0) & (last < length)
    fitting = within & (departures[clip, first, last.clip(0, length - 1)] <= reach)  # [B, strides]
    choices = fitting.sum(1, keepdims=True)
    wanted = (choices * random.random((count, 1)) ** 2 * 0.999).astype(np.int64)
    which = (fitting.cumsum(1) > wanted).argmax(1)
    return first + direction * strides[which][:, None] * np.arange(frames), choices[:, 0] > 0


def fit(sequences: Sequences, shape: Shape, random: np.random.Generator) -> Sequences:
    """Cut a centred window of the shape's aspect, zoomed at random, and resize it; half of the sequences
    mirrored, all lying on their side now and then, since recorded cameras also pitch and roll.

    The optical axis stays in the middle of the image, where the pose encoding supposes it.
    """
    sideways = random.random() < SIDEWAYS
    height, width = (shape.width, shape.height) if sideways else (shape.height, shape.width)
    fitted = _resize(_crop(sequences, height / width, random.uniform(0.75, 1.0)), height, width)
    mirrored = send(torch.from_numpy(random.random(len(fitted.depth)) < 0.5), fitted.depth.device)
    chosen = choose(mirrored, mirror(fitted), fitted)
    return transpose(chosen) if sideways else chosen


def vary_colours(sequences: Sequences, random: np.random.Generator) -> Sequences:
    """Other contrast, brightness, gamma and saturation in each sequence: rendered rooms are duller than real
    ones, whose black and white differ twice as much."""

    def draw(low: float, high: float) -> Tensor:
        values = np.exp(random.uniform(math.log(low), math.log(high), len(images)))
        values[kept | (random.random(len(images)) < UNVARIED)] = 1.0
        return send(torch.from_numpy(values).float(), images.device).view(-1, 1, 1, 1, 1)

    images = sequences.images
    kept = random.random(len(images)) < UNVARIED
    middle = images.mean((1, 2, 3, 4), keepdim=True)
    varied = (middle + (images - middle) * draw(0.8, 3.0)) * draw(0.7, 1.4)
    varied = varied.clamp(1e-4, 1) ** draw(0.7, 1.4)
    grey = varied.mean(2, keepdim=True)
    return replace(sequences, images=(grey + (varied - grey) * draw(0.5, 2.0)).clamp_(0, 1))


def mirror(sequences: Sequences) -> Sequences:
    """The same world seen in a mirror: x of every camera and of the world points the other way."""
    flip = send(torch.diag(torch.tensor([-1.0, 1.0, 1.0, 1.0])), sequences.depth.device)
    poses = flip @ sequences.world_from_camera @ flip
    return Sequences(sequences.images.flip(-1), sequences.depth.flip(-1), poses, sequences.intrinsics)


def transpose(sequences: Sequences) -> Sequences:
    """The same world with x and y exchanged, of every camera and of the world."""
    swap = send(torch.eye(4)[[1, 0, 2, 3]], sequences.depth.device)
    swap3 = swap[:3, :3]
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
    scale = send(torch.tensor([width / columns, height / rows, 1.0]), depth.device)
    return Sequences(
        images.unflatten(0, sequences.depth.shape[:2]).clamp(0, 1),
        depth,
        sequences.world_from_camera,
        sequences.intrinsics * scale[:, None],
    )


def draw_dense_frames(config: TrainingConfig, frames: int, random: np.random.Generator) -> Tensor:
    """Which of all frames of a step have their dense maps judged: numbers [D], in order."""
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
