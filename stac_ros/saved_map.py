"""A map on disk, to look at and to go on with: what `~/save_map` writes, and `map.load` reads."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from stac_core.files import replacing

POINTS, POSES = "map.ply", "trajectory.tum"  # to look at
STREAM, MAP = "stream.safetensors", "map.safetensors"  # to go on with
_FORMAT = "stac_map 4"
_TOO_LARGE = 1e15  # for any value of a map, also for confidences summed over days


@dataclass(frozen=True)
class SavedMap:
    """The voxels and the grid of a map, and how the stream that made it lies in it."""

    positions: NDArray[np.float32]  # [N, 3] in the map
    colours: NDArray[np.float32]  # [N, 3] RGB, 0 to 255
    confidences: NDArray[np.float32]  # [N] summed over all that was seen of a voxel
    submaps: NDArray[np.int32]  # [N] of the stream, which saw each first; below 0 = of an earlier stream
    map_from_world: NDArray[np.float64]  # [4, 4], the stream's world in lengths of the map
    fixed_point: NDArray[np.float64]  # [3] of the map, which stays where it is under any scale of the stream
    factor: NDArray[np.float64]  # [] lengths of the map per length of the stream
    stretches: NDArray[np.float64]  # [M, 2] metres per length of the stream along odometry, and the submap
    level: NDArray[np.bool_]  # [] whether the map is as level as odometry is
    cell_size: NDArray[np.float64]  # [] metres, of the grid
    cell_places: NDArray[np.float64]  # [K, 2] of its known cells, in the map
    cell_evidence: NDArray[np.float32]  # [K] log-odds
    cell_submaps: NDArray[np.int32]  # [K] as of points

    def write(self, path: Path) -> None:
        """The file, whole or not at all. OSError where it cannot be written."""
        with replacing(path) as temporary:
            save_file(
                {k: np.asarray(v, order="C") for k, v in vars(self).items()}, temporary, {"format": _FORMAT}
            )

    @classmethod
    def read(cls, path: Path) -> SavedMap:
        """ValueError for a file that is missing, damaged or of another kind."""
        try:
            with safe_open(path, "numpy") as file:
                if (file.metadata() or {}).get("format") != _FORMAT:
                    raise ValueError(f"{path} is not a saved map of this version ({_FORMAT})")
                found = cls(**{name: file.get_tensor(name) for name in file.keys()})  # noqa: SIM118
        except FileNotFoundError:
            raise ValueError(f"there is no {path}: name a folder that ~/save_map wrote") from None
        except (SafetensorError, OSError, TypeError) as cause:
            raise ValueError(f"{path} is damaged ({cause}): save the map again") from cause
        found._check(path)
        return found

    def _check(self, path: Path) -> None:
        count, cells = len(self.positions), len(self.cell_places)
        shapes = {"positions": (count, 3), "colours": (count, 3), "confidences": (count,)}
        shapes |= {"submaps": (count,)}
        shapes |= {"map_from_world": (4, 4), "fixed_point": (3,), "level": ()}
        shapes |= {"factor": (), "stretches": (self.stretches.size // 2, 2)}
        shapes |= {"cell_places": (cells, 2), "cell_evidence": (cells,), "cell_submaps": (cells,)}
        shapes |= {"cell_size": ()}
        for name, shape in shapes.items():
            if getattr(self, name).shape != shape:
                has = list(getattr(self, name).shape)
                raise ValueError(f"{path} is damaged: {name} has shape {has}, expected {list(shape)}")
            if not (np.abs(getattr(self, name)) < _TOO_LARGE).all():  # false for NaN too
                raise ValueError(f"{path} is damaged: {name} holds what cannot be in a map")
        if not (np.append(self.stretches[:, 0], self.factor) > 0).all():
            raise ValueError(f"{path} is damaged: stretches and factor must be above 0")
