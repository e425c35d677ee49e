"""A camera from landmarks: as exact as what is seen permits, whatever does not belong, wherever world is."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import pytest
from scipy.optimize import least_squares, minimize
from scipy.spatial.transform import Rotation

from stac_core.camera_fit import LEAST_VARIANCE, PIXEL, TURN, WAY, Fit, Landmarks, fit_camera

FOCAL = 150.0  # pixels
EXACT, ROUGH = 1e-6, 0.1  # standard deviations of the log of a distance
SEEDS = range(4)


def pose(turn, shift) -> np.ndarray:
    """A turn, given as a rotation vector, then a shift, as [4, 4]."""
    matrix = np.eye(4)
    matrix[:3, :3], matrix[:3, 3] = Rotation.from_rotvec(turn).as_matrix(), shift
    return matrix


def seen_from(camera_from_world, points) -> np.ndarray:
    """x / z and y / z of points [n, 3]."""
    in_camera = points @ camera_from_world[:3, :3].T + camera_from_world[:3, 3]
    return in_camera[:, :2] / in_camera[:, 2:]


@dataclass(frozen=True)
class Scene:
    """Points seen first by a camera at the origin, then by one within the prior of where that was."""

    points: np.ndarray  # [n, 3]
    camera: np.ndarray  # camera_from_world
    landmarks: Landmarks
    seen: np.ndarray  # [n, 2]

    def fit(self, **changed) -> Fit:
        """From the first camera as a guess."""
        given = {"guess": np.eye(4), "landmarks": self.landmarks, "seen": self.seen, "focal": FOCAL}
        return fit_camera(**{**given, **changed})

    def misses(self, camera_from_world) -> float:
        """Pixels between where this camera and the true one show the points, root mean square."""
        apart = seen_from(camera_from_world, self.points) - seen_from(self.camera, self.points)
        return FOCAL * np.sqrt((apart**2).sum(1).mean())


def scene(seed: int, distances: float = ROUGH, noise: float = PIXEL, count: int = 200) -> Scene:
    """distances: how uncertain they are, and how wrong; noise: pixels."""
    draw = np.random.default_rng(seed)
    ray = np.column_stack([draw.uniform(-0.55, 0.55, count), draw.uniform(-0.4, 0.4, count), np.ones(count)])
    points = ray * draw.uniform(1.5, 6, (count, 1))
    camera = pose(draw.normal(0, 0.01, 3), draw.normal(0, 0.1, 3))
    seen = seen_from(camera, points) + draw.normal(0, noise / FOCAL, (count, 2))
    wrong = np.exp(draw.normal(0, distances, (count, 1)))
    landmarks = Landmarks(wrong * points, np.zeros_like(points), np.full(count, distances**2))
    return Scene(points, camera, landmarks, seen)


def wrong_by(landmarks: Landmarks, points: np.ndarray) -> float:
    """Median error of the log of the distances."""
    said, true = (np.linalg.norm(p - landmarks.origin, axis=1) for p in (landmarks.position, points))
    return float(np.median(np.abs(np.log(said / true))))


@pytest.mark.parametrize("seed", SEEDS)
def test_a_camera_is_as_exact_as_what_it_sees(seed):
    """200 corners of half a pixel each tell 6 unknowns to a tenth of a pixel or so."""
    exact, rough = scene(seed, EXACT), scene(seed, ROUGH)
    before = exact.misses(np.eye(4))
    found, with_rough = (
        exact.misses(exact.fit().camera_from_world),
        rough.misses(rough.fit().camera_from_world),
    )
    print(f"{before:.2f} px → {found:.3f} px, with distances wrong by 10 % {with_rough:.3f} px")
    assert found < 0.3 * PIXEL and with_rough < 1.2 * PIXEL and before > 5 * with_rough
    assert exact.fit().fits.mean() > 0.98 and rough.fit().fits.mean() > 0.98


@pytest.mark.parametrize("seed", SEEDS)
def test_a_camera_is_where_least_squares_put_it(seed):
    """The outside judge knows neither weights nor prior, which count little here."""
    here = scene(seed, EXACT)

    def misses(motion):
        return FOCAL * (seen_from(pose(motion[:3], motion[3:]), here.points) - here.seen).ravel()

    motion = least_squares(misses, np.zeros(6)).x
    judged, found = pose(motion[:3], motion[3:]), here.fit().camera_from_world
    apart = FOCAL * np.abs(seen_from(judged, here.points) - seen_from(found, here.points))
    assert apart.max() < 0.3 * PIXEL


@pytest.mark.parametrize("count", [2, 6])
def test_a_camera_is_the_most_probable_one(count):
    """Where few landmarks are seen, the guess counts as much; the outside judge seeks without derivatives."""
    here = scene(1, EXACT, count=count)
    unit = np.median(np.linalg.norm(here.points, axis=1))

    def improbability(motion):
        """motion: in standard deviations of the guess."""
        camera = pose(TURN * motion[:3], WAY * unit * motion[3:])
        missed = FOCAL / PIXEL * (seen_from(camera, here.points) - here.seen)
        return 4 * np.log1p((missed**2).sum(1) / 4).sum() + motion @ motion

    best = minimize(improbability, np.zeros(6), method="Powell", options={"xtol": 1e-8, "ftol": 1e-12})
    found = here.fit().camera_from_world
    turn, shift = Rotation.from_matrix(found[:3, :3]).as_rotvec() / TURN, found[:3, 3] / (WAY * unit)
    print(f"{best.fun:.4f}, found {improbability(np.concatenate([turn, shift])):.4f}")
    assert improbability(np.concatenate([turn, shift])) < 1.01 * best.fun + 0.01
    assert best.fun < 0.9 * improbability(np.zeros(6))


def test_without_noise_the_camera_is_found_but_for_what_the_prior_holds_back():
    here = scene(0, EXACT, noise=0.0)
    assert here.misses(here.fit().camera_from_world) < 1e-2
    true = here.fit(guess=here.camera)
    np.testing.assert_allclose(true.camera_from_world, here.camera, rtol=0, atol=1e-7)
    assert true.fits.all()


@pytest.mark.parametrize("seed", SEEDS)
def test_what_does_not_belong_is_told_and_does_no_harm(seed):
    """Three landmarks in ten seen anywhere, some by chance nearly where they belong."""
    here, draw = scene(seed), np.random.default_rng(seed)
    wrong = draw.random(len(here.seen)) < 0.3
    seen = here.seen + wrong[:, None] * draw.uniform(-0.3, 0.3, here.seen.shape)
    seen[wrong] += 0.1 * np.sign(seen[wrong] - here.seen[wrong])  # by 15 pixels at least, each way
    found = here.fit(seen=seen)
    assert here.misses(found.camera_from_world) < here.misses(here.fit().camera_from_world) + 0.7 * PIXEL
    assert found.fits[~wrong].mean() > 0.97 and found.fits[wrong].mean() < 0.03
    distance = np.linalg.norm(here.landmarks.position, axis=1)[wrong]
    grown = np.linalg.norm(found.landmarks.position, axis=1)[wrong] / distance
    assert np.median(np.abs(np.log(grown))) < 0.01  # and their distances stay


def test_what_landmarks_do_not_tell_is_as_guessed():
    """Directions alone tell neither a way's length nor anything where none is in front of the camera."""
    here = scene(1, EXACT, noise=0.1)
    centre = np.linalg.inv(here.camera)[:3, 3]
    guess = here.camera.copy()
    guess[:3, 3] = -1.2 * guess[:3, :3] @ centre  # the way was said to be a fifth longer
    lengths = []
    for variance in (EXACT**2, 1e4):
        landmarks = replace(here.landmarks, variance=np.full(len(here.seen), variance))
        found = np.linalg.inv(here.fit(guess=guess, landmarks=landmarks).camera_from_world)[:3, 3]
        lengths.append(found @ centre / (centre @ centre))
    assert lengths == [pytest.approx(1.0, abs=0.03), pytest.approx(1.2, abs=0.03)]
    behind = replace(here.landmarks, position=-here.landmarks.position)
    assert np.array_equal(here.fit(landmarks=behind).camera_from_world, np.eye(4))


