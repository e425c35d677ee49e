"""Augmented sequences stay true: depth, poses and lenses still explain the images."""

import numpy as np
import pytest
import torch
from scipy.spatial.transform import Rotation

from stac_core.geometry import unproject_depth
from stac_core.training.batches import (
    draw_frames,
    draw_sequences,
    draw_visible,
    fit,
    mirror,
    step_random,
    transpose,
)
from stac_core.training.clips import Clips, held_out_seed, training_seed
from stac_core.training.config import CLIP_FRAMES, TrainingConfig
from stac_core.training.schedule import Shape
from stac_core.training.sequences import Sequences
from stac_core.worlds import World, WorldConfig


@pytest.fixture(scope="module")
def sequences() -> Sequences:
    """Two views of a furnished room by a perfect camera."""
    config = WorldConfig(kind="room", motion="sideways", path="loop", defects=0.0)
    world = World(2, config).render(0, 3, 112, 140)
    return Sequences(world.images, world.depth, world.world_from_camera, world.intrinsics)


def disagreement(sequences: Sequences) -> tuple[float, float]:
    """Median relative depth error and mean colour error of frame 2 seen through frame 0."""
    points = unproject_depth(sequences.depth, sequences.intrinsics, sequences.world_from_camera)[0, 2]
    camera0 = torch.linalg.inv(sequences.world_from_camera[0, 0])
    in_camera = points @ camera0[:3, :3].T + camera0[:3, 3]
    projected = in_camera @ sequences.intrinsics[0, 0].T
    pixel = (projected[..., :2] / projected[..., 2:]).round().long()
    height, width = sequences.depth.shape[-2:]
    inside = (
        (pixel >= 0).all(-1) & (pixel[..., 0] < width) & (pixel[..., 1] < height) & (in_camera[..., 2] > 0)
    )
    assert inside.float().mean() > 0.3
    u, v = pixel[inside].T
    seen = sequences.depth[0, 0, v, u]
    error = ((seen - in_camera[inside][:, 2]).abs() / seen).median().item()
    colour = (sequences.images[0, 0][:, v, u] - sequences.images[0, 2][:, inside]).abs().median().item()
    return error, colour


def test_the_measure_notices_a_wrong_pose(sequences):
    right = disagreement(sequences)
    assert right[0] < 0.02 and right[1] < 0.05
    poses = sequences.world_from_camera.clone()
    poses[0, 2, :3, 3] *= 1.5
    wrong = Sequences(sequences.images, sequences.depth, poses, sequences.intrinsics)
    assert disagreement(wrong)[0] > 2 * right[0]


@pytest.mark.parametrize("change", [mirror, transpose, lambda s: transpose(mirror(s))])
def test_mirrored_and_transposed_sequences_are_worlds_too(sequences, change):
    error, colour = disagreement(change(sequences))
    assert error < 0.02 and colour < 0.05
    rotation = change(sequences).world_from_camera[0, :, :3, :3]
    assert torch.allclose(torch.linalg.det(rotation), torch.ones(3), atol=1e-4)


@pytest.mark.parametrize("shape", [Shape(1, 3, 84, 112), Shape(1, 3, 56, 98), Shape(1, 3, 112, 112)])
def test_fitted_sequences_have_the_shape_and_stay_true(sequences, shape):
    for seed in range(4):
        fitted = fit(sequences, shape, np.random.default_rng(seed))
        assert fitted.images.shape == (1, 3, 3, shape.height, shape.width)
        assert fitted.depth.shape == (1, 3, shape.height, shape.width)
        centre = fitted.intrinsics[0, 0, :2, 2]
        assert torch.allclose(centre, torch.tensor([shape.width / 2, shape.height / 2]))
        error, colour = disagreement(fitted)
        assert error < 0.03 and colour < 0.08


def test_drawn_frames_lie_within_a_clip_and_within_reach():
    random = np.random.default_rng(0)
    steps = np.linspace(0, 1.0, CLIP_FRAMES)  # departs evenly
    departures = np.abs(steps[:, None] - steps)
    drawn = {
        frames: [draw_frames(frames, departures, 0.5, random) for _ in range(100)] for frames in (2, 3, 7)
    }
    for frames, sequences in drawn.items():
        found = [numbers for numbers in sequences if numbers is not None]
        assert len(found) > 40
        for numbers in found:
            assert len(numbers) == frames and numbers.min() >= 0 and numbers.max() < CLIP_FRAMES
            assert (numbers.diff() == numbers.diff()[0]).all()
            assert departures[numbers[0], numbers[-1]] <= 0.5
        assert {numbers.diff()[0].sign().item() for numbers in found} == {-1, 1}
    assert draw_frames(CLIP_FRAMES, departures, 0.5, random) is None


def test_a_clip_departs_by_its_turn_and_its_way(tmp_path):
    clips = Clips(tmp_path, run_seed=3)
    clip = clips.read(0, torch.arange(CLIP_FRAMES))
    departures = clips.departures(0)
    poses = clip.world_from_camera[0].double()
    turn = Rotation.from_matrix((poses[0, :3, :3].T @ poses[-1, :3, :3]).numpy()).magnitude()
    depth = clip.depth[0, 0][clip.depth[0, 0] > 0].double().mean()
    way = (poses[-1, :3, 3] - poses[0, :3, 3]).norm() / depth
    assert departures.shape == (CLIP_FRAMES, CLIP_FRAMES)
    assert departures[0, -1] == pytest.approx(turn + float(way), rel=0.05)
    assert departures.diagonal() == pytest.approx(np.zeros(CLIP_FRAMES), abs=1e-3)


def test_every_view_of_the_past_holds_the_frame_itself_and_frame_0():
    random = np.random.default_rng(0)
    views = [draw_visible(6, random) for _ in range(100)]
    for visible in views:
        assert visible.dtype == torch.bool and visible.diagonal().all() and visible[:, 0].all()
    assert len({tuple(v.flatten().tolist()) for v in views}) > 10


def test_live_worlds_are_new_in_every_step_and_the_same_again_for_one_step():
    config = TrainingConfig(worlds="live", patches_per_step=64, first_width=56, first_frames=2)

    def images(step: int) -> torch.Tensor:
        drawn = draw_sequences(config, step, step_random(config, step, 0), torch.device("cpu"))
        assert drawn.depth.shape[1] == 2 and drawn.images.shape[-1] == 56
        return drawn.images[:1, :, :, :42]

    first = images(0)
    assert torch.equal(first, images(0))
    assert not torch.equal(first, images(1))


def test_no_world_is_both_trained_on_and_held_out():
    trained = {training_seed(run, index) for run in range(3) for index in range(2000)}
    assert len(trained) == 6000
    assert trained.isdisjoint(held_out_seed(index) for index in range(10_000))
