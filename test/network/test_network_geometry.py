"""Poses, cameras and points against the golden figures and scipy."""

import numpy as np
import pytest
import torch
from scipy.spatial.transform import Rotation
from tiny import assert_matches, golden

from stac_core.geometry import (
    decode_pose,
    encode_pose,
    invert_pose,
    pose_matrix,
    quaternion_from_rotation,
    rotation_from_quaternion,
    unproject_depth,
    unproject_pixels,
)

TOLERANCE = 5e-6


@pytest.fixture(scope="module")
def data():
    return golden("comp_pose_enc")


def test_pose_encoding_both_ways(data):
    height, width = data["image_hw"].tolist()
    world_from_camera, intrinsics = decode_pose(data["pose_enc"], height, width)
    assert_matches(world_from_camera, data["c2w"], TOLERANCE)
    assert_matches(invert_pose(world_from_camera)[..., :3, :], data["extrinsic"], TOLERANCE)
    assert_matches(intrinsics, data["intrinsic"], TOLERANCE)
    encoded = encode_pose(world_from_camera, intrinsics, height, width)
    assert_matches(encoded, data["pose_enc_roundtrip"], TOLERANCE)


def test_quaternions_of_matrices(data):
    found = quaternion_from_rotation(data["mat_to_quat.mat"])
    assert_matches(found, data["mat_to_quat.quat"], TOLERANCE)


def test_quaternions_against_scipy():
    quaternions = np.random.default_rng(0).normal(size=(500, 4))
    quaternions[:4] = np.eye(4)  # half turns, where the scalar vanishes
    rotations = torch.from_numpy(Rotation.from_quat(quaternions).as_matrix())
    assert_matches(rotation_from_quaternion(torch.from_numpy(quaternions)), rotations, 1e-12)
    back = Rotation.from_quat(quaternion_from_rotation(rotations).numpy())
    assert (back * Rotation.from_quat(quaternions).inv()).magnitude().max() < 1e-7
    assert (quaternion_from_rotation(rotations)[:, 3] >= 0).all()


def test_unprojection(data):
    world_from_camera = invert_pose(data["unproject.extrinsic"])
    points = unproject_depth(data["unproject.depth"][..., 0], data["unproject.intrinsic"], world_from_camera)
    assert_matches(points, data["unproject.world_points"].float(), TOLERANCE)


def test_a_point_in_front_lands_where_the_camera_looks():
    turn = torch.from_numpy(Rotation.from_euler("y", 90, degrees=True).as_matrix()).float()  # z → x
    pose = pose_matrix(turn, torch.tensor([1.0, 2.0, 3.0]))
    intrinsics = torch.tensor([[50.0, 0, 2], [0, 60.0, 1], [0, 0, 1]])
    points = unproject_depth(torch.full((3, 5), 4.0), intrinsics, pose)
    assert_matches(points[1, 2], torch.tensor([5.0, 2.0, 3.0]), 1e-6)


@pytest.mark.parametrize("field_of_view", [0.0, -1.0, 3.2, 7.0])
def test_impossible_fields_of_view_give_usable_cameras(field_of_view):
    encoding = torch.tensor([0, 0, 0, 0, 0, 0, 1, field_of_view, field_of_view])
    _, intrinsics = decode_pose(encoding, 70, 84)
    assert intrinsics.isfinite().all()
    assert (intrinsics.diagonal() > 0).all()


def test_a_vanished_quaternion_is_no_rotation():
    pose, _ = decode_pose(torch.tensor([1.0, 2, 3, 0, 0, 0, 0, 1, 1]), 70, 84)
    assert torch.equal(pose[:3, :3], torch.eye(3))


def test_encoding_is_differentiable():
    encoding = torch.tensor([[1.0, 2, 3, 0.1, 0.2, 0.3, 0.9, 1, 1.2]], requires_grad=True)
    pose, intrinsics = decode_pose(encoding, 70, 84)
    encode_pose(pose, intrinsics, 70, 84).sum().backward()
    assert encoding.grad is not None and encoding.grad.isfinite().all()


@pytest.mark.parametrize("kind", ["none", "some", "all"])
def test_chosen_pixels_lie_where_all_of_them_do(kind):
    g = torch.Generator().manual_seed(3)
    depth = torch.rand(7, 5, generator=g) + 1
    intrinsics = torch.tensor([[90.0, 0, 2.3], [0, 80, 3.1], [0, 0, 1]])
    rotation = rotation_from_quaternion(torch.randn(4, generator=g))
    pose = pose_matrix(rotation, torch.randn(3, generator=g))
    everything = unproject_depth(depth, intrinsics, pose).flatten(0, 1)
    chosen = {"none": [], "some": [34, 0, 7, 7], "all": range(35)}[kind]
    chosen = np.array(chosen, np.int64)
    found = unproject_pixels(depth.numpy(), chosen, intrinsics.numpy(), pose.double().numpy())
    assert found.shape == (len(chosen), 3) and found.dtype == np.float32
    np.testing.assert_allclose(found, everything[chosen], rtol=1e-6, atol=1e-6)
