"""How parts of what has been seen move where a closed loop tells that they lie elsewhere."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]
Submaps = int | NDArray[np.integer[Any]]
_AT_ONCE = 10_000  # points, which take a matrix each meanwhile: few fit the caches of a CPU


@dataclass(frozen=True)
class Moves:
    """One similarity for each of n submaps: x → scale · rotation · x + translation, both in world.

    Whatever is moved says in which submap it was seen: one for all of it, or one each, [...].
    """

    rotation: Array  # [n, 3, 3]
    translation: Array  # [n, 3]
    scale: Array  # [n]

    @classmethod
    def none(cls, n: int) -> Moves:
        """Everything stays."""
        return cls(np.tile(np.eye(3), (n, 1, 1)), np.zeros((n, 3)), np.ones(n))

    @classmethod
    def composed(cls, moves: Iterable[Moves | None]) -> Moves:
        """All moves of one stream, in order, made one; None where nothing has moved.

        It is the same for all that a submap has seen: when a loop moves it, it has ended.
        """
        so_far = cls.none(0)
        for each in moves:
            if each is not None:
                so_far = so_far.then(each)
        return so_far

    def __len__(self) -> int:
        return len(self.scale)

    def __getitem__(self, submap: NDArray[np.integer[Any]]) -> Moves:
        """Those of some submaps."""
        return Moves(self.rotation[submap], self.translation[submap], self.scale[submap])

    def points(self, submap: Submaps, positions: NDArray[Any]) -> Array:
        """Where points [..., 3] come to lie."""
        if np.size(submap) > _AT_ONCE:
            parts = np.size(submap) // _AT_ONCE + 1
            split = zip(np.array_split(submap, parts), np.array_split(positions, parts), strict=True)
            return np.concatenate([self.points(*some) for some in split])
        turned = np.einsum("...ij,...j->...i", self.rotation[submap], positions)
        return self.scale[submap][..., None] * turned + self.translation[submap]

    def poses(self, submap: Submaps, world_from_camera: NDArray[Any]) -> Array:
        """Poses [..., 4, 4]; they stay rigid, only their centres are scaled."""
        moved = np.array(world_from_camera, np.float64)
        moved[..., :3, 3] = self.points(submap, moved[..., :3, 3])
        moved[..., :3, :3] = self.rotation[submap] @ moved[..., :3, :3]
        return moved

    def after(self, first: Moves) -> Moves:
        """Both, one after the other, of the submaps that `first` knows."""
        submap = np.arange(len(first))
        rotation = self.rotation[submap] @ first.rotation
        return Moves(rotation, self.points(submap, first.translation), self.scale[submap] * first.scale)

    def then(self, later: Moves) -> Moves:
        """Both, this one first; submaps that only the later one knows have not moved before."""
        return later.after(self.up_to(len(later)))

    def up_to(self, n: int) -> Moves:
        """The same of at least n submaps: those that are new stay."""
        new = Moves.none(max(0, n - len(self)))
        pairs = zip(vars(self).values(), vars(new).values(), strict=True)
        return Moves(*(np.concatenate(pair) for pair in pairs))

    def seen_from(self, rotation: Array, translation: Array, scale: float) -> Moves:
        """The same in another frame, where a point x of world is scale · rotation · x + translation."""
        turned = rotation @ self.rotation @ rotation.T
        start = scale * self.translation @ rotation.T + translation
        return Moves(turned, start - self.scale[:, None] * (turned @ translation), self.scale)
