"""Trajectory errors, judged by evo run as a command, and the pairing of stamps."""

import numpy as np
import pytest
from evaluation.evaluation_judges import evo
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.spatial.transform import Rotation

from stac_core.evaluation.alignment import Similarity, align_points
from stac_core.evaluation.trajectory import Trajectory, associate, pair_by_stamp, read_tum, write_tum
from stac_core.evaluation.trajectory_metrics import absolute_errors, pose_errors, relative_errors


def noisy_pair(seed: int, frames: int = 60) -> tuple[Trajectory, Trajectory]:
    """A loop, and the same loop in another world and unit, with noise."""
    random = np.random.default_rng(seed)
    turn = np.linspace(0, 2 * np.pi, frames)
    truth = np.tile(np.eye(4), (frames, 1, 1))
    truth[:, :3, :3] = Rotation.from_euler("y", -turn[:, None]).as_matrix()
    truth[:, :3, 3] = np.stack([3 * np.cos(turn), 0.3 * np.sin(3 * turn), 3 * np.sin(turn)], 1)
    world = Similarity(Rotation.random(None, random).as_matrix(), random.normal(size=3), 0.37)
    estimate = world.apply_poses(truth)
    estimate[:, :3, 3] += random.normal(size=(frames, 3)) * 0.01
    wobble = Rotation.from_rotvec(random.normal(size=(frames, 3)) * 0.02).as_matrix()
    estimate[:, :3, :3] = estimate[:, :3, :3] @ wobble
    stamps = 1_700_000_000_000_000_000 + np.arange(frames) * 33_333_333
    return Trajectory(stamps, estimate), Trajectory(stamps, truth)


@pytest.mark.parametrize(("align", "flags"), [("sim3", ["-as"]), ("se3", ["-a"]), ("none", [])])
def test_ate_equals_evo(tmp_path, align, flags):
    estimate, truth = noisy_pair(1)
    write_tum(tmp_path / "truth.tum", truth)
    write_tum(tmp_path / "estimate.tum", estimate)
    distance, angle = absolute_errors(estimate, truth, align)
    judged = evo("evo_ape", tmp_path, "-r", "trans_part", *flags)
    assert np.sqrt(np.mean(distance**2)) == pytest.approx(judged["rmse"], abs=1e-6)
    assert np.median(distance) == pytest.approx(judged["median"], abs=1e-6)
    assert distance.max() == pytest.approx(judged["max"], abs=1e-6)
    if align == "sim3":
        judged = evo("evo_ape", tmp_path, "-r", "angle_deg", *flags)
        assert np.sqrt(np.mean(angle**2)) == pytest.approx(judged["rmse"], abs=1e-6)


@pytest.mark.parametrize(("part", "column", "delta"), [("trans_part", 0, 1), ("angle_deg", 1, 7)])
def test_rpe_equals_evo(tmp_path, part, column, delta):
    estimate, truth = noisy_pair(2)
    write_tum(tmp_path / "truth.tum", truth)
    write_tum(tmp_path / "estimate.tum", estimate)
    errors = relative_errors(estimate, truth, delta, "sim3")[column]
    judged = evo("evo_rpe", tmp_path, "-as", "-r", part, "--delta", str(delta), "--all_pairs")
    assert np.sqrt(np.mean(errors**2)) == pytest.approx(judged["rmse"], abs=1e-6)


@settings(deadline=None, max_examples=30)
@given(st.integers(0, 10**6), st.floats(0.01, 100.0))
def test_alignment_recovers_any_similarity(seed, scale):
    random = np.random.default_rng(seed)
    source = random.normal(size=(20, 3))
    truth = Similarity(Rotation.random(None, random).as_matrix(), random.normal(size=3) * 5, scale)
    found = align_points(source, truth.apply(source), with_scale=True)
    assert found.scale == pytest.approx(scale, rel=1e-9)
    np.testing.assert_allclose(found.rotation, truth.rotation, atol=1e-9)
    np.testing.assert_allclose(found.apply(source), truth.apply(source), atol=1e-9 * (5 + scale))


def test_a_mirrored_cloud_still_gets_a_rotation():
    source = np.random.default_rng(0).normal(size=(30, 3))
    rotation = align_points(source, source * [1, 1, -1], with_scale=True).rotation
    assert np.linalg.det(rotation) == pytest.approx(1)


