"""What one step trains on: sequences cut from clips, and a view of the past.

Everything is drawn from (seed, step, process), so a resumed run goes on as if never interrupted.
"""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

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

    The optical axis comes to lie in the middle of the image, where the pose encoding supposes it.
    """
    sideways = random.random() < SIDEWAYS
    height, width = (shape.width, shape.height) if sideways else (shape.height, shape.width)
    zoom = random.uniform(0.75, 1.0)
    mirrored = send(torch.from_numpy(random.random(len(sequences.depth)) < 0.5), sequences.depth.device)
    fitted = resize(choose(mirrored, mirror(sequences), sequences), height, width, zoom)
    return transpose(fitted) if sideways else fitted


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
    intrinsics = sequences.intrinsics.clone()  # centres of pixels lie at integers, from 0 on
    intrinsics[..., 0, 2] = sequences.depth.shape[-1] - 1 - intrinsics[..., 0, 2]
    return Sequences(sequences.images.flip(-1), sequences.depth.flip(-1), poses, intrinsics)


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


def resize(sequences: Sequences, height: int, width: int, zoom: float = 1.0) -> Sequences:
    """`zoom` of the largest window of that shape with the optical axis in its middle, at (width, height) / 2.

    A whole number of pixels seldom does that: new ones begin anywhere between old ones.
    """
    sizes, old_sizes = (width, height), sequences.depth.shape[:-3:-1]
    axes = sequences.intrinsics[:, 0, :2, 2].unbind(-1)  # [B] each, the same in all frames
    sides = [_largest_pixel(*side) for side in zip(axes, old_sizes, sizes, strict=True)]
    pixel = zoom * torch.stack(sides).amin()
    across, down = (
        axis[:, None] + pixel * (torch.arange(size, device=axis.device) - size / 2)
        for axis, size in zip(axes, sizes, strict=True)
    )
    blend_across, blend_down = map(_blend, (across, down), old_sizes, (pixel, pixel))
    images = blend_down[:, None, None] @ sequences.images @ blend_across.mT[:, None, None]
    columns, rows = (
        places.round().long().clamp(0, old_size - 1)
        for places, old_size in zip((across, down), old_sizes, strict=True)
    )
    batch = torch.arange(len(rows), device=rows.device)[:, None, None]
    depth = sequences.depth.movedim(1, -1)[batch, rows[:, :, None], columns[:, None]].movedim(-1, 1)
    intrinsics = sequences.intrinsics.clone()
    intrinsics[..., :2, :] /= pixel
    intrinsics[..., 0, 2], intrinsics[..., 1, 2] = width / 2, height / 2
    return Sequences(images, depth, sequences.world_from_camera, intrinsics)


def _largest_pixel(axis: Tensor, old_size: int, size: int) -> Tensor:
    """Of `size` new ones in a row, in old ones, none of which reaches beyond the `old_size` there are.

    axis: [B] where it meets the old row, in which pixels have their centres at integers.
    """
    before, behind = (axis + 0.5) / (size / 2 + 0.5), (old_size - 0.5 - axis) / (size / 2 - 0.5)
    return torch.minimum(before, behind).amin()


def _blend(places: Tensor, old_size: int, pixel: Tensor) -> Tensor:
    """Shares of the old pixels in new ones at `places` [B, n] of a row, [B, n, old_size]: linear, and over as
    many as a new one covers, so that what is too fine for these does not flicker."""
    apart = (torch.arange(old_size, device=places.device) - places[..., None]).abs()
    shares = (1 - apart / pixel.clamp(min=1)).clamp(min=0)
    return shares / shares.sum(-1, keepdim=True)


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
