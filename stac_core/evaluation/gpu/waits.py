"""Where the host waits for the device, by line of this package: each wait empties the device's queue."""

from __future__ import annotations

import sys
import warnings
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

PACKAGE = Path(__file__).parents[2]
LOOKS = (
    "_local_scalar_dense",
    "item",
    "is_nonzero",
    "nonzero",
    "masked_select",
    "_unique2",
    "unique_dim",
    "_unique",
    "unique_consecutive",
    "bincount",
    "repeat_interleave",
)


def host_waits(work: Callable[[], object], device: torch.device) -> list[dict[str, Any]]:
    """Lines of the package that wait, most often first.

    On a GPU PyTorch reports every wait. On a CPU, where nobody waits, the operations are counted whose result
    or shape the host would have to look at; copies between host and device do not show there.
    """
    found: Counter[str] = Counter()
    if device.type == "cuda":
        _count_reports(work, found)
    else:
        with torch.compiler.set_stance("force_eager"), _Looks(found):  # compiled pieces hide operations
            work()
    return [{"line": line, "waits": count} for line, count in found.most_common()]


def _count_reports(work: Callable[[], object], found: Counter[str]) -> None:
    def note(message: Warning | str, *_: Any, **__: Any) -> None:
        if "synchroniz" in str(message):
            found[_line()] += 1

    _set_reports("warn")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("always")
            warnings.showwarning = note
            work()
    finally:
        _set_reports("default")


def _set_reports(mode: str) -> None:
    """Without PyTorch's notice that it may miss waits, which reads like the report of one."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.cuda.set_sync_debug_mode(mode)


class _Looks(TorchDispatchMode):
    def __init__(self, found: Counter[str]) -> None:
        super().__init__()
        self._found = found

    def __torch_dispatch__(
        self, function: Any, types: Any, arguments: tuple[Any, ...] = (), named: dict[str, Any] | None = None
    ) -> Any:
        if function._opname in LOOKS or (function._opname in ("index", "index_put_") and _by_mask(arguments)):
            self._found[_line()] += 1
        return function(*arguments, **(named or {}))


def _by_mask(arguments: tuple[Any, ...]) -> bool:
    return any(index is not None and index.dtype == torch.bool for index in arguments[1])


def _line() -> str:
    """The innermost line of the package that is under way, benchmarks left out."""
    frame = sys._getframe(1)
    while frame is not None:
        file = Path(frame.f_code.co_filename)
        if file.is_relative_to(PACKAGE) and "evaluation" not in file.parts:
            return f"{file.relative_to(PACKAGE)}:{frame.f_lineno}"
        frame = frame.f_back  # type: ignore[assignment]
    return "outside the package"
