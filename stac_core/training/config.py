"""Every setting of a training run."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from stac_core.config import NETWORKS, PATCH_SIZE
from stac_core.settings import check_settings, refuse, setting

LARGEST_SEED = 2**31 - 1  # beyond, worlds would be those of a smaller one


@dataclass(frozen=True)
class TrainingConfig:
    """One training run; sizes, frame counts and reach grow from `first_*` to `last_*`."""

    network: str = setting("embedded", "which network to train", choices=tuple(NETWORKS))
    seed: int = setting(0, "seed of the weights and of all worlds", minimum=0, maximum=LARGEST_SEED)
    steps: int = setting(12000, "optimiser steps of the whole run", minimum=1)
    minutes: float = setting(
        0.0,
        "length of the run by the clock of this process: sizes and rates follow it, and it ends when time or "
        "steps are over; 0 = steps alone",
        minimum=0.0,
        unit="min",
    )
    patches_per_step: int = setting(1536, "sequences × frames × patches of one step and process", minimum=16)
    learning_rate: float = setting(8e-4, "peak of the learning rate", minimum=1e-7, maximum=1.0)
    regression_rate: float = setting(
        0.2, "learning rate of camera head and shifts, as a share of the others'", minimum=0.0, maximum=1.0
    )
    warmup_steps: int = setting(200, "steps of linear warm-up; cosine decay afterwards", minimum=0)
    weight_decay: float = setting(0.02, "decay of matrices", minimum=0.0, maximum=1.0)
    gradient_clip: float = setting(
        1.0, "largest norm of the gradient of the trunk, and of each head", minimum=1e-3
    )
    first_width: int = setting(112, "image width at the start", minimum=56, unit="px")
    last_width: int = setting(168, "largest image width once grown", minimum=56, unit="px")
    first_frames: int = setting(4, "longest sequence at the start; the shortest is always 2", minimum=2)
    last_frames: int = setting(12, "longest sequence once grown", minimum=2)
    first_reach: float = setting(
        0.4,
        "how far sequences of clips depart from their first frame at the start: turn in radians plus way in "
        "mean depths",
        minimum=0.01,
    )
    last_reach: float = setting(2.0, "the same once grown", minimum=0.01)
    growth: float = setting(
        0.7, "share of the run during which sizes, frames and reach grow", minimum=0.0, maximum=1.0
    )
    clips: str = setting(
        "auto",
        "where rendered clips are kept, which serve several steps: in a folder, which outlives the run; in "
        "memory, on the device that trains; auto = memory on a GPU, folder on a CPU",
        choices=("auto", "folder", "memory"),
    )
    clip_frames: int = setting(24, "frames of a clip", minimum=2)
    clip_width: int = setting(168, "width of a clip's 4:3 images", minimum=56, unit="px")
    kept_clips: int = setting(4000, "clips kept in memory; older ones make way", minimum=1)
    first_clips: int = setting(500, "rendered clips in use from the start", minimum=1)
    clips_per_step: float = setting(0.5, "further clips that every step brings into use", minimum=0.0)
    dense_share: float = setting(
        0.34, "share of frames whose depth and points a step judges", minimum=0.0, maximum=1.0
    )
    depth_weight: float = setting(1.0, "weight of the depth loss", minimum=0.0)
    point_weight: float = setting(0.5, "weight of the point loss", minimum=0.0)
    camera_weight: float = setting(2.0, "weight of the camera loss", minimum=0.0)
    matching_weight: float = setting(1.0, "weight of the matching losses; 0 = not computed", minimum=0.0)
    motion_weight: float = setting(1.0, "weight of the motion losses; 0 = not computed", minimum=0.0)
    device: str = setting("auto", "auto = cuda where there is one, else cpu; or a torch device name")
    execution: str = setting(
        "compiled",
        "compiled = small operations of the blocks fused by torch.compile, which takes minutes at the start "
        "and pays after some hundred steps; eager = operation by operation",
        choices=("compiled", "eager"),
    )
    precision: str = setting(
        "auto",
        "autocast of the network; auto = bfloat16 where the device has instructions for it, else float32",
        choices=("auto", "bfloat16", "float32"),
    )
    threads: int = setting(0, "CPU threads; 0 = what PyTorch chooses", minimum=0)
    log_every: int = setting(20, "steps between rows of the training table", minimum=1)
    evaluate_every: int = setting(400, "steps between held-out evaluations; 0 = never", minimum=0)
    checkpoint_minutes: float = setting(3.0, "longest work lost to a crash", minimum=0.0, unit="min")
    out: str = setting("out/training", "folder of checkpoint, tables and plot")

    def __post_init__(self) -> None:
        check_settings(self)
        for name in ("first_width", "last_width", "clip_width"):
            width = getattr(self, name)
            if width % PATCH_SIZE:
                raise refuse(
                    self, name, f"not divisible by {PATCH_SIZE}", round(width / PATCH_SIZE) * PATCH_SIZE
                )
        for first, last in (
            ("first_width", "last_width"),
            ("first_frames", "last_frames"),
            ("first_reach", "last_reach"),
        ):
            if getattr(self, last) < getattr(self, first):
                raise refuse(self, last, f"smaller than {first}", getattr(self, first))
        if self.last_frames > self.clip_frames:
            raise refuse(self, "last_frames", f"clips have {self.clip_frames} frames", self.clip_frames)
        if self.warmup_steps >= self.steps:
            raise refuse(self, "warmup_steps", f"not below steps = {self.steps}", self.steps // 10)


def changed_flags(values: Mapping[str, Any], section: type) -> str:
    """The flags that repeat a run: what differs from the defaults, apart from the folder."""
    defaults = dataclasses.asdict(section())
    chosen = {k: v for k, v in values.items() if k != "out" and defaults.get(k) != v}
    return "".join(f" --{name.replace('_', '-')} {value}" for name, value in chosen.items())
