"""Weights to start from. The network's own initial values suit a fine-tune of a deep pretrained model."""

from __future__ import annotations

import torch
from torch import nn

LAYER_SCALE = 1.0  # a shallow network learns at once only with open residual branches


@torch.no_grad()
def initialise(network: nn.Module) -> None:
    """Glorot-uniform matrices, zero biases, open layer scales; random numbers from torch's generator."""
    for name, module in network.named_modules():
        if isinstance(module, nn.Linear):
            nn.init.xavier_uniform_(module.weight)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
        for key, parameter in module.named_parameters(prefix=name, recurse=False):
            if key.endswith("gamma"):
                parameter.fill_(LAYER_SCALE)
            elif "token" in key or "pos_embed" in key:
                nn.init.trunc_normal_(parameter, std=0.02)
