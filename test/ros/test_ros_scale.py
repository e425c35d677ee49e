"""Scale from odometry against evo's alignment, and as a user has it: a recording in, a metric map out."""

from __future__ import annotations

import json
import re
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from evaluation.evaluation_judges import evo
from ros_helpers import Child, parameters_of
from scipy.spatial.transform import Rotation

from stac_core import Moves
from stac_core.worlds import WorldConfig
from stac_core.worlds.export import ExportConfig, export_world
from stac_core.worlds.export_bag import BagSettings
from stac_core.worlds.export_folder import FolderSettings
from stac_ros.odometry_scale import STEPS, OdometryScale
from stac_ros.scale import PATIENCE, StreamScale

METRES_PER_UNIT = 2.31
BASELINE = 0.5


def walk(seed: int, count: int = 200, step_m: float = 0.03) -> np.ndarray:
    """Camera positions [N, 3] in metres of a walk whose direction changes smoothly."""
    rng = np.random.default_rng(seed)
    turns = Rotation.from_rotvec(rng.normal(scale=0.15, size=(count, 3)))
    direction, heading = Rotation.identity(), []
    for turn in turns:
        direction = direction * turn
        heading.append(direction.apply([1.0, 0, 0]))
    return np.cumsum(step_m * np.array(heading), axis=0)


def poses(positions: np.ndarray) -> np.ndarray:
    found = np.tile(np.eye(4), (len(positions), 1, 1))
    found[:, :3, 3] = positions
    return found


def seen_by_network(metric: np.ndarray, noise_m: float = 0.0, seed: int = 0) -> np.ndarray:
    """The same positions in another frame and unit, with the network's error."""
    rng = np.random.default_rng(seed)
    turned = Rotation.random(None, rng).apply(metric + rng.normal(scale=noise_m, size=metric.shape))
    return turned / METRES_PER_UNIT + rng.normal(size=3)


def measure(metric: np.ndarray, own: np.ndarray) -> OdometryScale:
    scale = OdometryScale(BASELINE)
    for in_odom, in_world in zip(poses(metric), poses(own), strict=True):
        scale.add(in_odom, in_world)
    return scale


@pytest.mark.parametrize("seed", range(5))
def test_paths_of_one_shape_give_their_factor_exactly(seed):
    metric = walk(seed)
    assert measure(metric, seen_by_network(metric)).factor == pytest.approx(METRES_PER_UNIT, rel=1e-9)


def test_with_noise_it_is_as_near_as_an_alignment_of_the_same_way():
    geometry = pytest.importorskip("evo.core.geometry")
    own_errors, judged_errors = [], []
    for seed in range(30):
        metric = walk(seed)
        own = seen_by_network(metric, noise_m=0.01, seed=seed)
        way = np.linalg.norm(np.diff(metric, axis=0), axis=1).cumsum()
        used = slice(0, int(np.searchsorted(way, 1.2 * BASELINE)))
        judged = geometry.umeyama_alignment(own[used].T, metric[used].T, with_scale=True)[2]
        own_errors.append(abs(np.log(measure(metric, own).factor / METRES_PER_UNIT)))
        judged_errors.append(abs(np.log(judged / METRES_PER_UNIT)))
    assert np.mean(judged_errors) > 0.005, "the noise is felt"
    assert np.mean(own_errors) < 0.04 and np.mean(own_errors) < 2.5 * np.mean(judged_errors)


@pytest.mark.parametrize("at", range(5, 20, 2))
@pytest.mark.parametrize("jump_m", [0.2, 1.0, 30.0])
def test_one_jump_of_odometry_does_not_matter(at, jump_m):
    metric = walk(1)
    own = seen_by_network(metric)
    metric[at:] += [0.0, jump_m, 0.0]
    assert measure(metric, own).factor == pytest.approx(METRES_PER_UNIT, rel=0.03)


@pytest.mark.parametrize("at", [0, 1, 5, 9])
def test_where_drift_is_taken_back_no_step_is_measured(at):
    """The network's camera jumps by a fifth of the baseline, odometry's goes on."""
    metric = poses(np.linspace([0.0, 0, 0], [2.0, 0.5, 0], 20))
    own, scale = metric.copy(), OdometryScale(1.0)
    own[:, :3, 3] /= 2
    own[at:, :3, 3] += [-0.1, 0.2, 0.0]
    for index, (odom, world) in enumerate(zip(metric, own, strict=True)):
        if index == at:
            scale.jump()
        scale.add(odom, world)
    assert scale.factor == pytest.approx(2)


