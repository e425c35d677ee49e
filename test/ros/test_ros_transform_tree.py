"""The tree of frames against plain matrix algebra and scipy's interpolation."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.spatial.transform import Rotation, Slerp

from stac_ros.odometry import NoOdometry, OdometryLink
from stac_ros.quaternions import (
    interpolate_quaternions,
    quaternion_from_rotation,
    rotation_from_quaternion,
)
from stac_ros.settings import FrameSettings
from stac_ros.transform_tree import Sample, TransformError, TransformTree

SECOND = 1_000_000_000


def random_pose(rng: np.random.Generator) -> np.ndarray:
    pose = np.eye(4)
    pose[:3, :3] = Rotation.random(None, rng).as_matrix()
    pose[:3, 3] = rng.normal(size=3)
    return pose


def add(tree: TransformTree, parent: str, child: str, pose: np.ndarray, stamp: int, static=False) -> None:
    quaternion = Rotation.from_matrix(pose[:3, :3]).as_quat()
    tree.add(child, stamp, Sample(parent, pose[:3, 3].copy(), quaternion), static)


def test_quaternions_agree_with_scipy():
    rng = np.random.default_rng(0)
    for _ in range(50):
        first, second = Rotation.random(2, rng)
        assert np.allclose(rotation_from_quaternion(3.0 * first.as_quat()), first.as_matrix())
        assert np.allclose(quaternion_from_rotation(first.as_matrix()), first.as_quat(canonical=True))
        fraction = rng.uniform()
        mixed = interpolate_quaternions(first.as_quat(), -second.as_quat(), fraction)
        expected = Slerp([0, 1], Rotation.concatenate([first, second]))(fraction)
        assert np.allclose(Rotation.from_quat(mixed).as_matrix(), expected.as_matrix())


def test_equal_quaternions_interpolate_to_themselves():
    half_turn = np.array([0.0, 0.0, 1.0, 0.0])
    assert np.allclose(interpolate_quaternions(half_turn, half_turn, 0.3), half_turn)


@pytest.mark.parametrize("broken", [(0, 0, 0, 0), (np.nan, 0, 0, 1)])
def test_a_quaternion_without_direction_is_refused(broken):
    with pytest.raises(ValueError, match="no rotation"):
        rotation_from_quaternion(np.array(broken, dtype=float))


def test_lookup_composes_up_and_down_the_tree():
    rng = np.random.default_rng(1)
    map_from_odom, odom_from_base, base_from_camera, base_from_laser = (random_pose(rng) for _ in range(4))
    tree = TransformTree()
    add(tree, "map", "odom", map_from_odom, 5 * SECOND)
    add(tree, "odom", "base", odom_from_base, 5 * SECOND)
    add(tree, "base", "camera", base_from_camera, 0, static=True)
    add(tree, "base", "laser", base_from_laser, 0, static=True)
    map_from_camera = map_from_odom @ odom_from_base @ base_from_camera
    assert np.allclose(tree.lookup("map", "camera", 5 * SECOND), map_from_camera)
    assert np.allclose(tree.lookup("camera", "map"), np.linalg.inv(map_from_camera))
    laser_from_camera = np.linalg.inv(base_from_laser) @ base_from_camera
    assert np.allclose(tree.lookup("laser", "camera", 77 * SECOND), laser_from_camera)
    assert np.allclose(tree.lookup("base", "base", 5 * SECOND), np.eye(4))


def test_lookup_interpolates_between_stamps():
    rng = np.random.default_rng(2)
    first, second = random_pose(rng), random_pose(rng)
    tree = TransformTree()
    add(tree, "odom", "base", second, 3 * SECOND)
    add(tree, "odom", "base", first, 2 * SECOND)  # late, out of order
    found = tree.lookup("odom", "base", int(2.25 * SECOND))
    rotations = Rotation.from_matrix([first[:3, :3], second[:3, :3]])
    assert np.allclose(found[:3, 3], 0.75 * first[:3, 3] + 0.25 * second[:3, 3])
    assert np.allclose(found[:3, :3], Slerp([0, 1], rotations)(0.25).as_matrix())
    assert np.allclose(tree.lookup("odom", "base", 2 * SECOND), first)


def test_stamp_zero_asks_for_the_newest_time_known_of_every_link():
    rng = np.random.default_rng(3)
    older, newer, link = random_pose(rng), random_pose(rng), random_pose(rng)
    tree = TransformTree()
    add(tree, "map", "odom", older, 2 * SECOND)
    add(tree, "map", "odom", newer, 4 * SECOND)
    add(tree, "odom", "base", link, 2 * SECOND)
    assert np.allclose(tree.lookup("map", "base"), older @ link)
    assert np.allclose(tree.lookup("map", "odom"), newer)


def test_links_above_the_common_ancestor_need_not_be_known_at_that_time():
    rng = np.random.default_rng(4)
    link = random_pose(rng)
    tree = TransformTree()
    add(tree, "map", "odom", random_pose(rng), 1 * SECOND)
    add(tree, "odom", "base", link, 9 * SECOND)
    assert np.allclose(tree.lookup("odom", "base", 9 * SECOND), link)


def test_errors_name_the_frames_and_the_reason():
    tree = TransformTree()
    with pytest.raises(TransformError, match="'map' is unknown; frames received so far: none"):
        tree.lookup("map", "base")
    add(tree, "odom", "base", np.eye(4), 2 * SECOND)
    add(tree, "earth", "moon", np.eye(4), 2 * SECOND)
    with pytest.raises(TransformError, match="'camera' is unknown; frames received so far: base, earth"):
        tree.lookup("base", "camera")
    with pytest.raises(TransformError, match=r"two separate trees, with roots 'odom' and 'earth'"):
        tree.lookup("base", "moon")
    with pytest.raises(TransformError, match=r"'base' at 3.000 s would be extrapolated.*2.000 s to 2.000 s"):
        tree.lookup("odom", "base", 3 * SECOND)
    add(tree, "base", "odom", np.eye(4), 2 * SECOND)
    with pytest.raises(TransformError, match="circle"):
        tree.lookup("odom", "base")


def test_old_samples_leave_and_a_jump_back_starts_anew():
    tree = TransformTree(seconds=1.0)
    for stamp in (100, 100.5, 101.2):
        add(tree, "odom", "base", np.eye(4), int(stamp * SECOND))
    with pytest.raises(TransformError, match=r"known from 100.500 s to 101.200 s"):
        tree.lookup("odom", "base", 100 * SECOND)
    add(tree, "odom", "base", np.eye(4), 50 * SECOND)
    with pytest.raises(TransformError, match=r"known from 50.000 s to 50.000 s"):
        tree.lookup("odom", "base", 101 * SECOND)


def test_a_frame_that_changes_its_parent_follows_the_new_one():
    tree = TransformTree()
    add(tree, "odom", "base", np.eye(4), 1 * SECOND)
    add(tree, "dock", "base", np.eye(4), 2 * SECOND)
    with pytest.raises(TransformError, match="'odom' is unknown"):
        tree.lookup("odom", "base")
    assert np.allclose(tree.lookup("dock", "base"), np.eye(4))


class LikeTf2(TransformTree):
    """Refuses what is older than its memory, as the buffer of tf2 does with TF_OLD_DATA."""

    newest = 0

    def add(self, child: str, stamp_ns: int, sample: Sample, static: bool = False) -> None:
        if stamp_ns >= self.newest - 10 * SECOND:
            self.newest = max(self.newest, stamp_ns)
            super().add(child, stamp_ns, sample, static)

    def clear(self) -> None:
        self.newest = 0
        super().clear()


@pytest.mark.parametrize(("tree", "missed"), [(TransformTree(), []), (LikeTf2(), [100])])
def test_odometry_is_found_again_when_a_recording_begins_again(tree, missed):
    """In a buffer that notices by itself, and in one that has to be told."""
    link, lost = OdometryLink(tree, FrameSettings(odom="odom", transform_timeout=0.0)), []
    for second in (*range(100, 116), *range(100, 116)):
        pose = np.eye(4)
        pose[0, 3] = second
        add(tree, "odom", "camera", pose, second * SECOND)
        try:
            assert np.allclose(link.odom_from_camera("camera", second * SECOND), pose)
        except NoOdometry:
            lost.append(second)
    assert lost == missed
    link.odom_from_camera("camera", 114 * SECOND)  # images in the wrong order are no reason to forget
    link.odom_from_camera("camera", 115 * SECOND)


def test_clear_keeps_only_what_never_changes():
    tree = TransformTree()
    add(tree, "odom", "base", np.eye(4), 1 * SECOND)
    add(tree, "base", "camera", np.eye(4), 0, static=True)
    tree.clear()
    assert np.allclose(tree.lookup("base", "camera"), np.eye(4))
    with pytest.raises(TransformError, match="'odom' is unknown"):
        tree.lookup("odom", "base")
