"""A synthetic world as a sequence, rendered as it is asked for: `world:7` or `world:7,frames=300,...`."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any

import numpy as np

from stac_core.evaluation.datasets.sequence import FRAME_PERIOD_NS, Array, Frame

if TYPE_CHECKING:
    from stac_core.worlds import World

_PREFIX = "world:"
_SIZES = {"frames": 64, "height": 154, "width": 210}


def recognises(name: str) -> bool:
    return name.startswith(_PREFIX)


def read(name: str) -> WorldSequence:
    """`world:SEED[,name=value]`: frames, height, width, or a setting of the world's family.

    Raises ValueError naming what is not understood or not possible.
    """
    from stac_core.worlds import World, WorldConfig  # PyTorch takes seconds; other sources need none of it

    seed, *options = name.removeprefix(_PREFIX).split(",")
    sizes, settings = dict(_SIZES), dict[str, Any]()
    known = dataclasses.asdict(WorldConfig())
    try:
        number = int(seed)
        for option in options:
            key, _, value = option.partition("=")
            if key in sizes:
                sizes[key] = int(value)
            else:
                settings[key] = type(known[key])(value)
    except (ValueError, KeyError) as error:
        names = ", ".join([*sizes, *known])
        raise ValueError(
            f"{name!r}: expected world:SEED,name=value,... with names {names} ({error})"
        ) from error
    return WorldSequence(name, World(number, WorldConfig(**settings)), **sizes)


class WorldSequence:
    """One world seen for a number of frames; everything is true and nothing is stored."""

    max_depth_m = np.inf

    def __init__(self, name: str, world: World, frames: int, height: int, width: int) -> None:
        if frames < 1:
            raise ValueError(f"{name!r}: frames = {frames}: must be at least 1")
        self.name = name.replace(":", "_").replace(",", "_").replace("=", "")
        self._world, self._frames, self._size = world, frames, (height, width)

    def __len__(self) -> int:
        return self._frames

    def frame(self, index: int) -> Frame:
        batch = self._world.render(index, index + 1, *self._size)
        image = (batch.images[0, 0].permute(1, 2, 0) * 255).round().byte().numpy()
        return Frame(
            image,
            index * FRAME_PERIOD_NS,
            batch.world_from_camera[0, 0].double().numpy(),
            batch.depth[0, 0].float().numpy(),
            batch.intrinsics[0, 0].double().numpy(),
        )

    def cloud(self) -> Array | None:
        return None
