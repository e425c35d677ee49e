"""Numbers that the host needs only once it has other reasons to wait."""

from __future__ import annotations

from functools import cached_property

from torch import Tensor

from stac_core.device import HostCopy


class Later:
    """Numbers [n] or [] of the device that the host will ask for, without waiting for what follows them."""

    def __init__(self, numbers: Tensor) -> None:
        self._copy = HostCopy(numbers)

    @cached_property
    def list(self) -> list[int]:
        """All of them."""
        return [int(number) for number in self._copy.take().flatten().tolist()]

    def __int__(self) -> int:
        """The only one there is."""
        (number,) = self.list
        return number
