"""A run with impossible settings is refused, with the name and the value."""

import numpy as np
import pytest

from stac_core.training.config import TrainingConfig
from stac_core.training.schedule import draw_shape, learning_rate


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("first_width", 100),
        ("last_width", -168),
        ("first_frames", 1),
        ("last_frames", 3),
        ("last_reach", 0.1),
        ("steps", 0),
        ("seed", -1),
        ("learning_rate", float("nan")),
        ("warmup_steps", 10**6),
        ("network", "resnet"),
        ("precision", "int8"),
        ("patches_per_step", 2.5),
    ],
)
def test_impossible_settings_are_refused_by_name_and_value(name, value):
    with pytest.raises(ValueError, match=rf"{name} = {value!r}"):
        TrainingConfig(**{name: value})


def test_learning_rate_warms_up_and_decays():
    config = TrainingConfig(steps=1000, warmup_steps=100, learning_rate=1e-3)
    rates = [learning_rate(config, step, step / 1000) for step in range(1000)]
    assert max(rates) == pytest.approx(1e-3)
    assert rates.index(max(rates)) in (99, 100)
    assert rates[0] < 1e-4 and rates[-1] < 2e-5
    assert rates[:100] == sorted(rates[:100]) and rates[100:] == sorted(rates[100:], reverse=True)


def test_shapes_grow_and_keep_to_whole_patches_and_cost():
    config = TrainingConfig(steps=1000, growth=0.5)
    random = np.random.default_rng(0)
    early = [draw_shape(config, 0.0, random) for _ in range(300)]
    late = [draw_shape(config, 0.9, random) for _ in range(300)]
    for shape in early + late:
        assert shape.height % 14 == 0 and shape.width % 14 == 0
        patches = shape.height * shape.width / 14**2
        assert shape.sequences * shape.frames * patches <= 1.5 * config.patches_per_step
    assert {s.width for s in early} == {config.first_width}
    assert {s.frames for s in early} == {2, 3, 4}
    assert max(s.width for s in late) == config.last_width
    assert {2, 3, 4, 6, 12} <= {s.frames for s in late} <= set(range(2, config.last_frames + 1))
    assert min(s.height / s.width for s in late) < 0.65 and max(s.height / s.width for s in late) == 1
    together = {(s.height, s.width): set() for s in late}
    for shape in late:
        together[shape.height, shape.width].add(shape.sequences * shape.frames)
    assert len(together) < 10 and all(len(frames) == 1 for frames in together.values())
