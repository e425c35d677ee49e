"""A camera that comes back: what was mapped before moves, map, path and trajectory alike."""

from __future__ import annotations

import numpy as np
import pytest
from lap_helpers import CHUNK, chunk, expected_frames, lap
from mapping_helpers import mapper_of
from node_helpers import matrix_of
from ros_helpers import parameters_of, spin_until
from scipy.spatial import cKDTree
from scipy.spatial.transform import Rotation
from walks import bundled

from stac_ros import topics
from stac_ros.camera_info import CameraCalibration
from stac_ros.mapper import MAP_FROM_OPTICAL, Mapper
from stac_ros.outputs import Outputs
from stac_ros.run_statistics import Statistics

SPARSE = {"points__max_points": 400, "map__voxel_size": 1e-5}  # no two points in a voxel


def poses(trajectory) -> np.ndarray:
    """[N, 4, 4]"""
    rows = np.array([line.split() for line in trajectory.tum()], float)
    matrices = np.tile(np.eye(4), (len(rows), 1, 1))
    matrices[:, :3, :3], matrices[:, :3, 3] = Rotation.from_quat(rows[:, 4:]).as_matrix(), rows[:, 1:4]
    return matrices


def apart(some: np.ndarray, others: np.ndarray) -> float:
    """Greatest distance from any point of either [N, 3] to the nearest of the other."""
    trees = cKDTree(some), cKDTree(others)
    return max(float(trees[0].query(others)[0].max()), float(trees[1].query(some)[0].max()))


LEVEL = MAP_FROM_OPTICAL.copy()
LEVEL[:3, :3] = Rotation.from_rotvec([0.2, -0.4, 0.9]).as_matrix() @ LEVEL[:3, :3]
LEVEL[:3, 3] = 3.0, -2.0, 1.0


@pytest.mark.parametrize(
    ("odom_from_first", "given"),
    [(None, {}), (LEVEL, {"frames__odom": "odom", "scale__mode": "fixed", "scale__factor": 2.5})],
    ids=["own unit", "metres along odometry"],
)
def test_map_and_trajectory_end_where_the_core_says_that_they_lie(odom_from_first, given):
    with mapper_of(bundled(), **SPARSE, **given) as (mapper, notes, _):
        for number in range(len(lap().said)):
            mapper.mapper.add(chunk(number, odom_from_first))
        settings = mapper.parameters.ros.points
    factor, first = given.get("scale__factor", 1.0), lap().said[0].world_from_camera[0].double().numpy()
    first[:3, 3] *= factor
    in_map = MAP_FROM_OPTICAL if odom_from_first is None else odom_from_first @ np.linalg.inv(first)
    expected = expected_frames(in_map, factor)
    assert len(notes.moves) == sum(p.moved is not None for p in lap().said) >= 1
    assert np.allclose(poses(mapper.trajectory), [f.map_from_camera for f in expected], atol=1e-5)
    whole = np.concatenate([frame.points(settings).positions for frame in expected])
    assert apart(mapper.map.points()[0], whole) < 1e-4
    said = np.concatenate([points.positions for points in notes.points])
    assert apart(said, whole) > 0.01, "they would have lain elsewhere"


def test_what_an_earlier_stream_has_mapped_stays():
    with mapper_of(bundled(), map__keep_on_new_stream=True, **SPARSE) as (mapper, notes, _):
        mapper.mapper.add(chunk(3))
        before, path = mapper.map.points()[0], poses(mapper.trajectory)
        mapper.mapper.begin_stream(keep=True)
        for number in range(lap().closing + 1):
            mapper.mapper.add(chunk(number))
        assert len(notes.moves) == 1
        assert cKDTree(mapper.map.points()[0]).query(before)[0].max() < 1e-5
        assert np.array_equal(poses(mapper.trajectory)[:CHUNK], path)


def test_a_loaded_map_is_moved_by_a_loop_that_closes_later(tmp_path):
    closing = lap().closing
    with mapper_of(bundled(), **SPARSE) as (mapper, *_):
        for number in range(closing):
            mapper.mapper.add(chunk(number))
        mapper.mapper.save(tmp_path / "map")
        mapper.mapper.add(chunk(closing))
        expected = mapper.map.voxels()
    with mapper_of(bundled(), **SPARSE) as (mapper, *_):
        mapper.mapper.load(tmp_path / "map")
        mapper.mapper.add(chunk(closing))
        found = mapper.map.voxels()
    order = [np.lexsort(voxels[0].T.round(4)) for voxels in (expected, found)]
    for ours, theirs in zip(found, expected, strict=True):
        assert np.allclose(ours[order[1]], theirs[order[0]], atol=1e-4)
    assert len(np.unique(found[3])) > 5


