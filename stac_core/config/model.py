"""Which network runs, where and by which kernels, and what it is given to see."""

from __future__ import annotations

from dataclasses import dataclass

from stac_core.config.network import NETWORKS, PATCH_SIZE
from stac_core.settings import check_settings, refuse, setting


@dataclass(frozen=True)
class ModelConfig:
    """Which network, its weights, and where and in which precision it runs."""

    name: str = setting("embedded", "backbone", choices=tuple(NETWORKS))
    checkpoint: str = setting(
        "", "weights: file or directory; empty = ckpt/<name>/model.* if present, else the bundled model"
    )
    device: str = setting("auto", "auto = cuda where there is one, else cpu; or a torch device name")
    dtype: str = setting(
        "auto",
        "aggregator precision; auto = bfloat16 where the GPU has it, else float16; CPU float32",
        choices=("auto", "float32", "bfloat16", "float16"),
    )
    execution: str = setting(
        "auto",
        "eager = operation by operation; compiled = small operations fused by torch.compile; recorded = "
        "compiled, and replayed as CUDA graphs; auto = recorded on a GPU, eager on the CPU",
        choices=("auto", "eager", "compiled", "recorded"),
    )
    seed: int = setting(0, "seed of random weights where no trained weights exist", minimum=0)

    def __post_init__(self) -> None:
        check_settings(self)


@dataclass(frozen=True)
class ImageConfig:
    """How a camera frame becomes network pixels."""

    rule: str = setting(
        "crop",
        "crop = fit the width, crop tall images; pad = fit the longer side, pad white; "
        "evaluation, evaluation_crop = the published evaluation scripts, reaching whole patches by a "
        "second resize or by a cut",
        choices=("crop", "pad", "evaluation", "evaluation_crop"),
    )
    size: int = setting(
        0,
        "network image width, for crop and pad a multiple of 14; 0 = the size the network was trained at",
        minimum=0,
        maximum=2044,
        unit="px",
    )

    def __post_init__(self) -> None:
        check_settings(self)
        if self.size % PATCH_SIZE and not self.rule.startswith("evaluation"):
            nearest = max(1, round(self.size / PATCH_SIZE)) * PATCH_SIZE
            raise refuse(self, "size", f"must be a multiple of the patch size {PATCH_SIZE}", nearest)


@dataclass(frozen=True)
class KernelConfig:
    """Which implementation of attention, voxel merge and what else has hand-written kernels runs."""

    backend: str = setting(
        "auto", "kernels; auto = the fastest that loads", choices=("auto", "torch", "triton", "cuda")
    )

    def __post_init__(self) -> None:
        check_settings(self)
