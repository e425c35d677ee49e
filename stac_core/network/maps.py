"""What a dense head does with maps of features: the contract, and the same in plain PyTorch.

A map is [F, C, rows, columns]. Everything that follows a convolution is said together with it, so that an
implementation can do it in one go.
"""

from __future__ import annotations

from typing import NamedTuple, Protocol

import torch.nn.functional as F
from torch import Tensor, nn

UV_WEIGHT = 0.1


class Uv(NamedTuple):
    """Where a cell lies in the image; what is said of x goes to the first half of the channels."""

    of_x: Tensor  # [C / 2, 1, columns]
    of_y: Tensor  # [C / 2, rows, 1]

    @property
    def cells(self) -> tuple[int, int]:
        """Rows and columns."""
        return self.of_y.shape[1], self.of_x.shape[2]


class Maps(Protocol):
    """One implementation; `conv` is a convolution, maybe a transposed one. Results are new tensors."""

    def normalise(self, norm: nn.LayerNorm, tokens: Tensor) -> Tensor:
        """Tokens [F, N, C] → the same, without gaps."""

    def convolve(
        self, conv: nn.Module, x: Tensor, *added: Tensor, uv: Uv | None = None, rectify: bool = False
    ) -> Tensor:
        """conv(x) + added + UV_WEIGHT · uv, then at least 0 where it is to be rectified.

        added: at most two maps like conv(x).
        """

    def begin(self, conv: nn.Module, x: Tensor) -> Tensor:
        """conv(x), maybe without its bias, which `enlarge` then adds; x need not outlive this."""

    def enlarge(self, conv: nn.Module, begun: Tensor, size: tuple[int, int], uv: Uv | None = None) -> Tensor:
        """conv(x) bilinearly resized to rows and columns, its corners kept, + UV_WEIGHT · uv."""


class TorchMaps:
    """The specification, and a path for any device."""

    def normalise(self, norm: nn.LayerNorm, tokens: Tensor) -> Tensor:
        return norm(tokens)

    def convolve(
        self, conv: nn.Module, x: Tensor, *added: Tensor, uv: Uv | None = None, rectify: bool = False
    ) -> Tensor:
        y = conv(x)
        for other in added:
            y += other
        if uv is not None:
            _add_uv(y, uv)
        return y.relu_() if rectify else y

    def begin(self, conv: nn.Module, x: Tensor) -> Tensor:
        return conv(x)

    def enlarge(self, conv: nn.Module, begun: Tensor, size: tuple[int, int], uv: Uv | None = None) -> Tensor:
        y = F.interpolate(begun, size=size, mode="bilinear", align_corners=True)
        return y if uv is None else _add_uv(y, uv)


def _add_uv(x: Tensor, uv: Uv) -> Tensor:
    """Tell every cell where it lies in the image; x is overwritten and returned."""
    half = x.shape[1] // 2
    x[:, :half].add_(uv.of_x, alpha=UV_WEIGHT)
    x[:, half:].add_(uv.of_y, alpha=UV_WEIGHT)
    return x
