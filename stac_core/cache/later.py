"""Numbers that the host needs only once it has other reasons to wait."""

from __future__ import annotations

import torch
from torch import Tensor


class Later:
    """A number [] of the device that the host will ask for, then waiting for it but not for what follows."""

    def __init__(self, number: Tensor) -> None:
        self._number, self._there = number, None
        if number.device.type == "cuda":
            self._number = torch.empty_like(number, device="cpu", pin_memory=True)
            self._number.copy_(number, non_blocking=True)
            self._there = torch.cuda.current_stream(number.device).record_event()

    def __int__(self) -> int:
        if self._there is not None:
            self._there.synchronize()
        return int(self._number)
