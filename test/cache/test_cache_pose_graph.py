"""A closed loop tells where the submaps in between lie: against truth, and against scipy's optimum."""

from __future__ import annotations

import tracemalloc
from dataclasses import replace

import numpy as np
import pytest
import torch
from scipy.optimize import least_squares
from scipy.spatial.transform import Rotation
from walks import LAP, bundled, frames_of, images_of

from stac_core import Config, Moves, Prediction, StreamSession
from stac_core.camera_path import CameraPath
from stac_core.evaluation.alignment import align_points
from stac_core.geometry import pose_matrix
from stac_core.keyframes import Keyframe
from stac_core.pose_graph import PoseGraph
from stac_core.prediction import moved_on
from stac_core.training.figures import turn_error

DRIFT = Rotation.from_rotvec([0.004, -0.02, 0.03]), np.array([0.02, -0.03, 0.01]), 1.03  # of one submap


def keyframe(pose: np.ndarray, depth: float = 1.0, submap: int = 0) -> Keyframe:
    tensors = torch.zeros(1, 3, 2, 2), torch.from_numpy(pose), torch.full((2, 2), depth, dtype=torch.float64)
    return Keyframe(*tensors, submap)


def begun(submap: int) -> Keyframe:
    """The frame that a submap began with, of which the graph knows where it lies."""
    return keyframe(np.eye(4), submap=submap)


def ring(count: int) -> np.ndarray:
    """True poses on a circle that look outwards, [count, 4, 4]; the first is the origin."""
    poses = np.tile(np.eye(4), (count, 1, 1))
    poses[:, :3, :3] = Rotation.from_rotvec(
        np.outer(np.arange(count) * 2 * np.pi / count, [0, 1, 0])
    ).as_matrix()
    poses[:, :3, 3] = poses[:, :3, 2] * 3.0
    return np.linalg.inv(poses[0]) @ poses


