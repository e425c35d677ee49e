"""Depth, poses and intrinsics belong together: judged by reprojection and by another ray-caster."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from worlds.worlds_views import project, sample_batch, unproject, view

from stac_core.worlds import WorldBatch, WorldConfig
from stac_core.worlds.draws import world_seeds
from stac_core.worlds.shapes import BOX, CYLINDER, Shapes
from stac_core.worlds.world import Worlds, build_worlds

HEIGHT, WIDTH = 84, 112
CLEAN = WorldConfig(defects=0.0, step_min=0.02, step_max=0.05)


@pytest.fixture(scope="module")
def batch() -> WorldBatch:
    return sample_batch(CLEAN, 8, 3, HEIGHT, WIDTH, seed=21)


@pytest.mark.parametrize("world", range(8))
def test_points_of_one_frame_lie_on_the_surfaces_of_the_next(batch: WorldBatch, world: int) -> None:
    image_a, depth_a, pose_a, lens_a = view(batch, world, 0)
    image_b, depth_b, pose_b, lens_b = view(batch, world, 2)
    pixels, z = project(unproject(depth_a, pose_a, lens_a), pose_b, lens_b)
    u, v = np.rint(pixels).astype(int).T
    inside = (z > 0) & (u >= 0) & (u < WIDTH) & (v >= 0) & (v < HEIGHT)
    assert inside.mean() > 0.2, "the frames share too little to be compared"
    seen_depth = depth_b[v[inside], u[inside]]
    error = (z[inside] - seen_depth) / z[inside]
    visible = error < 0.03  # what is much nearer in b hides the point
    assert visible.mean() > 0.6
    assert np.median(np.abs(error[visible])) < 0.01
    colours = image_a[depth_a > 0][inside][visible]
    change = np.abs(colours - image_b[v[inside], u[inside]][visible]).max(1)
    assert np.median(change) < 0.06, "texture is not anchored to the surface"


def test_principal_point_is_half_the_image_and_pixels_are_square(batch: WorldBatch) -> None:
    lens = batch.intrinsics
    assert torch.all(lens[..., 0, 2] == WIDTH / 2) and torch.all(lens[..., 1, 2] == HEIGHT / 2)
    assert torch.equal(lens[..., 0, 0], lens[..., 1, 1])
    fov = torch.rad2deg(2 * torch.atan(WIDTH / 2 / lens[..., 0, 0]))
    assert fov.min() >= 45 and fov.max() <= 100
    assert fov.std() > 3


def test_poses_are_rigid(batch: WorldBatch) -> None:
    rotation = batch.world_from_camera[..., :3, :3].double()
    identity = torch.eye(3, dtype=torch.float64).expand_as(rotation)
    assert torch.allclose(rotation @ rotation.transpose(-1, -2), identity, atol=1e-6)
    assert torch.allclose(torch.linalg.det(rotation), torch.ones(8, 3, dtype=torch.float64), atol=1e-6)


def _mesh(o3d, shapes: Shapes, index: int):  # type: ignore[no-untyped-def]
    size = 2 * shapes.half[0, index].double().numpy()
    if shapes.kind == BOX:
        mesh = o3d.geometry.TriangleMesh.create_box(*size).translate(-size / 2)
    elif shapes.kind == CYLINDER:
        mesh = o3d.geometry.TriangleMesh.create_cylinder(size[0] / 2, size[2], resolution=400)
    else:
        mesh = o3d.geometry.TriangleMesh.create_sphere(size[0] / 2, resolution=150)
    rotation = shapes.rotation[0].double().numpy()
    mesh.rotate(rotation, center=np.zeros(3))
    return mesh.translate(rotation @ shapes.centre[0, index].double().numpy())


def _judged_depth(worlds: Worlds, pose: np.ndarray, lens: np.ndarray) -> np.ndarray:
    """Depth by Open3D's ray-caster on triangle meshes of the same shapes."""
    o3d = pytest.importorskip("open3d")
    caster = o3d.t.geometry.RaycastingScene()
    for shapes in worlds.scene.shapes:
        for index in torch.nonzero(shapes.half[0, :, 0] > 0).flatten().tolist():
            caster.add_triangles(o3d.t.geometry.TriangleMesh.from_legacy(_mesh(o3d, shapes, index)))
    v, u = np.mgrid[:HEIGHT, :WIDTH]
    rays = np.stack([(u - lens[0, 2]) / lens[0, 0], (v - lens[1, 2]) / lens[1, 1], np.ones_like(u)], -1)
    rays = rays @ pose[:3, :3].T
    origin = np.broadcast_to(pose[:3, 3], rays.shape)
    hit = caster.cast_rays(o3d.core.Tensor(np.concatenate([origin, rays], -1).astype(np.float32)))
    distance = hit["t_hit"].numpy()
    return np.where(np.isfinite(distance), distance, 0)


@pytest.mark.parametrize(("kind", "seed"), [("room", 1), ("rooms", 2), ("outdoor", 3), ("outdoor", 8)])
def test_depth_equals_another_ray_caster(kind: str, seed: int) -> None:
    worlds = build_worlds(WorldConfig(kind=kind), world_seeds(seed, 1))
    batch = worlds.render(torch.tensor([0, 9]), HEIGHT, WIDTH)
    for frame in range(2):
        _, depth, pose, lens = view(batch, 0, frame)
        judged = _judged_depth(worlds, pose, lens)
        assert ((depth > 0) == (judged > 0)).mean() > 0.995
        error = np.abs(depth - judged) / np.maximum(judged, 0.1)
        # Meshes of round things are polygons, and edges may fall to either side.
        assert np.quantile(error, 0.98) < 2e-3
        assert np.median(error) < 1e-5


def test_sky_has_no_depth_and_rooms_have_no_holes() -> None:
    indoors = sample_batch(WorldConfig(kind="rooms"), 6, 2, 56, 70, seed=4)
    assert (indoors.depth > 0).all()
    outdoors = sample_batch(WorldConfig(kind="outdoor"), 6, 2, 56, 70, seed=4)
    assert (outdoors.depth == 0).float().mean() > 0.05
    assert outdoors.depth.isfinite().all()
