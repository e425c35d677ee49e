"""Camera tokens of past frames, from which all their poses can be read again at once.

Poses that were given out stay as they are; reading again is an explicit call (`StreamSession.repose`).
The original reads all poses again with every chunk, at a cost that grows with the stream.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from stac_core.cache.pages import Pages
from stac_core.cache.saved_state import State


class Cameras(NamedTuple):
    """What a pass leaves of its n frames."""

    tokens: Tensor  # [n, 2C]
    world_from_camera: Tensor  # [n, 4, 4]


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

    @property
    def tokens(self) -> Tensor:
        """[n, 2C], in the order of `frames`; ValueError where there are none."""
        return self._read("token")

    @property
    def poses(self) -> Tensor:
        """world_from_camera [n, 4, 4] as believed so far."""
        return self._read("pose").unflatten(1, (4, 4))

    @poses.setter
    def poses(self, world_from_camera: Tensor) -> None:
        if self._pages is not None:
            self._pages.write(
                "pose", self._pages.locate(self._rows(self.frames)), world_from_camera.flatten(1)
            )

    def add(self, cameras: Cameras) -> None:
        """Those of the next frames."""
        frames = torch.arange(self._frames, self._frames + len(cameras.tokens))
        pages = self._open(cameras.tokens)
        self._frames += len(frames)
        kept = torch.isin(frames, self.frames)
        rows, here = pages.locate(self._rows(frames[kept])), kept.to(pages.device)
        pages.write("token", rows, cameras.tokens[here])
        pages.write("pose", rows, cameras.world_from_camera[here].flatten(1))

    def state(self) -> State:
        if self._pages is None:
            return {}
        return {"frames": torch.tensor(self._frames), "token": self.tokens, "pose": self.poses}

    def restore(self, state: State) -> None:
        if state:
            pages = self._open(state["token"])
            self._frames = int(state["frames"])
            pages.write("token", pages.locate(self._rows(self.frames)), state["token"])
            self.poses = state["pose"]

    def _open(self, like: Tensor) -> Pages:
        """The table, made with the first tokens."""
        if self._pages is None:
            columns = {"token": (like.shape[-1], like.dtype), "pose": (16, torch.float32)}
            self._pages = Pages(columns, like.device)
            self._pages.grow(self._most)
        return self._pages

    def _read(self, name: str) -> Tensor:
        if self._pages is None:
            raise ValueError("no camera tokens are kept; set cache.repose_frames, and step at least once")
        return self._pages.read(name, self._pages.locate(self._rows(self.frames)))

    def _rows(self, frames: Tensor) -> Tensor:
        """Frame 0 has the first row, the others take turns."""
        rows = torch.where(frames > 0, 1 + (frames - 1) % max(1, self._most - 1), 0)
        return rows if self._pages is None else rows.to(self._pages.device)
