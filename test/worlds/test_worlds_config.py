"""Impossible worlds are refused with the name, the value and what would work."""

from __future__ import annotations

import pytest
from worlds.worlds_views import sample_batch

from stac_core.worlds import World, WorldConfig


@pytest.mark.parametrize(
    ("setting", "value"),
    [
        ("rooms_x", 0),
        ("rooms_y", -3),
        ("objects_per_room", -1),
        ("fov_min", 0.0),
        ("fov_max", float("nan")),
        ("step_min", -0.1),
        ("step_max", float("inf")),
        ("stops", 1.5),
        ("defects", -1.0),
        ("kind", "cave"),
        ("path", "teleport"),
        ("motion", ""),
        ("rooms_x", 2.5),
        ("rooms_x", True),
    ],
)
def test_values_outside_their_limits(setting: str, value: object) -> None:
    with pytest.raises(ValueError, match=rf"WorldConfig\.{setting} = "):
        WorldConfig(**{setting: value})


def test_bounds_that_cross() -> None:
    with pytest.raises(ValueError, match=r"WorldConfig\.fov_max = 50\.0.*fov_min = 60\.0"):
        WorldConfig(fov_min=60.0, fov_max=50.0)
    with pytest.raises(ValueError, match=r"WorldConfig\.step_max = 0\.01.*step_min = 0\.02"):
        WorldConfig(step_min=0.02, step_max=0.01)


@pytest.mark.parametrize(
    ("height", "width", "message"),
    [
        (100, 112, r"height = 100.*14.*98"),
        (84, -112, r"width = -112.*14"),
        (0, 112, r"height = 0.*14"),
        (84.0, 112, r"height = 84\.0: expected int"),
    ],
)
def test_frame_sizes_that_are_not_patches(height: int, width: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        sample_batch(WorldConfig(), 1, 2, height, width, seed=0)
    with pytest.raises(ValueError, match=message):
        World(0, WorldConfig()).render(0, 1, height, width)


def test_stretches_without_a_frame() -> None:
    with pytest.raises(ValueError, match="last = 3"):
        World(0, WorldConfig()).render(3, 3, 84, 112)


def test_worlds_without_any_object_still_have_walls() -> None:
    batch = sample_batch(WorldConfig(objects_per_room=0, kind="room"), 2, 2, 56, 70, seed=0)
    assert (batch.depth > 0).all()
