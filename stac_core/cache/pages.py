"""A table that grows by whole pages, so that growing never needs twice the memory.

Small pages are joined, which copies little and spares every later access a look at many pages.
"""

from __future__ import annotations

from collections.abc import Mapping
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor

from stac_core.cache.saved_state import State
from stac_core.device import send

GROWTH = 1 / 16  # a new page is this share of what is there: so much may be waste
SMALL = 1 << 26  # bytes of a page that may in any case be copied to join it with the next
JOINED = 1 / 2  # most of the table that may be copied for that


class Pages:
    """Named columns of equal length. Reading and writing go by row numbers, in any order, once located."""

    def __init__(
        self, columns: Mapping[str, tuple[int, torch.dtype]], device: torch.device, fresh: int = 0,
        in_one: bool = False,
    ) -> None:  # fmt: skip
        """columns: name → trailing width and dtype; fresh: what new rows hold.

        in_one: one page for all, as suits a table that is small beside everything else.
        """
        self._columns, self.device, self._fresh, self._in_one = columns, device, fresh, in_one
        self._starts: list[int] = []
        self._pages: list[dict[str, Tensor]] = []
        self.length = 0
        self._overwritten: list[_Overwritten] | None = None  # where all that is written is to be remembered

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
            name: torch.full((rows, width), self._fresh, dtype=dtype, device=self.device)
            for name, (width, dtype) in self._columns.items()
        }
        joined = (self.length - self._starts[-1] + rows) * self.row_bytes if self._pages else 0
        if self._pages and (self._in_one or joined <= max(SMALL, JOINED * self.bytes)):
            self._pages[-1] = {name: torch.cat([self._pages[-1][name], new]) for name, new in fresh.items()}
        else:
            self._starts.append(self.length)
            self._pages.append(fresh)
        self.length += rows

    def locate(self, rows: Tensor) -> Places:
        """Where rows [n] lie, for all columns, until the table grows; nowhere in a table without rows."""
        if not self._pages:
            return Places(len(rows), [])
        if len(self._pages) == 1:
            return Places(len(rows), [Place(0, None, rows)])
        starts = send(torch.tensor(self._starts), rows.device)
        page_of = torch.bucketize(rows, starts, right=True).short() - 1  # few bits are sorted sooner
        page_of, order = page_of.sort(stable=True)
        numbers = torch.arange(len(self._pages), dtype=page_of.dtype, device=rows.device)
        borders = torch.searchsorted(page_of, numbers).tolist()
        spans = enumerate(pairwise([*borders, len(rows)]))
        places = [
            Place(page, order[first:last], rows[order[first:last]] - self._starts[page])
            for page, (first, last) in spans
            if last > first
        ]
        return Places(len(rows), places)

    def read(self, name: str, places: Places) -> Tensor:
        """The n rows located [n, width]."""
        if places.in_one:
            column, local = self._pages[0][name], places.parts[0].local
            # Number by number: of whole rows, a GPU takes each, however narrow, in a block of its own, and it
            # knows them by an index that is expanded, not by a copy of that.
            return column.gather(0, local[:, None].expand(-1, column.shape[1]).contiguous())
        width, dtype = self._columns[name]
        found = torch.zeros(places.total, width, dtype=dtype, device=self.device)
        for page, here, local in places.parts:
            found[here] = self._pages[page][name][local]
        return found

    def write(self, name: str, places: Places, values: Tensor | float, before: Tensor | None = None) -> None:
        """Set the n rows located, all different, to [n, width] values, or all of them to one number.

        before: what they hold now [n, width], from whoever knows.
        """
        for page, here, local in places.parts:
            column = self._pages[page][name]
            if self._overwritten is not None:
                old = column[local] if before is None else _those(before, here)
                self._overwritten.append(_Overwritten([{name: column}], local, {name: old}))
            column[local] = _those(values, here) if isinstance(values, Tensor) else values

    @property
    def watched(self) -> bool:
        """Whether somebody who writes into `parts` has to say so to `remember` first."""
        return self._overwritten is not None

    def remember(self, rows: Tensor, old: dict[str, Tensor]) -> None:
        """Rows [n], all different, are about to be overwritten; what they hold now [n, width] by column."""
        if self._overwritten is not None:
            self._overwritten.append(_Overwritten(self.parts, rows, old))

    def watch(self) -> None:
        """From here on, remember what is overwritten."""
        self._overwritten = []

    def undo(self) -> None:
        """Write back what has been overwritten since `watch`."""
        for written in reversed(self._overwritten or []):
            written.put_back()
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


def _those(values: Tensor, here: Tensor | None) -> Tensor:
    return values if here is None else values[here]


class _Overwritten(NamedTuple):
    """What was in rows before they were written."""

    pages: list[dict[str, Tensor]]  # at that time
    rows: Tensor  # [n] counted through these pages
    old: dict[str, Tensor]  # [n, width] by column

    def put_back(self) -> None:
        first = 0
        for page in self.pages:
            length = len(next(iter(page.values())))
            here = ((self.rows >= first) & (self.rows < first + length)).nonzero()[:, 0]
            for name, old in self.old.items():
                page[name][self.rows[here] - first] = old[here]
            first += length


class Place(NamedTuple):
    """Rows that lie in one page."""

    page: int
    here: Tensor | None  # which of those that were asked for; None = all
    local: Tensor  # their numbers within the page


class Places(NamedTuple):
    """Rows of a table, found once."""

    total: int
    parts: list[Place]

    @property
    def in_one(self) -> bool:
        return len(self.parts) == 1 and self.parts[0].here is None
