"""The Triton backend with the keys of every launch split, however small it is."""

from __future__ import annotations

from collections.abc import Callable
from unittest import mock

from stac_core.evaluation.gpu import split
from stac_core.kernels import attend_split_triton
from stac_core.kernels.attend import Attended

ROWS = 128  # queries of a program that combines parts: the interpreter runs programs one after the other


def attend_in(parts: int) -> Callable[..., Attended]:
    """`attend` with the keys in so many parts."""

    def attend(*arguments, **named) -> Attended:
        with mock.patch.object(attend_split_triton, "ROWS", ROWS):
            return split.attend_in(parts)(*arguments, **named)

    return attend
