"""Other lengths for a map that exists already."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True)
class Rescaling:
    """All distances from a point of the map multiplied by a factor; directions stay."""

    factor: float
    fixed_point: NDArray[np.float64]  # [3]

    def of(self, positions: NDArray[Any]) -> NDArray[np.float64]:
        """Where positions [..., 3] of the map come to lie."""
        return self.fixed_point + self.factor * (positions - self.fixed_point)