def test_a_straight_path_aligns_although_its_roll_is_free():
    line = np.linspace(0, 1, 9)[:, None] * [1.0, 2.0, 3.0]
    target = 2 * line[:, [2, 0, 1]] + 1
    np.testing.assert_allclose(align_points(line, target, with_scale=True).apply(line), target, atol=1e-12)


def test_paths_without_extent_or_partner_are_refused_with_the_cure():
    estimate, truth = noisy_pair(3)
    still = Trajectory(truth.stamps_ns, np.tile(np.eye(4), (len(truth), 1, 1)))
    with pytest.raises(ValueError, match="coincide"):
        pose_errors(still, truth)
    with pytest.raises(ValueError, match="coincide"):
        pose_errors(estimate, still)
    with pytest.raises(ValueError, match="pair them by stamp"):
        pose_errors(estimate.take(np.arange(5)), truth)
    later = Trajectory(truth.stamps_ns + 10**12, truth.world_from_camera)
    with pytest.raises(ValueError, match="different clocks"):
        pair_by_stamp(estimate, later)
    with pytest.raises(ValueError, match="choose one of sim3"):
        pose_errors(estimate, truth, align="affine")
    with pytest.raises(ValueError, match="delta = 60"):
        relative_errors(estimate, truth, delta=60)


def test_tum_text_keeps_every_nanosecond(tmp_path):
    estimate, _ = noisy_pair(4)
    stamps = estimate.stamps_ns + np.arange(len(estimate))
    write_tum(tmp_path / "path.tum", Trajectory(stamps, estimate.world_from_camera))
    again = read_tum(tmp_path / "path.tum")
    np.testing.assert_array_equal(again.stamps_ns, stamps)
    np.testing.assert_allclose(again.world_from_camera, estimate.world_from_camera, atol=1e-12)


@pytest.mark.parametrize("stamp", ["1403636579763555584", "1e400", "-1e30"])
def test_stamps_that_are_no_seconds_are_named(tmp_path, stamp):
    """Other tools write nanoseconds."""
    (tmp_path / "path.tum").write_text(f"{stamp} 0 0 0 0 0 0 1\n")
    with pytest.raises(ValueError, match=r"path\.tum:1: .* seconds"):
        read_tum(tmp_path / "path.tum")


def test_a_path_that_is_no_text_is_named(tmp_path):
    (tmp_path / "path.tum").write_bytes(b"\x89PNG\xff\xfe")
    with pytest.raises(ValueError, match=r"path\.tum: no text"):
        read_tum(tmp_path / "path.tum")


@pytest.mark.parametrize("line", ["1.0 2 3", "x 0 0 0 0 0 0 1", "1.0 0 0 0 0 0 0 0", "1.0 nan 0 0 0 0 0 1"])
def test_bad_tum_lines_are_named(tmp_path, line):
    (tmp_path / "bad.tum").write_text(f"# stamp tx\n{line}\n")
    with pytest.raises(ValueError, match=r"bad\.tum:2"):
        read_tum(tmp_path / "bad.tum")


def test_each_stamp_is_used_once_and_by_its_nearest_partner():
    first = np.array([0, 100, 104, 300])
    second = np.array([1, 50, 103, 200, 299, 400])
    ours, theirs = associate(first, second, max_difference_ns=10)
    assert list(zip(ours, theirs, strict=True)) == [(0, 0), (2, 2), (3, 4)]
    back, forth = associate(second, first, max_difference_ns=10)
    assert (list(back), list(forth)) == (list(theirs), list(ours))
    assert not len(associate(first, second[:0], 10)[0])


@settings(deadline=None)
@given(
    st.lists(st.integers(0, 1000), unique=True),
    st.lists(st.integers(0, 1000), unique=True),
    st.integers(0, 50),
)
def test_association_is_one_to_one_and_within_the_limit(first, second, limit):
    first, second = np.array(sorted(first), np.int64), np.array(sorted(second), np.int64)
    ours, theirs = associate(first, second, limit)
    assert len(set(ours)) == len(ours) == len(set(theirs)) == len(theirs)
    assert np.all(np.abs(first[ours] - second[theirs]) <= limit)