def test_standing_still_adds_nothing_however_long_and_noisy():
    rng = np.random.default_rng(0)
    metric = np.concatenate([np.zeros((1000, 3)), walk(2)])
    own = seen_by_network(metric, noise_m=0.003)
    metric += rng.normal(scale=0.003, size=metric.shape)
    standing = measure(metric[:1000], own[:1000])
    assert standing.factor is None and standing.travelled == 0
    assert str(standing) == "odometry: 0 of 0.5 m travelled"
    assert measure(metric, own).factor == pytest.approx(METRES_PER_UNIT, rel=0.05)


def test_it_tells_how_far_it_has_come():
    metric = walk(3, step_m=BASELINE / STEPS + 1e-9)
    own = seen_by_network(metric)
    assert str(measure(metric[:5], own[:5])) == "odometry: 0.2 of 0.5 m travelled"
    assert measure(metric[:STEPS], own[:STEPS]).factor is None
    assert str(measure(metric[: STEPS + 1], own[: STEPS + 1])) == "odometry, 2.31 m per unit"


def test_two_ways_that_do_not_agree_have_no_factor():
    told = measure(walk(4), walk(5, step_m=0.0) + np.random.default_rng(6).normal(size=(200, 3)))
    assert told.factor is None and re.search(r"agree to 0\.\d\d, 0\.9 is needed", str(told))
    stuck = measure(walk(4), np.zeros((200, 3)))
    assert stuck.factor is None and "agree to 0.00" in str(stuck)


def lengthened(metric: np.ndarray, factors: np.ndarray) -> np.ndarray:
    """The same way in steps that are longer by factors [N - 1]."""
    return np.vstack([metric[:1], metric[0] + np.cumsum(np.diff(metric, axis=0) * factors[:, None], axis=0)])


def factors_along(scale: StreamScale, metric: np.ndarray, own: np.ndarray) -> list[float]:
    return [scale.next(world, odom, 0) for odom, world in zip(poses(metric), poses(own), strict=True)]


def test_a_rough_first_stretch_is_put_right_by_those_that_follow():
    """By few changes: all that is mapped moves with each."""
    metric, wrong = walk(10), np.ones(199)
    wrong[: 2 * STEPS] = 1.5
    scale = OdometryScale(BASELINE)
    factors = []
    for in_odom, in_world in zip(
        poses(lengthened(metric, wrong)), poses(seen_by_network(metric)), strict=True
    ):
        scale.add(in_odom, in_world)
        factors.append(scale.factor)
    known = [factor for factor in factors if factor is not None]
    assert known[0] == pytest.approx(1.5 * METRES_PER_UNIT, rel=0.05)
    assert known[-1] == pytest.approx(METRES_PER_UNIT, rel=0.01)
    assert len(set(known)) <= 4


@pytest.mark.parametrize(
    ("change", "follows"), [(1.04, False), (1.06, True), (1 / 1.04, False), (1 / 1.06, True)]
)
def test_what_is_hardly_another_factor_moves_nothing(change, follows):
    metric = walk(11)
    scale = OdometryScale(BASELINE)
    scale.resume(np.array([[METRES_PER_UNIT, 0]]), METRES_PER_UNIT)
    for in_odom, in_world in zip(poses(change * metric), poses(seen_by_network(metric)), strict=True):
        scale.add(in_odom, in_world)
    assert len(scale.stretches) > 5
    assert scale.factor == pytest.approx(METRES_PER_UNIT * (change if follows else 1), rel=0.01)


def test_a_stream_has_one_factor_that_of_most_of_its_way_and_the_next_has_its_own():
    first, second = walk(7), walk(8)
    with parameters_of(scale__mode="odometry", frames__odom="odom") as (_, parameters):
        scale = StreamScale(parameters)
        factors = factors_along(scale, first, first / 2) + factors_along(scale, first[:90], first[:90] / 9)
        assert factors[0] == 1 and set(np.round(factors, 6)) == {1.0, 2.0}
        assert np.all(np.diff(factors) >= 0), "settled once"
        scale.begin_stream()
        assert str(scale) == "odometry: 0 of 0.5 m travelled"
        factors = factors_along(scale, second, second / 3)
        assert factors[0] == 1 and factors[-1] == pytest.approx(3)


@pytest.mark.parametrize("grow", [True, False])
def test_a_map_that_stays_as_it_is_keeps_its_lengths(grow):
    metric = walk(12)
    with parameters_of(scale__mode="odometry", frames__odom="odom", map__grow=grow) as (_, parameters):
        scale = StreamScale(parameters)
        scale.resume(np.array([[3.0, 0]]), 3.0)
        assert factors_along(scale, metric, metric / 2)[-1] == pytest.approx(2.0 if grow else 3.0)


