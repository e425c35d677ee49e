"""Where the cameras of a stream are, as they come and as closed loops move them."""

from __future__ import annotations

import numpy as np

from stac_core.moves import Array, Moves
from stac_core.prediction import Prediction


class CameraPath:
    """The poses of N frames of one stream, which may have begun before."""

    def __init__(self) -> None:
        self._said: list[Array] = []  # [4, 4] each, as they were said
        self._submap: list[int] = []  # of each
        self._moves = Moves.none(0)  # of all submaps since

    def __len__(self) -> int:
        return len(self._said)

    def add(self, prediction: Prediction) -> None:
        """Frames on the host; whatever they have moved has moved from here on."""
        if prediction.moved is not None:
            self._moves = self._moves.then(prediction.moved)
        self._said += list(prediction.world_from_camera.double().numpy())
        self._submap += [prediction.submap] * prediction.frames

    def moves(self) -> Moves:
        """How each frame has moved since it was said: one for each of N."""
        submap = np.array(self._submap, np.int64)
        return self._moves.up_to(1 + max(self._submap, default=0))[submap]

    def world_from_camera(self) -> Array:
        """Poses [N, 4, 4] where they are now."""
        return self.moves().poses(np.arange(len(self)), np.reshape(self._said, (-1, 4, 4)))
