"""Random weights to start a training from, and to run with where no trained weights exist."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from stac_core.network.camera_head import CameraHead
from stac_core.network.causal_vggt import CausalVGGT

TOKEN_DEVIATION = 0.02
FIELD_OF_VIEW = 1.0  # radians; the ReLU behind it must start alive
CORRECTION_SCALE = 0.01  # first corrections of the pose are small beside that


@torch.no_grad()
def initialise(network: CausalVGGT, seed: int, drawn_on: torch.device | str = "cpu") -> CausalVGGT:
    """Fill every parameter from one seed, on whatever device it lies; returns the network.

    A seed means the same numbers wherever they are drawn on the CPU; a GPU draws others, and faster.

    Glorot-uniform matrices, zero biases, PyTorch's own convolutions, layer scales of 1 (open residual
    branches: a small network learns at once), small random tokens; the untrained camera stands still
    at the origin.
    """
    generator = torch.Generator(drawn_on).manual_seed(seed)
    for name, parameter in network.named_parameters():
        parameter.copy_(_initial(name, parameter, generator))
    _stand_still(network.camera_head)
    return network


def _stand_still(head: CameraHead) -> None:
    """No motion and an ordinary lens after the last iteration; every iteration adds the same bias."""
    last = head.pose_branch.fc2
    goal = last.bias.new_tensor([0, 0, 0, 0, 0, 0, 1, FIELD_OF_VIEW, FIELD_OF_VIEW])
    last.bias.copy_(goal / head.iterations)
    last.weight.mul_(CORRECTION_SCALE)


def _initial(name: str, parameter: Tensor, generator: torch.Generator) -> Tensor:
    values = torch.zeros(parameter.shape, device=generator.device)
    if ("token" in name and "norm" not in name) or name.endswith("pos_embed"):
        return nn.init.trunc_normal_(values, std=TOKEN_DEVIATION, generator=generator)
    if parameter.ndim == 4:
        return nn.init.kaiming_uniform_(values, a=5**0.5, generator=generator)
    if parameter.ndim == 2:
        return nn.init.xavier_uniform_(values, generator=generator)
    return values if name.endswith("bias") else values + 1