def drifting(true: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The same walk as seen submap by submap, each of which errs alike: poses and lengths [count]."""
    turn, shift, growth = DRIFT
    poses, scales = [true[0]], [1.0]
    for step in np.linalg.inv(true[:-1]) @ true[1:]:
        wrong = pose_of(Rotation.from_matrix(step[:3, :3]) * turn, scales[-1] * (step[:3, 3] + shift))
        poses.append(poses[-1] @ wrong)
        scales.append(scales[-1] * growth)
    return np.stack(poses), np.array(scales)


def pose_of(rotation: Rotation, translation: np.ndarray) -> np.ndarray:
    pose = np.eye(4)
    pose[:3, :3], pose[:3, 3] = rotation.as_matrix(), translation
    return pose


def walked(poses: np.ndarray, scales: np.ndarray, graph: PoseGraph | None = None) -> PoseGraph:
    """A graph of one submap per pose, each begun by the one before."""
    graph = graph or PoseGraph()
    for pose, scale in zip(poses[1:], scales[1:], strict=True):
        graph.go_on(keyframe(pose, scale))
    return graph


def off(poses: np.ndarray, true: np.ndarray) -> float:
    """Mean distance of camera centres after the best similarity."""
    ours, truth = poses[:, :3, 3], true[:, :3, 3]
    moved = align_points(ours, truth, with_scale=True).apply(ours)
    return float(np.linalg.norm(moved - truth, axis=1).mean())


def test_a_closed_ring_is_put_where_it_truly_lies():
    """Each of its submaps errs by the same, so that what is told by the end is told of all of them."""
    true = ring(24)
    poses, scales = drifting(np.concatenate([true, true[:1]]))
    graph = walked(poses[:-1], scales[:-1])
    moves = graph.close(begun(0), keyframe(poses[-1], scales[-1]), keyframe(true[0]))
    assert moves is not None and len(moves) == 24
    moved = moves.poses(np.arange(24), poses[:-1])
    before, after = off(poses[:-1], true), off(moved, true)
    print(f"off by {before:.3f} before, {after:.4f} after, of a radius of 3")
    assert np.array_equal(moved[0], poses[0]) and after < 0.1 * before
    assert np.ptp(moves.scale * scales[:-1]) < 0.25 * np.ptp(scales)


def test_nothing_moves_where_nothing_has_drifted():
    true = ring(8)
    moves = walked(true, np.ones(8)).close(begun(0), keyframe(true[0]), keyframe(true[0]))
    assert np.allclose(moves.poses(np.arange(8), true), true, atol=1e-12)
    assert np.allclose(moves.scale, 1, atol=1e-12)


def test_moves_come_near_to_the_optimum_over_all_at_once():
    """Scipy minimises turns, lengths and places together: what is left is at most twice as much."""
    true = ring(12)
    poses, scales = drifting(np.concatenate([true, true[:1]]))
    loop = keyframe(poses[-1], scales[-1]), keyframe(true[0])
    moves = walked(poses[:-1], scales[:-1]).close(begun(0), *loop)
    ends = np.array([[i, i + 1] for i in range(11)] + [[11, 0]])
    both = np.stack([[poses[i], poses[i]] for i in range(1, 12)] + [[poses[-1], true[0]]])
    depths = np.stack([[scales[i], scales[i]] for i in range(1, 12)] + [[scales[-1], 1.0]])

    def apart(moves: Moves) -> np.ndarray:
        moved, length = moves.poses(ends, both), moves.scale[ends] * depths
        turns = Rotation.from_matrix(moved[:, 0, :3, :3].swapaxes(1, 2) @ moved[:, 1, :3, :3]).as_rotvec()
        shifts = (moved[:, 0, :3, 3] - moved[:, 1, :3, 3]) / length.mean(1, keepdims=True)
        return np.concatenate([turns.ravel(), shifts.ravel(), np.log(length[:, 0] / length[:, 1])])

    def unpacked(x: np.ndarray) -> Moves:
        each = np.concatenate([np.zeros((1, 7)), x.reshape(11, 7)])
        return Moves(Rotation.from_rotvec(each[:, :3]).as_matrix(), each[:, 3:6], np.exp(each[:, 6]))

    best = 2 * least_squares(lambda x: apart(unpacked(x)), np.zeros(77)).cost
    ours, nothing = (apart(m) ** 2 for m in (moves, Moves.none(12)))
    print(f"least {best:.2e}, ours {ours.sum():.2e}, nothing moved {nothing.sum():.2e}")
    assert ours.sum() < 2 * best < 0.2 * nothing.sum()


def test_two_nodes_tell_only_once_how_they_lie():
    poses, scales = drifting(ring(6))
    graph = walked(poses, scales)
    loop = keyframe(poses[-1], scales[-1]), keyframe(poses[0])
    assert graph.close(begun(0), *loop) is not None
    graph.go_to(keyframe(poses[0]))
    assert graph.close(begun(5), loop[1], loop[0]) is None and graph.close(begun(0), *loop) is None
    assert len(graph.close(begun(3), keyframe(poses[0]), keyframe(poses[3], scales[3]))) == 7


def test_lengths_that_cannot_have_drifted_so_far_are_not_believed():
    """Over two links, and over one once a loop has brought the two ends of a long way together."""
    true = ring(12)
    frame = true[0]
    for doubtful, believed in ((1.4, 1.3), (1 / 1.4, 1 / 1.3)):
        graph = walked(true[:3], np.ones(3))
        assert graph.close(begun(0), keyframe(frame), keyframe(frame, doubtful)) is None
        assert graph.close(begun(0), keyframe(frame), keyframe(frame, believed)) is not None
    graph = walked(true, np.ones(12))
    assert graph.close(begun(0), keyframe(frame), keyframe(frame, 1.4)) is not None
    graph.go_to(keyframe(frame))
    assert graph.close(begun(10), keyframe(frame), keyframe(frame, 1.6)) is None


def test_submaps_that_begin_with_the_same_frame_move_together():
    poses, scales = drifting(ring(6))
    graph = walked(poses, scales)
    graph.go_to(keyframe(poses[2], scales[2], submap=2))
    graph.go_on(keyframe(poses[3], scales[3]))
    moves = graph.close(begun(0), keyframe(poses[4], scales[4]), keyframe(poses[1]))
    assert len(moves) == 8
    assert np.array_equal(moves.rotation[2], moves.rotation[6]) and moves.scale[2] == moves.scale[6]


@pytest.mark.parametrize("kept", [(0, 3, 6), (1, 3, 6), (2, 4, 6)])
def test_forgotten_nodes_move_with_a_neighbour(kept):
    """All submaps are told where they lie, those whose node is gone with one that stays."""
    poses, scales = drifting(ring(7))
    graph = walked(poses, scales)
    graph.keep(map(begun, kept))
    first = kept[0]
    moves = graph.close(begun(first), keyframe(poses[-1], scales[-1]), keyframe(poses[first], scales[first]))
    assert len(moves) == 7
    assert np.array_equal(moves.poses(np.arange(first + 1), poses[: first + 1]), poses[: first + 1])
    assert len(np.unique(moves.scale)) == len(kept)


def test_a_long_walk_is_remembered_by_the_nodes_that_are_kept():
    graph = PoseGraph()
    for node in range(1, 300):
        graph.go_on(keyframe(np.eye(4)))
        graph.keep(map(begun, range(max(0, node - 9), node + 1)))
    assert len(graph.state()["nodes"]) == 9
    assert len(graph.close(begun(291), keyframe(np.eye(4)), keyframe(np.eye(4)))) == 300


def test_what_is_held_stays_and_what_comes_after_moves():
    poses, scales = drifting(ring(9))
    graph = walked(poses[:4], scales[:4])
    graph.hold()
    assert graph.close(begun(0), keyframe(poses[1]), keyframe(poses[2])) is None
    walked(poses[3:], scales[3:], graph)
    moves = graph.close(begun(1), keyframe(poses[-1], scales[-1]), keyframe(poses[0]))
    moved = moves.poses(np.arange(9), poses)
    assert np.array_equal(moved[:4], poses[:4])
    assert (np.linalg.norm(moved - poses, axis=(1, 2))[4:] > 0.01).all()


def test_a_graph_goes_on_where_it_was_saved():
    poses, scales = drifting(ring(6))
    graph, again = walked(poses, scales), PoseGraph()
    graph.keep(map(begun, (0, 2, 5)))
    again.restore(graph.state())
    loop = keyframe(poses[-1], scales[-1]), keyframe(poses[0])
    ours, theirs = (one.close(begun(0), *loop) for one in (graph, again))
    assert all(map(np.array_equal, vars(ours).values(), vars(theirs).values()))
    again.restore(PoseGraph().state())
    again.go_on(keyframe(poses[1]))
    assert len(again.state()["node"]) == 2


def test_old_submaps_cost_nothing_where_one_more_begins():
    graph = PoseGraph()
    graph.restore({"node": torch.zeros(100_000, dtype=torch.int64)})
    for submap in range(100_000, 100_005):
        graph.go_on(keyframe(np.eye(4), submap=submap))
    tracemalloc.start()
    graph.keep(map(begun, (0, *range(100_000, 100_005))))
    most = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert most < 20_000 and len(set(graph.state()["node"].tolist())) == 6


def test_moves_one_after_the_other_and_in_another_frame():
    rng = np.random.default_rng(4)

    def some(n: int) -> Moves:
        return Moves(Rotation.random(n, rng).as_matrix(), rng.normal(size=(n, 3)), rng.uniform(0.5, 2, n))

    first, then, points, submap = some(3), some(5), rng.normal(size=(9, 3)), rng.integers(0, 3, 9)
    both = then.after(first)
    assert len(both) == 3
    assert np.allclose(both.points(submap, points), then.points(submap, first.points(submap, points)))
    all_in_all, new = Moves.composed([None, first, None, then]), np.arange(3, 5)
    assert np.allclose(all_in_all.points(submap, points), both.points(submap, points))
    assert np.allclose(all_in_all.points(new, points[:2]), then.points(new, points[:2]))
    assert np.array_equal(first.up_to(5).points(new, points[:2]), points[:2]) and len(then.up_to(2)) == 5
    turn, shift, scale = Rotation.random(None, rng).as_matrix(), rng.normal(size=3), 1.7
    in_map = scale * points @ turn.T + shift
    expected = scale * first.points(submap, points) @ turn.T + shift
    assert np.allclose(first.seen_from(turn, shift, scale).points(submap, in_map), expected)


def prediction(submap: int, moved: Moves | None = None) -> Prediction:
    poses, ones = pose_matrix(torch.eye(3)[None], torch.ones(1, 3)), torch.ones(1, 2, 2)
    lens = torch.tensor([[[2.0, 0, 1], [0, 2, 1], [0, 0, 1]]])
    return Prediction(torch.zeros(1, 9), poses, lens, ones, ones, submap=submap, moved=moved)


def doubled(*scales: float) -> Moves:
    return replace(Moves.none(len(scales)), scale=np.array(scales))


def test_predictions_lie_where_later_ones_have_moved_them():
    said = [prediction(0), prediction(1), prediction(2, doubled(1, 2)), prediction(3, doubled(1, 3, 5))]
    assert [float(p.depth[0, 0, 0]) for p in moved_on(said)] == [1, 6, 5, 1]
    assert [float(p.world_from_camera[0, 0, 3]) for p in moved_on(said)] == [1, 6, 5, 1]


def test_a_lap_comes_to_lie_where_it_truly_is():
    """The real network on a real walk: once the lap is closed, what came before lies better."""
    frames = frames_of(LAP)
    images = images_of(frames)
    stream = StreamSession(bundled(), Config())
    said = [stream.step(images[i : i + 4], frames[0].intrinsics).to_host() for i in range(0, len(images), 4)]
    assert stream.stats().loops == sum(p.moved is not None for p in said) > 0
    true = np.stack([frame.world_from_camera for frame in frames])
    poses = (
        torch.cat([p.world_from_camera for p in some]).double().numpy() for some in (said, moved_on(said))
    )
    live, now = (turn_error(some, true) for some in poses)
    print(f"turned by {live:.2f}° as said, {now:.2f}° as moved")
    assert now < 0.8 * live


def _poses(predictions) -> np.ndarray:
    return torch.cat([p.world_from_camera for p in predictions]).double().numpy()


def test_frames_that_move_nothing_cost_a_path_nothing_of_its_submaps(monkeypatch):
    path = CameraPath()
    path.add(prediction(0))
    path.add(prediction(1, doubled(2)))
    monkeypatch.setattr(Moves, "after", None)
    path.add(prediction(1))
    assert path.world_from_camera()[:, 0, 3].tolist() == [2, 1, 1]
