"""A table that grows by whole pages, so that growing never needs twice the memory.

Small pages are joined, which copies little and spares every later access a look at many pages.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch
from torch import Tensor

from stac_core.cache.saved_state import State

GROWTH = 1 / 16  # a new page is this share of what is there: so much may be waste
SMALL = 1 << 22  # bytes of a page that may be copied to join it with the next


class Pages:
    """Named columns of equal length. Reading and writing go by row numbers, in any order."""

    def __init__(self, columns: Mapping[str, tuple[int, torch.dtype]], device: torch.device) -> None:
        """columns: name → trailing width and dtype. Fresh rows hold zeros."""
        self._columns, self.device = columns, device
        self._starts: list[int] = []
        self._pages: list[dict[str, Tensor]] = []
        self.length = 0
        self._overwritten: list[tuple[Tensor, Tensor, Tensor]] | None = None  # column, rows, what was there

    @property
    def names(self) -> list[str]:
        return list(self._columns)

    @property
    def row_bytes(self) -> int:
        return sum(width * dtype.itemsize for width, dtype in self._columns.values())

    @property
    def bytes(self) -> int:
        """Allocated."""
        return self.length * self.row_bytes

    @property
    def parts(self) -> list[dict[str, Tensor]]:
        """The columns of every page, in the order of their rows."""
        return list(self._pages)

    def grow(self, rows: int) -> None:
        """Append one page, or as many rows to the last one while it is small."""
        fresh = {
            name: torch.zeros(rows, width, dtype=dtype, device=self.device)
            for name, (width, dtype) in self._columns.items()
        }
        joined = (self.length - self._starts[-1] + rows) * self.row_bytes if self._pages else 0
        if self._pages and joined <= max(SMALL, GROWTH * self.bytes):
            self._pages[-1] = {name: torch.cat([self._pages[-1][name], new]) for name, new in fresh.items()}
        else:
            self._starts.append(self.length)
            self._pages.append(fresh)
        self.length += rows

    def read(self, name: str, rows: Tensor) -> Tensor:
        """[n] row numbers → [n, width]."""
        width, dtype = self._columns[name]
        found = torch.empty(len(rows), width, dtype=dtype, device=self.device)
        for page, here, local in self._split(rows):
            found[here] = page[name][local]
        return found

    def write(self, name: str, rows: Tensor, values: Tensor | float) -> None:
        """Set [n] different rows to [n, width] values, or all of them to one number."""
        for page, here, local in self._split(rows):
            if self._overwritten is not None:
                self._overwritten.append((page[name], local, page[name][local]))
            page[name][local] = values[here] if isinstance(values, Tensor) else values

    def watch(self) -> None:
        """From here on, remember what is overwritten."""
        self._overwritten = []

    def undo(self) -> None:
        """Write back what has been overwritten since `watch`."""
        for column, rows, old in reversed(self._overwritten or []):
            column[rows] = old
        self.unwatch()

    def unwatch(self) -> None:
        self._overwritten = None

    def state(self) -> State:
        """The columns in one piece each."""
        if not self._pages:
            return {}
        return {name: torch.cat([page[name] for page in self._pages]) for name in self._columns}

    def restore(self, state: State) -> None:
        """Hold what `state` had given, as one page."""
        if state:
            self._starts, self._pages = [0], [{name: state[name] for name in self._columns}]
            self.length = len(next(iter(self._pages[0].values())))

    def _split(self, rows: Tensor) -> Iterator[tuple[dict[str, Tensor], Tensor | slice, Tensor]]:
        """Per page: the page, which of `rows` lie in it, and their numbers within it."""
        if len(self._pages) == 1:
            yield self._pages[0], slice(None), rows
            return
        starts = torch.tensor(self._starts, device=rows.device)
        number = torch.searchsorted(starts, rows, right=True) - 1
        order = number.sort(stable=True).indices
        counts = torch.bincount(number, minlength=len(self._pages)).tolist()
        for page, start, here in zip(self._pages, self._starts, order.split(counts), strict=True):
            if len(here):
                yield page, here, rows[here] - start
