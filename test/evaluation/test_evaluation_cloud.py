"""Cloud errors, normals and registration, judged by Open3D."""

import numpy as np
import pytest
from scipy.spatial.transform import Rotation

from stac_core.evaluation.alignment import Similarity
from stac_core.evaluation.cloud_metrics import cloud_errors, estimate_normals, voxel_downsample
from stac_core.evaluation.registration import register

o3d = pytest.importorskip("open3d", reason="Open3D is the judge here")


def room(points: int, seed: int) -> np.ndarray:
    """Random points on three walls that meet."""
    random = np.random.default_rng(seed)
    cloud = random.uniform(0, 2, (points, 3))
    cloud[np.arange(points), np.arange(points) % 3] = 0
    return cloud + random.normal(size=cloud.shape) * 0.003


def judge(points: np.ndarray):
    return o3d.geometry.PointCloud(o3d.utility.Vector3dVector(points))


def test_distances_and_f_score_equal_open3d():
    ours, theirs = room(4000, 1) + 0.01, room(5000, 2)[:4200]
    errors = cloud_errors(ours, theirs, threshold=0.03)
    to_truth = np.asarray(judge(ours).compute_point_cloud_distance(judge(theirs)))
    to_ours = np.asarray(judge(theirs).compute_point_cloud_distance(judge(ours)))
    assert errors.accuracy_mean == pytest.approx(to_truth.mean(), abs=1e-6)
    assert errors.completeness_median == pytest.approx(np.median(to_ours), abs=1e-6)
    precision, recall = np.mean(to_truth < 0.03), np.mean(to_ours < 0.03)
    assert errors.f_score == pytest.approx(2 * precision * recall / (precision + recall), abs=1e-6)


def test_normals_equal_open3d():
    cloud = room(3000, 3)
    judged = judge(cloud)
    judged.estimate_normals(o3d.geometry.KDTreeSearchParamKNN(30), fast_normal_computation=False)
    cosine = np.abs(np.sum(estimate_normals(cloud) * np.asarray(judged.normals), 1))
    assert cosine.min() == pytest.approx(1, abs=1e-6)


def test_normal_consistency_equals_open3d_normals():
    ours, theirs = room(2000, 4), room(2000, 5)
    normals = []
    for cloud in (judge(ours), judge(theirs)):
        cloud.estimate_normals(o3d.geometry.KDTreeSearchParamKNN(30), fast_normal_computation=False)
        normals.append(np.asarray(cloud.normals))
    total = 0.0
    for a, b, na, nb in ((ours, theirs, *normals), (theirs, ours, *normals[::-1])):
        tree = o3d.geometry.KDTreeFlann(judge(b))
        partner = [tree.search_knn_vector_3d(point, 1)[1][0] for point in a]
        total += np.abs(np.sum(na * nb[partner], 1)).mean() / 2
    assert cloud_errors(ours, theirs).normal_consistency == pytest.approx(total, abs=1e-6)


def test_downsampling_equals_open3d():
    cloud = room(5000, 6)
    judged = np.asarray(judge(cloud).voxel_down_sample(0.1).points)
    ours = voxel_downsample(cloud, 0.1)
    np.testing.assert_allclose(ours[np.lexsort(ours.T)], judged[np.lexsort(judged.T)], atol=1e-9)
    assert len(voxel_downsample(np.full((4, 3), np.nan), 0.1)) == 0


@pytest.mark.parametrize("far", [1e19, 1e300])
def test_a_cloud_of_too_many_cells_is_refused_however_far_it_reaches(far):
    with pytest.raises(ValueError, match="too many cells"):
        voxel_downsample(np.array([[0.0, 0, 0], [0, 0, 0.001], [far, 0, 0]]), 0.02)


def test_registration_equals_open3d_and_recovers_the_move():
    target = room(6000, 7)
    move = Similarity(Rotation.from_euler("xyz", [2, -1, 1.5], degrees=True).as_matrix(), np.full(3, 0.02))
    source = move.apply(room(3000, 8))
    found = register(source, target, max_distance=0.1)
    settled = o3d.pipelines.registration.ICPConvergenceCriteria(max_iteration=30)
    judged = o3d.pipelines.registration.registration_icp(
        judge(source), judge(target), 0.1, np.eye(4),
        o3d.pipelines.registration.TransformationEstimationPointToPoint(), settled,
    )  # fmt: skip
    np.testing.assert_allclose(found.rotation, judged.transformation[:3, :3], atol=1e-6)
    np.testing.assert_allclose(found.translation, judged.transformation[:3, 3], atol=1e-6)
    np.testing.assert_allclose(found.rotation @ move.rotation, np.eye(3), atol=0.005)


def test_registration_leaves_far_clouds_alone():
    assert np.array_equal(register(room(100, 1) + 50, room(100, 2), 0.1).translation, np.zeros(3))


def test_empty_and_non_finite_clouds_are_refused():
    cloud = room(100, 9)
    with pytest.raises(ValueError, match="reconstruction: 0 points"):
        cloud_errors(cloud[:0], cloud)
    with pytest.raises(ValueError, match="truth"):
        cloud_errors(cloud, np.full((5, 3), np.nan))
    with pytest.raises(ValueError, match="voxel_size = 0"):
        voxel_downsample(cloud, 0)
    with pytest.raises(ValueError, match="too many cells"):
        voxel_downsample(np.array([[0.0, 0, 0], [1e9, 1e9, 1e9]]), 1e-3)