@pytest.mark.parametrize("count", [1, 2, 3])
def test_very_few_landmarks_move_the_camera_by_no_more_than_the_guess_may_be_wrong(count):
    here = scene(2)
    found = here.fit(landmarks=here.landmarks[:count], seen=here.seen[:count]).camera_from_world
    turn, shift = Rotation.from_matrix(found[:3, :3]).magnitude(), np.linalg.norm(found[:3, 3])
    assert turn < 0.03 and shift < 0.3
    expected = seen_from(np.eye(4), here.landmarks.position)[:count]
    true = here.fit(landmarks=here.landmarks[:count], seen=expected)
    np.testing.assert_allclose(true.camera_from_world, np.eye(4), rtol=0, atol=1e-12)


@pytest.mark.parametrize("scale", [1e-3, 1.0, 40.0])
def test_neither_where_world_is_nor_its_unit_matters(scale):
    here, draw = scene(3), np.random.default_rng(3)
    elsewhere = pose(draw.normal(0, 2, 3), draw.normal(0, 20, 3))

    def points(old):
        return scale * (old @ elsewhere[:3, :3].T + elsewhere[:3, 3])

    def camera(old):
        new = old @ np.linalg.inv(elsewhere)
        new[:3, 3] *= scale
        return new

    old = here.landmarks
    moved = Landmarks(points(old.position), points(old.origin), old.variance)
    ours, theirs = here.fit(guess=camera(np.eye(4)), landmarks=moved), here.fit()
    unit = np.ones((4, 4))
    unit[:3, 3] = scale
    np.testing.assert_allclose(
        ours.camera_from_world / unit, camera(theirs.camera_from_world) / unit, atol=1e-9
    )
    np.testing.assert_allclose(
        ours.landmarks.position / scale, points(theirs.landmarks.position) / scale, atol=1e-9
    )
    np.testing.assert_allclose(ours.landmarks.variance, theirs.landmarks.variance, rtol=1e-9)
    assert np.array_equal(ours.fits, theirs.fits)