def test_a_loop_that_closes_gives_stretches_the_factor_of_where_they_truly_lie():
    """Lengths have drifted to a third more in two of three submaps, which the loop takes back."""
    metric = walk(14)
    own = lengthened(metric / METRES_PER_UNIT, np.repeat([1.0, 1.33, 1.33], [60, 60, 79]))
    scale = OdometryScale(BASELINE)
    for index, (in_odom, in_world) in enumerate(zip(poses(metric), poses(own), strict=True)):
        scale.add(in_odom, in_world, index // 60)
    assert scale.factor == pytest.approx(METRES_PER_UNIT / 1.33, rel=0.01)
    scale.move(replace(Moves.none(3), scale=np.array([1.0, 1 / 1.33, 1 / 1.33])))
    assert scale.factor == pytest.approx(METRES_PER_UNIT, rel=0.01)
    assert scale.stretches[:, 0] == pytest.approx(METRES_PER_UNIT, rel=0.35)
    known = len(scale.stretches)
    scale.move(Moves.none(1))
    assert scale.factor == pytest.approx(METRES_PER_UNIT, rel=0.01) and len(scale.stretches) == known


def test_a_factor_goes_on_being_measured_where_it_was_saved():
    metric = walk(13)
    given = {"scale__mode": "odometry", "frames__odom": "odom"}
    with parameters_of(**given) as (_, parameters):
        before, after = StreamScale(parameters), StreamScale(parameters)
        factors_along(before, metric, metric / 2)
        after.resume(before.stretches, 2.0)
        assert factors_along(after, metric[:90], metric[:90] / 9)[-1] == 2.0, "three stretches among many"
        assert len(after.stretches) > len(before.stretches) > 5


def test_odometry_that_does_not_move_is_said_once(caplog):
    with parameters_of(scale__mode="odometry", frames__odom="camera_link") as (_, parameters):
        scale = StreamScale(parameters)
        for in_world in poses(walk(9)):
            assert scale.next(in_world, np.eye(4), 0) == 1
        assert caplog.text.count(f"no scale after {PATIENCE} images (odometry: 0 of 0.5 m travelled)") == 1
        assert "does camera_link lead to it by a transform that moves?" in caplog.text


def test_a_fixed_factor_is_doubted_with_every_new_stream(caplog):
    with parameters_of(scale__mode="fixed", scale__factor=3.0) as (_, parameters):
        scale = StreamScale(parameters)
        assert scale.next(np.eye(4), None, 0) == 3 and not caplog.text
        scale.begin_stream()
        assert caplog.text.count("scale.factor is still 3, but the unit of a new stream depends on") == 1


@pytest.fixture(scope="module")
def mapped(tmp_path_factory) -> tuple[Path, float]:
    """A recording with odometry on /tf, mapped as a user does: folder of truth.tum and out/, the factor."""
    folder = tmp_path_factory.mktemp("odometry")
    images, bag = (folder / "images", FolderSettings()), (folder / "bag", BagSettings())
    export_world(ExportConfig(seed=1, frames=24, height=126, width=168), WorldConfig(), images, bag)
    shutil.copy(folder / "images" / "groundtruth.txt", folder / "truth.tum")
    words = f"demo source:={folder}/bag record:={folder}/out odom_frame:=odom scale.mode:=odometry"
    with Child("stac_ros.starter", *words.split()) as demo:
        assert demo.wait(180) == 0, demo.output
    told = json.loads((folder / "out" / "diagnostics.json").read_text())["last"]["map"]["values"]["scale"]
    factor = re.fullmatch(r"odometry, (.*) m per unit", told)
    assert factor, told
    return folder, float(factor[1])


def test_the_recorded_path_is_metric_from_its_first_pose_on(mapped):
    """As far as the small model sees the way at all; in its own unit the same path is much shorter."""
    folder, factor = mapped
    truth, estimate = (np.loadtxt(folder / name) for name in ("truth.tum", "out/trajectory.tum"))
    assert factor > 2 and np.allclose(estimate[:, 0], truth[:, 0])
    assert np.allclose(estimate[0], truth[0], atol=1e-6), "the map begins where odometry does"
    way, true_way = (np.linalg.norm(poses[:, 1:4] - poses[0, 1:4], axis=1) for poses in (estimate, truth))
    assert way[9] == pytest.approx(true_way[9], rel=0.35), "what was mapped before the scale was known"
    assert way[-1] == pytest.approx(true_way[-1], rel=0.35)
    errors = []
    errors = []
    for scale in (1.0, 1 / factor):
        estimate[:, 1:4] *= scale
        np.savetxt(folder / "estimate.tum", estimate, "%.9f")
        errors.append(evo("evo_ape", folder, "--align")["rmse"])
    metric, own_unit = errors
    assert metric < 0.75 * own_unit
