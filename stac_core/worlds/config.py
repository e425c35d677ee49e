"""What a synthetic world may contain, how the camera moves in it and what it sees."""

from __future__ import annotations

from dataclasses import dataclass

from stac_core.config import PATCH_SIZE
from stac_core.settings import check_settings, refuse, setting


@dataclass(frozen=True)
class WorldConfig:
    """The family a world is drawn from; the seed picks the member.

    Raises:
        ValueError: a value outside its limits, named with the nearest value that works.
    """

    kind: str = setting(
        "mixed",
        "room = one room; rooms = the whole grid of rooms; outdoor = open ground under a sky; "
        "mixed = drawn per world",
        choices=("mixed", "room", "rooms", "outdoor"),
    )
    path: str = setting(
        "loop",
        "loop = laps that return to their start; explore = always new ground, stops at its end",
        choices=("loop", "explore"),
    )
    motion: str = setting(
        "mixed",
        "where the camera looks: forward, sideways, orbit (at the middle of the room), "
        "drift (fixed heading), spin (turning on the spot); mixed = drawn per world",
        choices=("mixed", "forward", "sideways", "orbit", "drift", "spin"),
    )
    rooms_x: int = setting(2, "most rooms along x", minimum=1, maximum=64)
    rooms_y: int = setting(2, "most rooms along y", minimum=1, maximum=64)
    objects_per_room: int = setting(
        10, "boxes, cylinders and spheres per room of the grid", minimum=0, maximum=64
    )
    fov_min: float = setting(
        45.0, "narrowest field of view of the longer side", minimum=10, maximum=150, unit="deg"
    )
    fov_max: float = setting(
        100.0, "widest field of view of the longer side", minimum=10, maximum=150, unit="deg"
    )
    step_min: float = setting(
        0.005, "shortest step between frames, as a share of the scene's depth", minimum=1e-4, maximum=0.5
    )
    step_max: float = setting(
        0.2, "longest step between frames, as a share of the scene's depth", minimum=1e-4, maximum=0.5
    )
    stops: float = setting(0.3, "share of worlds whose camera stops now and then", minimum=0, maximum=1)
    defects: float = setting(
        1.0, "strength of the camera's defects; 0 = a perfect camera", minimum=0, maximum=2
    )

    def __post_init__(self) -> None:
        check_settings(self)
        if self.fov_max < self.fov_min:
            raise refuse(self, "fov_max", f"narrower than fov_min = {self.fov_min}", self.fov_min)
        if self.step_max < self.step_min:
            raise refuse(self, "step_max", f"shorter than step_min = {self.step_min}", self.step_min)


def check_frame_size(height: int, width: int) -> None:
    """Raise ValueError unless both sides are positive multiples of the patch size."""
    for name, value in (("height", height), ("width", width)):
        if isinstance(value, bool) or not isinstance(value, int):
            raise ValueError(f"{name} = {value!r}: expected int, got {type(value).__name__}")
        if value < PATCH_SIZE or value % PATCH_SIZE:
            nearest = max(PATCH_SIZE, round(value / PATCH_SIZE) * PATCH_SIZE)
            rule = f"must be a positive multiple of {PATCH_SIZE}"
            raise ValueError(f"{name} = {value}: {rule}; nearest value that works: {nearest}")


def check_count(name: str, value: int, minimum: int) -> None:
    """Raise ValueError unless `value` is an integer of at least `minimum`."""
    if isinstance(value, bool) or not isinstance(value, int):
        raise ValueError(f"{name} = {value!r}: expected int, got {type(value).__name__}")
    if value < minimum:
        raise ValueError(f"{name} = {value}: below the minimum; nearest value that works: {minimum}")
