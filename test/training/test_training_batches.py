"""Augmented sequences stay true: depth, poses and lenses still explain the images."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy.spatial.transform import Rotation

from stac_core.geometry import decode_pose, encode_pose, unproject_depth
from stac_core.training import clips as clips_module
from stac_core.training.batches import (
    draw_frames,
    draw_stretches,
    draw_visible,
    fit,
    mirror,
    transpose,
    vary_colours,
)
from stac_core.training.camera_head import as_it_is_and_mirrored
from stac_core.training.clips import held_out_seed, open_clips, training_seed
from stac_core.training.clips import main as render_ahead
from stac_core.training.config import LARGEST_SEED, TrainingConfig
from stac_core.training.schedule import Shape
from stac_core.training.sequences import Sequences, join
from stac_core.worlds import World, WorldConfig, world_seeds


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


def rays(intrinsics: torch.Tensor, height: int, width: int) -> torch.Tensor:
    """x/z and y/z [B, S, 2, height, width] of what the centres of pixels see, which lie at integers."""
    v, u = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    pixels = torch.stack([u, v, torch.ones_like(u)]).double()
    return torch.einsum("bsij,jhw->bsihw", torch.linalg.inv(intrinsics.double()), pixels)[:, :, :2].float()


def painted_by_rays(height: int, width: int) -> Sequences:
    """Two sequences whose images tell, as colours, which ray each pixel sees; and so does the depth."""
    lenses = torch.tensor([[[90.0, 0, 0.5 * width], [0, 95, 0.5 * height], [0, 0, 1]]])
    lenses = torch.stack([lenses, lenses])
    seen = rays(lenses, height, width)
    images = torch.cat([0.5 + 0.3 * seen, torch.zeros_like(seen[:, :, :1])], 2)
    return Sequences(images, 5 + seen[:, :, 0], torch.eye(4).expand(2, 1, 4, 4), lenses)


def shown_rays(sequences: Sequences) -> torch.Tensor:
    return (sequences.images[:, :, :2] - 0.5) / 0.3


def test_a_mirrored_camera_sees_in_each_pixel_what_its_lens_says():
    mirrored = mirror(painted_by_rays(56, 71))
    expected = rays(mirrored.intrinsics, 56, 71) * torch.tensor([-1.0, 1.0])[:, None, None]
    assert torch.allclose(shown_rays(mirrored), expected, atol=1e-5)


def test_clips_of_the_camera_head_see_what_the_pose_encoding_says():
    """It tells the width of the view alone, and supposes the optical axis in the middle."""
    clip = painted_by_rays(56, 84)
    for seen, side in zip(as_it_is_and_mirrored(clip), (1.0, -1.0), strict=True):
        encoded = encode_pose(seen.world_from_camera, seen.intrinsics, 56, 84)
        told = rays(decode_pose(encoded, 56, 84)[1], 56, 84) * torch.tensor([side, 1.0])[:, None, None]
        off = (shown_rays(seen) - told)[..., 2:-2, 2:-2] * 90
        assert off.abs().max() < 0.1 and off.mean((-2, -1)).abs().max() < 0.01


@pytest.mark.parametrize(
    "shape", [Shape(2, 1, 56, 84), Shape(2, 1, 84, 56), Shape(2, 1, 112, 112), Shape(2, 1, 154, 196)]
)
def test_fitted_pixels_see_what_their_lens_says(shape):
    """However far cut, shrunk, enlarged, mirrored or laid on its side; single pixels differ by what a blend
    of few pixels is off its middle."""
    mirrored = 0
    for seed in range(12):
        fitted = fit(painted_by_rays(113, 140), shape, np.random.default_rng(seed))
        shown = shown_rays(fitted)
        nearest = (fitted.depth - 5 - shown[:, :, 0])[..., 3:-3, 3:-3]
        assert nearest.abs().max() < 0.6 / 90
        mirrored += int((shown[:, 0, 0, 0, 0] > 0).sum())
        on_its_side = shown[0, 0, 0, 0].std() < shown[0, 0, 0, :, 0].std()
        shown, expected = (
            shown.flip(2) if on_its_side else shown,
            rays(fitted.intrinsics, shape.height, shape.width),
        )
        turned = (shown * expected).mean((-2, -1), keepdim=True).sign()
        focal = fitted.intrinsics.diagonal(dim1=-2, dim2=-1)[:, :, :2, None, None]
        off = ((turned * shown - expected) * focal)[..., 3:-3, 3:-3]
        assert off.abs().max() < 0.1 and off.mean((-2, -1)).abs().max() < 0.01
    assert 6 < mirrored < 18


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


def test_varied_colours_stay_colours_and_differ_between_sequences_only(sequences):
    twice = join([sequences] * 8)
    varied = vary_colours(twice, np.random.default_rng(0))
    assert varied.images.min() >= 0 and varied.images.max() <= 1
    assert torch.equal(varied.depth, twice.depth)
    assert len({float(images.std()) for images in varied.images}) > 5
    equal_frames = replace(sequences, images=sequences.images[:, :1].expand(-1, 3, -1, -1, -1))
    frames = vary_colours(equal_frames, np.random.default_rng(1)).images[0]
    assert torch.equal(frames[0], frames[1])


def test_drawn_frames_lie_within_a_clip_and_within_reach():
    random, length = np.random.default_rng(0), 24
    steps = np.linspace(0, 1.0, length)  # departs evenly
    departures = np.tile(np.abs(steps[:, None] - steps), (100, 1, 1))
    for frames in (2, 3, 7):
        drawn, found = draw_frames(frames, departures, 0.5, random)
        assert found.sum() > 40
        numbers = drawn[found]
        assert numbers.shape[1] == frames and numbers.min() >= 0 and numbers.max() < length
        strides = np.diff(numbers, axis=1)
        assert (strides == strides[:, :1]).all()
        assert (departures[0][numbers[:, 0], numbers[:, -1]] <= 0.5).all()
        assert set(np.sign(strides[:, 0])) == {-1, 1}
        assert frames == 7 or len(set(np.abs(strides[:, 0]))) > 1
    assert not draw_frames(length, departures, 0.5, random)[1].any()


def test_sequences_are_cut_from_clips_that_are_near_enough():
    """Of clips that stand still, those that leap away are passed over."""

    class Leaping:
        def departures(self, clips: np.ndarray) -> np.ndarray:
            return np.where(clips % 4 == 0, 0.0, 9.0)[:, None, None] * np.ones((5, 5))

    chosen, frames = draw_stretches(
        Leaping(), range(10, 90), Shape(30, 3, 56, 56), 1.0, np.random.default_rng(0)
    )
    assert frames.shape == (30, 3) and chosen.min() >= 10 and chosen.max() < 90
    assert (chosen % 4 == 0).mean() > 0.6  # of 8 tries each: 0.9 expected, 0.25 by chance


@pytest.mark.parametrize("where", ["folder", "memory"])
def test_a_clip_departs_by_its_turn_and_its_way(tmp_path, where):
    clips = opened(tmp_path, where)
    clips.ready(1)
    clip = clips.read(np.array([0]), torch.arange(4)[None])
    departures = clips.departures(np.array([0]))[0]
    poses = clip.world_from_camera[0].double()
    turn = Rotation.from_matrix((poses[0, :3, :3].T @ poses[-1, :3, :3]).numpy()).magnitude()
    depth = clip.depth[0, 0][clip.depth[0, 0] > 0].double().mean()
    way = (poses[-1, :3, 3] - poses[0, :3, 3]).norm() / depth
    assert departures.shape == (4, 4)
    assert departures[0, -1] == pytest.approx(turn + float(way), rel=0.05)
    assert departures.diagonal() == pytest.approx(np.zeros(4), abs=1e-3)


def opened(folder: Path, where: str, **settings):
    sizes = {"first_width": 56, "last_width": 56, "clip_width": 56, "first_frames": 2, "last_frames": 2}
    return open_clips(
        TrainingConfig(out=str(folder), clips=where, clip_frames=4, **sizes, **settings), torch.device("cpu")
    )


def test_clips_in_memory_are_those_of_a_folder(tmp_path):
    chosen, frames = np.array([3, 0, 3]), torch.tensor([[0, 1], [2, 1], [3, 2]])
    folder, memory = (opened(tmp_path, where) for where in ("folder", "memory"))
    assert memory.ready(4).stop >= 4 and folder.ready(4) == range(4)
    a, b = folder.read(chosen, frames), memory.read(chosen, frames)
    assert a.images.shape == (3, 2, 3, 42, 56)
    assert (a.images - b.images).abs().mean() < 1e-3  # other rounding in passes of other sizes
    assert torch.allclose(a.depth, b.depth, rtol=1e-2) and torch.equal(
        a.world_from_camera, b.world_from_camera
    )
    assert np.allclose(folder.departures(chosen), memory.departures(chosen), atol=1e-2)


@pytest.fixture
def blocks_of_four(monkeypatch):
    """What is rendered at once is a matter of speed alone."""
    monkeypatch.setattr(clips_module, "BLOCK", 4)


@pytest.mark.usefixtures("blocks_of_four")
def test_memory_keeps_the_newest_clips_and_fills_again_after_a_resumption(tmp_path):
    running, resumed = (opened(tmp_path, "memory", kept_clips=5) for _ in range(2))
    assert running.ready(3) == range(4)
    assert running.ready(9) == resumed.ready(9) == range(4, 12)  # whole blocks
    chosen, frames = np.array([4, 7, 11]), torch.tensor([[0, 1], [1, 2], [3, 1]])
    a, b = running.read(chosen, frames), resumed.read(chosen, frames)
    assert torch.equal(a.images, b.images) and torch.equal(a.depth, b.depth)


@pytest.mark.usefixtures("blocks_of_four")
def test_clips_of_helpers_come_into_use_and_leave_the_folder(tmp_path):
    sizes = ["--clip-frames", "4", "--clip-width", "56"]
    memory = opened(tmp_path, "memory")
    assert memory.ready(1) == range(4)
    assert render_ahead(["--folder", str(tmp_path / "clips"), "--first", "500", "--count", "3", *sizes]) == 0
    assert memory.ready(1) == range(4)  # no whole block yet
    assert render_ahead(["--folder", str(tmp_path / "clips"), "--first", "503", "--count", "2", *sizes]) == 0
    assert memory.ready(1) == range(8)
    assert [path.name for path in (tmp_path / "clips").iterdir()] == ["0-4x56-0000504.safetensors"]
    helped = memory.read(np.array([4, 7]), torch.tensor([[0, 1], [3, 2]]))
    rendered = opened(tmp_path, "folder").read(np.array([500, 503]), torch.tensor([[0, 1], [3, 2]]))
    assert torch.equal(helped.images, rendered.images) and torch.equal(helped.depth, rendered.depth)
    assert memory.ready(9) == range(12)  # what the run asks for is still its own to render
    own = memory.read(np.array([8]), torch.tensor([[0, 1]]))
    again = opened(tmp_path, "folder").read(np.array([8]), torch.tensor([[0, 1]]))
    assert torch.equal(own.world_from_camera, again.world_from_camera)


def test_every_view_of_the_past_holds_the_frame_itself_and_frame_0():
    random = np.random.default_rng(0)
    views = [draw_visible(6, random) for _ in range(100)]
    for visible in views:
        assert visible.dtype == torch.bool and visible.diagonal().all() and visible[:, 0].all()
    assert len({tuple(v.flatten().tolist()) for v in views}) > 10


def test_no_two_runs_share_a_world():
    seeds = (0, 1, 2, 41, 2**30, LARGEST_SEED)
    worlds = [int(world_seeds(training_seed(seed, i), 1)) for seed in seeds for i in (0, 1, 2**32 - 1)]
    assert len(set(worlds)) == len(worlds)
    assert training_seed(LARGEST_SEED + 1, 0) % 2**64 == training_seed(0, 0)  # hence the limit


def test_no_world_is_both_trained_on_and_held_out():
    trained = {training_seed(run, index) for run in range(3) for index in range(2000)}
    assert len(trained) == 6000
    assert trained.isdisjoint(held_out_seed(index) for index in range(10_000))