def test_distances_become_exact_by_views_from_elsewhere():
    here, draw = scene(0), np.random.default_rng(0)
    landmarks, errors = here.landmarks, [wrong_by(here.landmarks, here.points)]
    for step in range(1, 13):
        camera = pose(draw.normal(0, 0.05, 3), [-0.06 * step, 0, 0])
        seen = seen_from(camera, here.points) + draw.normal(0, PIXEL / FOCAL, here.seen.shape)
        guess = pose(draw.normal(0, 0.01, 3), draw.normal(0, 0.03, 3)) @ camera
        before, landmarks = landmarks, fit_camera(guess, landmarks, seen, FOCAL).landmarks
        errors.append(wrong_by(landmarks, here.points))
        assert (landmarks.variance <= before.variance).all()
        assert np.array_equal(landmarks.origin, here.landmarks.origin)
    print("distances wrong by", " ".join(f"{100 * e:.1f} %" for e in errors))
    assert errors[-1] < 0.5 * errors[0]
    assert landmarks.variance.min() == LEAST_VARIANCE  # never surer than that
    rays = (
        p / np.linalg.norm(p, axis=1, keepdims=True) for p in (landmarks.position, here.landmarks.position)
    )
    np.testing.assert_allclose(*rays, atol=1e-12)  # along the line of sight alone


@pytest.mark.parametrize("share", [0.8, 1 / 3])
def test_a_distance_grows_by_a_third_at_most_in_one_view(share):
    """A few said to be near, and known to be unsure, seen from aside without noise."""
    here = scene(0, EXACT, noise=0.0)
    near = np.arange(len(here.points)) < 10
    position = np.where(near, share, 1.0)[:, None] * here.points
    landmarks = Landmarks(position, np.zeros_like(position), np.where(near, 1.0, EXACT**2))
    camera = pose(np.zeros(3), [-0.3, 0, 0])
    found = fit_camera(camera, landmarks, seen_from(camera, here.points), FOCAL).landmarks
    shares = np.linalg.norm(found.position, axis=1) / np.linalg.norm(here.points, axis=1)
    print(shares[near])
    expected = 1.0 if share == 0.8 else share * np.exp(0.3)
    assert np.median(shares[near]) == pytest.approx(expected, rel=0.05)
    assert shares[near].max() < share * np.exp(0.3) + 1e-9
    np.testing.assert_allclose(shares[~near], 1, atol=1e-4)


