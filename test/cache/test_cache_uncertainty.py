"""Variances of poses: against numpy's Laplacian, against many noisy walks, and along a real stream."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy.spatial.transform import Rotation
from tiny import tiny_network
from walks import bundled, frames_of, images_of

from stac_core import Config, StreamSession
from stac_core.config import CacheConfig, SubmapConfig
from stac_core.keyframes import Keyframe
from stac_core.pose_graph import PoseGraph
from stac_core.uncertainty import Drift, drift_between, with_variances

OPEN = "world:6203,frames=24,height=126,width=168,path=explore"


def keyframe(turn: Rotation, place: np.ndarray, submap: int = 0) -> Keyframe:
    pose = np.eye(4)
    pose[:3, :3], pose[:3, 3] = turn.as_matrix(), place
    return Keyframe(torch.zeros(1, 3, 2, 2), torch.from_numpy(pose), torch.ones(2, 2), submap)


def standing(submap: int = 0) -> Keyframe:
    return keyframe(Rotation.identity(), np.zeros(3), submap)


def random_graph(rng: np.random.Generator) -> np.ndarray:
    """Ends [L, 2] of links that join 9 nodes, some of them more than once."""
    tree = [[rng.integers(node), node] for node in range(1, 9)]
    return np.array(tree + [rng.choice(9, 2, replace=False) for _ in range(6)])


def test_drift_is_the_resistance_that_the_laplacian_tells():
    rng = np.random.default_rng(3)
    for _ in range(20):
        ends, depths = random_graph(rng), rng.uniform(0.5, 3, 14)
        drift = drift_between(ends, np.ones(14), depths, np.array([0, 8]))
        for ours, conductance in ((drift.departure, np.ones(14)), (drift.scaled, depths**-2)):
            laplacian = np.zeros((9, 9))
            for (i, j), c in zip(ends, conductance, strict=True):
                laplacian[[i, j], [i, j]] += c
                laplacian[[i, j], [j, i]] -= c
            inverse = np.linalg.pinv(laplacian)
            assert np.isclose(ours, inverse[0, 0] + inverse[8, 8] - 2 * inverse[0, 8])


def test_departures_add_up_along_a_chain_and_a_loop_halves_them():
    chain = np.array([[i, i + 1] for i in range(8)])
    departures, depths = np.linspace(0.2, 0.5, 8), np.full(8, 2.0)
    drift = drift_between(chain, departures, depths, np.array([0, 8]))
    assert np.isclose(drift.departure, departures.sum()) and np.isclose(drift.scaled, 4 * departures.sum())
    ring = np.stack([np.arange(16), np.arange(1, 17) % 16], axis=1)
    both = drift_between(ring, np.ones(16), np.ones(16), np.array([0, 8]))
    assert np.isclose(both.departure, 8 / 2)
    assert drift_between(ring, np.ones(16), np.ones(16), np.array([5, 5])).departure == 0


def test_turns_of_many_noisy_rings_vary_as_the_graph_says():
    """Each link of a ring of ten errs by chance, the last one closes it: what remains at each node."""
    rng, count, noise = np.random.default_rng(5), 10, 0.01
    remains = []
    for _ in range(400):
        turns = [Rotation.identity()]
        for _ in range(count):
            turns.append(turns[-1] * Rotation.from_rotvec(noise * rng.normal(size=3)))
        graph = PoseGraph()
        for node in range(1, count):
            graph.go_on(keyframe(turns[node], np.zeros(3), node), 1.0)
        moves = graph.close(standing(), keyframe(turns[count], np.zeros(3)), standing(), 1.0)
        moved = Rotation.from_matrix(moves.rotation) * Rotation.concatenate(turns[:count])
        remains.append(moved.as_rotvec())
    told = []
    for node in range(1, count):
        graph.go_to(standing(node))
        told.append(noise**2 * graph.drift.departure)
    found = np.square(remains)[:, 1:].mean((0, 2))
    print(np.round(found / told, 2))
    assert np.allclose(found / told, 1, atol=0.2)  # 400 rings tell each to 4 %


def test_forgotten_nodes_leave_what_has_added_up_along_an_open_way():
    """Whichever nodes are kept, the first one of all included."""
    for kept in (range(0, 30), range(20, 30), (0, 7, 29), (3, 29)):
        graph = PoseGraph()
        for node in range(1, 30):
            graph.go_on(standing(node), 0.1 * node)
        graph.keep(map(standing, kept))
        assert np.isclose(graph.drift.departure, 0.1 * np.arange(30).sum())
        again = PoseGraph()
        again.restore(graph.state())
        assert again.drift == graph.drift


@pytest.mark.parametrize("config", [Config(submap=SubmapConfig(reach=0.5)), Config(submap=SubmapConfig(0.0))])
def test_nothing_is_said_of_submaps_that_were_not_measured(config):
    images = images_of(frames_of(OPEN))[:2]
    said = StreamSession(bundled(), config).step(images)
    assert said.pose_variance is None and said.step_variance is None


def test_nothing_is_said_of_other_networks():
    images = images_of(frames_of(OPEN))[:2]
    config = Config(cache=CacheConfig(mode="stac"), submap=SubmapConfig(reach=0.25))
    said = StreamSession(tiny_network(), config).step(images)
    assert said.pose_variance is None and said.step_variance is None


def test_variances_grow_along_an_open_walk_and_go_on_where_it_was_saved(tmp_path):
    frames, stream = frames_of(OPEN), StreamSession(bundled(), Config())
    said = [stream.step(images_of(frames[i : i + 4])) for i in range(0, 20, 4)]
    stream.save(tmp_path / "stream")
    again = StreamSession(bundled(), Config())
    again.load(tmp_path / "stream")
    last, loaded = (one.step(images_of(frames[20:24])) for one in (stream, again))
    assert torch.equal(last.pose_variance, loaded.pose_variance)
    ends = torch.stack([p.pose_variance[-1] for p in [*said, last]])
    assert 0 < float(said[0].pose_variance[0].max()) < 1e-4  # the world is fixed to the first camera
    assert (ends[-1] > 2 * ends[0]).all() and stream.stats().submaps > 1


def test_the_steps_of_a_calibrated_camera_are_better_known():
    images = images_of(frames_of(OPEN))[:4]
    said = StreamSession(bundled(), Config()).step(images)
    first = Keyframe(*(torch.zeros(1, 3, 1, 1), said.world_from_camera[0], said.depth[0]))
    known, unknown = (
        with_variances(said, first, first, Drift(), lens).step_variance for lens in (True, False)
    )
    assert torch.equal(unknown, said.step_variance)
    assert (known > 0).all() and (known[1:] < unknown[1:]).all()


def test_what_has_added_up_is_not_forgotten_where_the_graph_is_held():
    """As a node does before every chunk where its map must not grow."""
    graph, free = PoseGraph(), PoseGraph()
    for submap in range(1, 9):
        for one in (graph, free):
            one.go_on(standing(submap), 0.3)
        graph.hold()
        assert np.isclose(graph.drift.departure, 0.3 * submap) and np.isclose(
            graph.drift.scaled, 0.3 * submap
        )
    again = PoseGraph()
    again.restore(graph.state())
    for one in (graph, again, free):
        one.go_to(standing(3))
        assert np.isclose(one.drift.departure, 0.3 * 3)
        one.go_on(standing(), 0.2)
        assert np.isclose(one.drift.departure, 0.3 * 3 + 0.2)
