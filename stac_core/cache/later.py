"""Numbers that the host needs only once it has other reasons to wait."""

from __future__ import annotations

from functools import cached_property

import torch
from torch import Tensor


class Later:
    """Numbers [n] or [] of the device that the host will ask for, without waiting for what follows them."""

    def __init__(self, numbers: Tensor) -> None:
        self._numbers, self._there = numbers, None
        if numbers.device.type == "cuda":
            self._numbers = torch.empty_like(numbers, device="cpu", pin_memory=True)
            self._numbers.copy_(numbers, non_blocking=True)
            self._there = torch.cuda.current_stream(numbers.device).record_event()

    @cached_property
    def list(self) -> list[int]:
        """All of them."""
        if self._there is not None:
            self._there.synchronize()
        return [int(number) for number in self._numbers.flatten().tolist()]

    def __int__(self) -> int:
        """The only one there is."""
        (number,) = self.list
        return number
