"""Losses, normalisation and matching targets, on cases whose answer is known beforehand."""

import math

import pytest
import torch
from scipy.spatial.transform import Rotation

from stac_core.geometry import encode_pose
from stac_core.training.losses import camera_loss, depth_loss, point_loss
from stac_core.training.matching import NOWHERE, Look, MatchingHeads, match_patches
from stac_core.training.motion import MotionHeads, patch_motions
from stac_core.training.sequences import Sequences, normalise

HEIGHT, WIDTH, FOCAL = 42, 56, 56.0


def wall(shifts: list[float], distance: float = 2.0) -> Sequences:
    """A camera that slides along x in front of a wall at right angles to its axis."""
    frames = len(shifts)
    pose = torch.eye(4).repeat(1, frames, 1, 1)
    pose[0, :, 0, 3] = torch.tensor(shifts)
    intrinsics = torch.tensor([[FOCAL, 0, WIDTH / 2], [0, FOCAL, HEIGHT / 2], [0, 0, 1]])
    return Sequences(
        torch.rand(1, frames, 3, HEIGHT, WIDTH),
        torch.full((1, frames, HEIGHT, WIDTH), distance),
        pose,
        intrinsics.repeat(1, frames, 1, 1),
    )


def test_depth_and_point_loss_vanish_at_truth():
    truth = torch.rand(1, 2, 8, 8) + 0.5
    points = torch.randn(1, 2, 8, 8, 3)
    valid = torch.rand(1, 2, 8, 8) > 0.3
    sure = torch.ones_like(truth)
    assert depth_loss(truth, sure, truth, valid).item() == 0
    assert point_loss(points, sure, points, truth, valid).item() == 0


def test_depth_loss_ignores_unknown_pixels_even_when_not_finite():
    truth = torch.rand(1, 1, 8, 8) + 0.5
    valid = torch.ones_like(truth, dtype=torch.bool)
    valid[..., 2:5, 3:6] = False
    wrong = truth.where(valid, 1e30).requires_grad_()
    loss = depth_loss(wrong, torch.ones_like(truth), truth.where(valid, 0.0), valid)
    loss.backward()
    assert loss.item() == 0
    assert torch.isfinite(wrong.grad).all()


def test_a_wrong_scale_does_not_hide_what_is_wrong_with_the_shape():
    truth = torch.ones(1, 2, 32, 32)
    valid = torch.ones_like(truth, dtype=torch.bool)
    bulge = torch.zeros_like(truth)
    bulge[0, 1, 8:16, 8:16] = 0.1
    wrong = (truth * 1.5 * bulge.exp()).requires_grad_()
    depth_loss(wrong, torch.ones_like(truth), truth, valid).backward()
    level, inner = wrong.grad[0, 1, 24, 24], wrong.grad[0, 1, 12, 12]  # away from the rim of the bulge
    assert 0 < level < 0.6 * inner


def test_confidence_pays_where_the_depth_is_right_and_costs_where_it_is_wrong():
    truth = torch.ones(1, 1, 8, 8)
    valid = torch.ones_like(truth, dtype=torch.bool)

    def loss(depth: float, confidence: float) -> float:
        full = torch.full_like(truth, confidence)
        return depth_loss(truth * depth, full, truth, valid).item()

    assert loss(1.01, 5.0) < loss(1.01, 1.0)
    assert loss(3.0, 5.0) > loss(3.0, 1.0)


def test_confidence_does_not_decide_which_depths_are_learned():
    truth = torch.rand(1, 2, 8, 8) + 0.5
    valid = torch.rand(1, 2, 8, 8) > 0.3

    def gradient(confidence: torch.Tensor) -> torch.Tensor:
        depth = (truth * 1.2).requires_grad_()
        depth_loss(depth, confidence, truth, valid).backward()
        return depth.grad

    assert torch.equal(gradient(torch.ones_like(truth)), gradient(1 + 9 * torch.rand_like(truth)))


def test_camera_loss_accepts_either_sign_of_the_quaternion():
    truth = torch.randn(2, 3, 9)
    opposite = truth.clone()
    opposite[..., 3:7] *= -1
    wrong = truth + 0.1
    assert camera_loss(torch.stack([truth, opposite]), truth).item() == 0
    earlier, later = (camera_loss(torch.stack(pair), truth) for pair in ((wrong, truth), (truth, wrong)))
    assert later > earlier > 0


