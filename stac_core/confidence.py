"""Which pixels of an image are certain enough to be used."""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray


def most_confident(
    valid: NDArray[np.bool_], confidence: NDArray[np.float32], left_out: float
) -> NDArray[np.bool_]:
    """The valid ones but the least confident `left_out` percent of them; all arrays alike in shape.

    The limit is that of `np.percentile`, method `higher`, which takes twenty times as long.
    """
    values = confidence[valid]
    if not len(values):
        return valid
    place = math.ceil(left_out / 100 * (len(values) - 1))
    return valid & (confidence >= np.partition(values, place)[place])