def test_a_turn_tells_nothing_of_distances():
    here, draw = scene(0), np.random.default_rng(0)
    landmarks = here.landmarks
    for _ in range(12):
        camera = pose(draw.normal(0, 0.05, 3), np.zeros(3))
        seen = seen_from(camera, here.points) + draw.normal(0, PIXEL / FOCAL, here.seen.shape)
        landmarks = fit_camera(camera, landmarks, seen, FOCAL).landmarks
    changed = np.linalg.norm(landmarks.position, axis=1) / np.linalg.norm(here.landmarks.position, axis=1)
    print(f"changed by {100 * np.median(np.abs(np.log(changed))):.2f} %")
    assert np.median(np.abs(np.log(changed))) < 0.01
    assert (landmarks.variance > 0.9 * here.landmarks.variance).all()


@pytest.mark.parametrize("share", [0.3, 0.7])
def test_landmarks_behind_the_camera_do_no_harm(share):
    here = scene(2)
    behind = np.random.default_rng(2).random(len(here.seen)) < share
    sign = np.where(behind, -1, 1)[:, None]
    found = here.fit(landmarks=replace(here.landmarks, position=sign * here.landmarks.position))
    rest = here.fit(landmarks=here.landmarks[~behind], seen=here.seen[~behind])
    assert here.misses(found.camera_from_world) < here.misses(rest.camera_from_world) + 0.1 * PIXEL
    assert not found.fits[behind].any() and found.fits[~behind].mean() > 0.97
    assert np.array_equal(found.landmarks.position[behind], -here.landmarks.position[behind])


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("depth", [0.0, -1e-9, 1e-9])
def test_a_landmark_beside_the_camera_is_not_in_front_of_it_where_most_are_behind(depth):
    exact = scene(0, distances=EXACT)
    points = exact.points * [1, 1, -1]
    points[0, 2] = depth
    fit = exact.fit(landmarks=replace(exact.landmarks, position=points))
    assert np.allclose(fit.camera_from_world, np.eye(4)) and not fit.fits.any()


def test_nothing_becomes_infinite():
    """Landmarks in the camera's own place, beside it, very far, very near, and seen at the edge of sight."""
    here = scene(1, count=100)
    position, seen = here.landmarks.position.copy(), here.seen.copy()
    position[:5] = 0
    position[5:10, 2] = 0
    position[10:12] *= 1e6
    position[12:14] *= 1e-6
    seen[14:16] = 1e3
    with np.errstate(all="raise", under="ignore"):
        found = here.fit(landmarks=replace(here.landmarks, position=position), seen=seen)
    parts = found.camera_from_world, found.landmarks.position, found.landmarks.variance
    assert all(np.isfinite(part).all() for part in parts)
    rotation = found.camera_from_world[:3, :3]
    np.testing.assert_allclose(rotation @ rotation.T, np.eye(3), atol=1e-12)
    rest = here.fit(landmarks=here.landmarks[16:], seen=here.seen[16:])
    print(here.misses(found.camera_from_world), here.misses(rest.camera_from_world))
    assert (
        here.misses(found.camera_from_world) < here.misses(rest.camera_from_world) + PIXEL
        and not found.fits[:10].any()
    )


def test_landmarks_are_chosen_and_joined_in_order():
    here = scene(0, count=20).landmarks
    chosen = np.arange(20) % 3 == 0
    again = here[chosen].and_(here[~chosen]).and_(Landmarks.none())
    assert len(again) == len(here) == 20 and len(Landmarks.none()) == 0
    order = np.argsort(~chosen, kind="stable")
    assert all(
        np.array_equal(mine, theirs[order])
        for mine, theirs in zip(*map(_columns, (again, here)), strict=True)
    )


def _columns(landmarks: Landmarks) -> list[np.ndarray]:
    return [landmarks.position, landmarks.origin, landmarks.variance]
