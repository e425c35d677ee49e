"""Camera tokens of past frames, from which all their poses can be read again at once.

Poses that were given out stay as they are; reading again is an explicit call (`StreamSession.repose`).
The original reads all poses again with every chunk, at a cost that grows with the stream.
"""

from __future__ import annotations

import torch
from torch import Tensor

from stac_core.cache.pages import Pages
from stac_core.cache.saved_state import State


class CameraTokens:
    """The first frame, which carries the coordinate frame, and the newest ones; most frames in all."""

    def __init__(self, most: int) -> None:
        self._most = most
        self._frames = 0  # of the stream so far
        self._pages: Pages | None = None

    @property
    def bytes(self) -> int:
        """Allocated."""
        return self._pages.bytes if self._pages else 0

    @property
    def frames(self) -> Tensor:
        """Numbers of the frames that are kept, ascending [n]."""
        newest = torch.arange(max(1, self._frames - self._most + 1), max(1, self._frames))
        return torch.cat([torch.zeros(min(self._frames, 1), dtype=torch.int64), newest])

    def add(self, tokens: Tensor) -> None:
        """Those of the next frames [n, 2C]."""
        frames = torch.arange(self._frames, self._frames + len(tokens))
        if self._pages is None:
            self._pages = Pages({"token": (tokens.shape[-1], tokens.dtype)}, tokens.device)
            self._pages.grow(self._most)
        self._frames += len(tokens)
        kept = torch.isin(frames, self.frames)
        self._pages.write("token", self._rows(frames[kept]), tokens[kept.to(tokens.device)])

    def read(self) -> Tensor:
        """[n, 2C], in the order of `frames`."""
        if self._pages is None:
            raise ValueError("no camera tokens are kept; set cache.repose_frames, and step at least once")
        return self._pages.read("token", self._rows(self.frames))

    def state(self) -> State:
        return {"frames": torch.tensor(self._frames), "token": self.read()} if self._pages else {}

    def restore(self, state: State) -> None:
        if state:
            tokens = state["token"]
            self._pages = Pages({"token": (tokens.shape[-1], tokens.dtype)}, tokens.device)
            self._pages.grow(self._most)
            self._frames = int(state["frames"])
            self._pages.write("token", self._rows(self.frames), tokens)

    def _rows(self, frames: Tensor) -> Tensor:
        """Frame 0 has the first row, the others take turns."""
        rows = torch.where(frames > 0, 1 + (frames - 1) % max(1, self._most - 1), 0)
        return rows if self._pages is None else rows.to(self._pages.device)
