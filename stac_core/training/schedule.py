"""What changes during a run: learning rate, image sizes, frame counts. Pure functions of the step and of the
part of the run that lies behind, 0 to 1."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from stac_core.config import PATCH_SIZE
from stac_core.training.config import TrainingConfig

ASPECTS = (9 / 16, 3 / 4, 1.0)  # height over width
COLUMN_STEP = 2  # between the widths that are drawn, in patches
SHORTEST = 2  # frames; one frame has nothing to match
DIVISIBLE = 12  # the frames of a step are a multiple of it, so that they divide into many lengths


@dataclass(frozen=True)
class Shape:
    """Size of one step's batch."""

    sequences: int
    frames: int
    height: int
    width: int


def learning_rate(config: TrainingConfig, step: int, part: float) -> float:
    """Linear warm-up by steps, then cosine decay to 1 % at the end."""
    if step < config.warmup_steps:
        return config.learning_rate * (step + 1) / config.warmup_steps
    warm = config.warmup_steps / config.steps
    decayed = min(1.0, max(0.0, (part - warm) / (1 - warm)))
    return config.learning_rate * (0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * decayed)))


def draw_shape(config: TrainingConfig, part: float, random: np.random.Generator) -> Shape:
    """Frames between 2 and a growing limit (short ones more often), widths and aspects spread evenly.

    All frames of a step together fill `patches_per_step`, so that every step costs about the same. Their
    number depends on their size alone, and there are few sizes: on a GPU the convolutions of every new shape
    are planned anew, which can take longer than the step.
    """
    grown = _grown(config, part)
    longest = config.first_frames + grown * (config.last_frames - config.first_frames)
    first, last = config.first_width // PATCH_SIZE, config.last_width // PATCH_SIZE
    columns = int(random.choice(range(first, round(first + grown * (last - first)) + 1, COLUMN_STEP)))
    rows = max(4, round(columns * random.choice(ASPECTS)))
    together = DIVISIBLE * max(1, round(config.patches_per_step / (DIVISIBLE * rows * columns)))
    wanted = math.exp(random.uniform(math.log(SHORTEST), math.log(longest + 1)))
    frames = max(n for n in range(SHORTEST, int(wanted) + 1) if together % n == 0)
    return Shape(together // frames, frames, rows * PATCH_SIZE, columns * PATCH_SIZE)


def draw_reach(config: TrainingConfig, part: float, random: np.random.Generator) -> float:
    """How far a sequence may depart from its first frame, up to a growing limit (see `Clips.departures`)."""
    limit = config.first_reach + _grown(config, part) * (config.last_reach - config.first_reach)
    return limit * float(random.uniform(0.4, 1.0))


def _grown(config: TrainingConfig, part: float) -> float:
    """From 0 at the start of the run to 1 where everything has grown."""
    return 1.0 if config.growth == 0 else min(1.0, part / config.growth)
