"""Arrays as the `data` of a message."""

from __future__ import annotations

import array
from typing import Any

import numpy as np
from numpy.typing import NDArray


def byte_array(values: NDArray[Any]) -> array.array[int]:
    """The bytes of an array in the one type that messages take over without looking at every byte."""
    data = array.array("B")
    data.frombytes(np.ascontiguousarray(values).reshape(-1).view(np.uint8).data)
    return data