def test_normalised_world_starts_at_camera_0_with_unit_distance():
    turn = torch.eye(4)
    turn[:3, :3] = torch.from_numpy(Rotation.from_rotvec([0.3, -0.8, 0.5]).as_matrix()).float()
    turn[:3, 3] = torch.tensor([4.0, -1.0, 2.0])
    scene = wall([0.0, 0.5, 1.0], distance=4.0)
    moved = Sequences(scene.images, scene.depth, turn @ scene.world_from_camera, scene.intrinsics)
    result = normalise(moved)
    assert torch.allclose(result.world_from_camera[0, 0], torch.eye(4), atol=1e-5)
    reference = normalise(scene)
    assert torch.allclose(result.world_from_camera, reference.world_from_camera, atol=1e-5)
    unit = (scene.depth[0, 0, 0, 0] / reference.depth[0, 0, 0, 0]).item()
    u = torch.arange(WIDTH).double() - WIDTH / 2
    v = (torch.arange(HEIGHT).double() - HEIGHT / 2)[:, None]
    expected = 4.0 * (1 + (u**2 + v**2) / FOCAL**2).sqrt().mean().item()
    assert unit == pytest.approx(expected, rel=1e-5)
    assert reference.world_from_camera[0, 2, 0, 3].item() == pytest.approx(1.0 / expected, rel=1e-5)


def test_normalising_survives_a_first_frame_that_sees_nothing():
    scene = wall([0.0, 0.5])
    scene.depth[:, 0] = 0
    result = normalise(scene)
    assert torch.isfinite(result.depth).all() and torch.isfinite(result.world_from_camera).all()
    assert 0.5 < result.depth[0, 1].mean() < 2


def test_matches_of_a_slide_are_a_shift_of_one_patch():
    """At distance 2 with focal length 56, 0.5 m to the right move the picture by 14 px: one patch."""
    matches = match_patches(wall([0.0, 0.5]), 14)
    expected = torch.tensor([[1, 2, 3, NOWHERE], [5, 6, 7, NOWHERE], [9, 10, 11, NOWHERE]])
    assert torch.equal(matches.patch[0, 0].view(3, 4), expected)
    assert torch.allclose(
        matches.shift[0, 0], (expected != NOWHERE).flatten()[:, None] * torch.tensor([1.0, 0.0]), atol=1e-4
    )


def test_matches_drop_what_frame_0_does_not_see():
    scene = wall([0.0, 0.5])
    scene.depth[0, 0, :, 28:42] = 1.0  # something stood there in front of the wall, and hid it
    scene.depth[0, 1, 0:14] = 0.0  # and frame 1 does not know the depth of its upper row
    patch = match_patches(scene, 14).patch[0, 0].view(3, 4)
    expected = torch.tensor([[NOWHERE] * 4, [5, NOWHERE, 7, NOWHERE], [9, NOWHERE, 11, NOWHERE]])
    assert torch.equal(patch, expected)


def test_matching_loss_falls_when_tokens_name_the_surface():
    """Tokens that carry the identity of the surface match perfectly, random ones do not."""
    torch.manual_seed(0)
    scene = wall([0.0, 0.5])
    matches = match_patches(scene, 14)
    heads = MatchingHeads(32, 32, 2)
    first = torch.randn(12, 32)
    second = torch.randn(12, 32)
    second = torch.where((matches.patch[0, 0] >= 0)[:, None], first[matches.patch[0, 0]], second)

    def figures(tokens):
        looking = torch.cat([torch.randn(1, 2, 5, 32), tokens], 2).flatten(1, 2)[:, None]  # 5 special tokens
        return heads(
            tokens,
            [tokens] * 2,
            [Look(looking, looking, torch.tensor([[True, False], [True, False]]))],
            matches,
        )[1]

    right = figures(torch.stack([first, second])[None])
    wrong = figures(torch.randn(1, 2, 12, 32))
    assert right["match"] == right["match_encoder"] == right["match_attention"] == 1
    assert wrong["match"] < 0.6
    assert math.isfinite(right["shift"])


def test_motions_of_a_slide_are_its_step_over_the_depth():
    """The camera slides right, so the surface lies further right in frame 0 than in its own frame."""
    motion, known = patch_motions(normalise(wall([0.0, 0.5, 1.0])), 14)
    assert known.all()
    expected = torch.tensor([0.25, 0.0, 0.0]), torch.tensor([0.5, 0.0, 0.0])
    for frame, target in enumerate(expected):
        assert torch.allclose(motion[0, frame], target.expand_as(motion[0, frame]), atol=1e-5)


def test_motion_loss_knows_a_standing_camera_at_once_and_learns_a_step():
    heads, specials = MotionHeads(8, layers=1), 2
    still, moved = (normalise(wall(shifts)) for shifts in ([0.0, 0.0], [0.0, 0.5]))
    tokens = [torch.randn(1, 2, specials + 12, 8)]
    losses = []
    for sequences in (still, moved):
        poses = encode_pose(sequences.world_from_camera, sequences.intrinsics, HEIGHT, WIDTH)
        poses[..., 7:] = 1.0  # the head starts with that field of view
        losses.append(heads(tokens, specials, patch_motions(sequences, 14), poses))
    assert losses[0][0].item() < 1e-6
    assert losses[1][0].item() > 0.1 and losses[1][1]["motion"].item() == pytest.approx(1.0)