def test_path_and_velocity_know_of_a_loop():
    """The path lies as the trajectory does; ~/odom tells the camera's motion, not the jump."""
    heard: dict[topics.Topic, list] = {topics.PATH: [], topics.ODOMETRY: []}
    with parameters_of(**SPARSE) as (node, given):
        outputs = Outputs(node, given, CameraCalibration())
        for topic, messages in heard.items():
            qos = topic.qos()
            qos.depth = 50
            node.create_subscription(topic.type, topic.name, messages.append, qos)
        spin_until([node], lambda: all(map(outputs.has_subscribers, heard)), "the subscriptions")
        mapper = Mapper(given, Statistics(), outputs)
        for number in range(lap().closing + 1):
            mapper.add(chunk(number))
        outputs.publish_whole(mapper.map, mapper.grid)
        count = len(mapper.trajectory)
        spin_until([node], lambda: heard[topics.PATH] and len(heard[topics.ODOMETRY]) == count, "all of it")
    path = [matrix_of(stamped.pose) for stamped in heard[topics.PATH][-1].poses]
    assert np.allclose(path, poses(mapper.trajectory), atol=1e-6) and len(path) == count
    said = [matrix_of(message.pose.pose) for message in heard[topics.ODOMETRY]]
    moved = [not np.allclose(*both, atol=1e-3) for both in zip(path, said, strict=True)]
    assert any(moved) and not any(moved[-CHUNK:])
    speeds = [turning(message.twist.twist) for message in heard[topics.ODOMETRY]]
    assert speeds[0] == 0 and min(speeds[1:]) > 0
    assert speeds[CHUNK * lap().closing] < 2 * np.median(speeds)


def turning(twist) -> float:
    return float(np.linalg.norm([twist.angular.x, twist.angular.y, twist.angular.z]))


def test_visual_odometry_goes_on_where_the_map_jumps():
    """map → odom → camera is where the camera is in the map, and the camera never jumps in odom."""
    links: dict[str, list] = {"odom": [], "camera": []}
    said: list = []

    def keep(message) -> None:
        for transform in message.transforms:
            links[transform.child_frame_id].append(transform)

    with parameters_of(frames__visual_odom="odom", **SPARSE) as (node, given):
        outputs, topic = Outputs(node, given, CameraCalibration()), topics.ODOMETRY
        qos = topic.qos()
        qos.depth = 50
        node.create_subscription(topics.TF.type, "/tf", keep, 200)
        node.create_subscription(topic.type, topic.name, said.append, qos)
        spin_until([node], lambda: outputs.has_subscribers(topic), "the subscription")
        spin_until([node], lambda: node.count_subscribers("/tf") > 1, "the listener of transforms")
        mapper = Mapper(given, Statistics(), outputs)
        in_map = []
        for number in range(len(lap().said)):
            mapper.add(chunk(number))
            in_map += list(poses(mapper.trajectory)[-len(chunk(number).views) :])
        count = len(in_map)
        spin_until([node], lambda: min(len(said), *map(len, links.values())) == count, "all of it")
    assert {link.header.frame_id for link in links["odom"]} == {"map"}
    assert {link.header.frame_id for link in links["camera"]} == {"odom"}
    map_from_odom, odom_from_camera = (np.stack([*map(matrix_of_transform, some)]) for some in links.values())
    assert np.allclose(map_from_odom @ odom_from_camera, in_map, atol=1e-5)
    assert np.allclose([matrix_of(message.pose.pose) for message in said], odom_from_camera, atol=1e-6)
    assert {message.header.frame_id for message in said} == {"odom"}
    steps, jumps = turns(odom_from_camera), turns(map_from_odom)
    first = CHUNK * lap().closing
    assert np.allclose(map_from_odom[: first - 1], np.eye(4), atol=1e-5)
    print(f"turned by {steps[first - 1]:.1f}° in odom, odom by {jumps[first - 1]:.1f}° in the map")
    assert steps.max() < 2 * np.median(steps) and jumps[first - 1] > np.median(steps)


def matrix_of_transform(stamped) -> np.ndarray:
    pose, place, turn = np.eye(4), stamped.transform.translation, stamped.transform.rotation
    pose[:3, :3] = Rotation.from_quat([turn.x, turn.y, turn.z, turn.w]).as_matrix()
    pose[:3, 3] = place.x, place.y, place.z
    return pose


def turns(matrices: np.ndarray) -> np.ndarray:
    """From each to the next, degrees [N - 1]."""
    return np.degrees(
        Rotation.from_matrix((np.linalg.inv(matrices[:-1]) @ matrices[1:])[:, :3, :3]).magnitude()
    )
