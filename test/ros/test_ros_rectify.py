"""Rectified images are those of the pinhole that the calibration promises; OpenCV's projection judges."""

from __future__ import annotations

import cv2
import numpy as np
import pytest
from scipy.spatial.transform import Rotation
from sensor_msgs.msg import CameraInfo

from stac_ros.rectify import Rectifier, rectified_intrinsics

HEIGHT, WIDTH = 240, 320
K = np.array([[170.0, 0, 163], [0, 172, 118], [0, 0, 1]])
P = np.array([[150.0, 0, 158], [0, 149, 121], [0, 0, 1]])
R = Rotation.from_rotvec([0.02, -0.03, 0.01]).as_matrix()
LENSES = {
    "plumb_bob": [-0.28, 0.07, 0.002, -0.001, -0.005],
    "rational_polynomial": [0.4, -0.1, 0.001, 0.0007, 0.01, 0.72, -0.03, 0.002],
    "equidistant": [-0.05, 0.02, -0.008, 0.001],
}
SPOTS = np.array([(u, v) for v in range(20, HEIGHT - 10, 40) for u in range(20, WIDTH - 10, 40)], float)


def calibration(model: str, k=K, p=P, r=R, d=None) -> CameraInfo:
    info = CameraInfo(height=HEIGHT, width=WIDTH, distortion_model=model)
    info.d = LENSES.get(model, []) if d is None else d
    info.k, info.r = k.ravel(), np.zeros(9) if r is None else r.ravel()
    info.p = np.zeros(12) if p is None else np.column_stack([p, np.zeros(3)]).ravel()
    return info


def seen_raw(info: CameraInfo, spots: np.ndarray) -> np.ndarray:
    """Where the raw image shows [n, 2] what the rectified one shows at `spots` [n, 2]."""
    pinhole, k = rectified_intrinsics(info), info.k.reshape(3, 3)
    rotation = info.r.reshape(3, 3) if info.r.any() else np.eye(3)
    rays = np.column_stack([spots, np.ones(len(spots))]) @ np.linalg.inv(pinhole).T @ rotation
    project = cv2.fisheye.projectPoints if info.distortion_model == "equidistant" else cv2.projectPoints
    raw = project(rays[:, None], np.zeros(3), np.zeros(3), k, np.array(info.d))[0].reshape(-1, 2)
    raw[:, 0] += k[0, 1] * (raw[:, 1] - k[1, 2]) / k[1, 1]  # by definition of K; OpenCV leaves it out
    return raw


def dots(places: np.ndarray) -> np.ndarray:
    """White dots [height, width, 3] on black, small enough to stay round when they are bent."""
    v, u = np.mgrid[0:HEIGHT, 0:WIDTH]
    squares = (u - places[:, 0, None, None]) ** 2 + (v - places[:, 1, None, None]) ** 2
    return np.repeat((250 * np.exp(-squares / 2).max(axis=0))[..., None], 3, axis=2).astype(np.uint8)


def found_near(image: np.ndarray, spots: np.ndarray, reach: int = 8) -> np.ndarray:
    """The centre of brightness around each spot, [n, 2]; NaN where it is dark."""
    found = []
    for u, v in spots.astype(int):
        rows, columns = np.mgrid[v - reach : v + reach + 1, u - reach : u + reach + 1]
        weight = image[rows, columns, 0].astype(float)
        found.append([(columns * weight).sum(), (rows * weight).sum()] / np.float64(weight.sum() or np.nan))
    return np.array(found)


@pytest.mark.parametrize("model", LENSES)
@pytest.mark.parametrize(
    "others",
    [{}, {"p": None}, {"r": None}, {"k": K + np.array([[0, 9.0, 0], [0, 0, 0], [0, 0, 0]])}],
    ids=["P and R", "K in place of P", "no R", "skew"],
)
def test_what_a_lens_has_bent_lies_where_p_says(model, others):
    info = calibration(model, **others)
    raw = seen_raw(info, SPOTS)
    shown = ((raw > 8) & (raw < [WIDTH - 8, HEIGHT - 8])).all(axis=1)
    assert shown.mean() > 0.7 and np.abs(raw - SPOTS).max() > 12, "a lens worth the name"
    rectified = Rectifier().rectify(dots(raw[shown]), info)
    assert rectified.shape == (HEIGHT, WIDTH, 3) and rectified.dtype == np.uint8
    assert np.abs(found_near(rectified, SPOTS[shown]) - SPOTS[shown]).max() < 0.3


def test_what_the_lens_has_not_seen_is_black():
    wide = P * [[0.4], [0.4], [1]] + [[0, 0, 0.6 * WIDTH / 2], [0, 0, 0.6 * HEIGHT / 2], [0, 0, 0]]
    info = calibration("equidistant", p=wide)
    white = np.full((HEIGHT, WIDTH, 3), 255, np.uint8)
    rectified = Rectifier().rectify(white, info)
    corners = np.array([(2.0, 2), (WIDTH - 3, 2), (2, HEIGHT - 3), (WIDTH - 3, HEIGHT - 3)])
    raw = seen_raw(info, corners)
    assert ((raw < -1) | (raw > [WIDTH, HEIGHT])).any(axis=1).all()
    assert all((rectified[int(v), int(u)] == 0).all() for u, v in corners)
    assert (rectified[HEIGHT // 2, WIDTH // 2] == 255).all()


@pytest.mark.parametrize("model", ["", "plumb_bob"])
def test_without_distortion_pixels_stay_as_they_are(model):
    image = np.random.default_rng(1).integers(0, 256, (HEIGHT, WIDTH, 3), dtype=np.uint8)
    image.flags.writeable = False  # as that of a message may be
    info = calibration(model, p=K, r=None, d=[])
    assert np.array_equal(Rectifier().rectify(image, info), image)


def test_another_calibration_is_followed_and_the_same_one_costs_nothing(monkeypatch):
    made, make = [], cv2.initUndistortRectifyMap
    monkeypatch.setattr(cv2, "initUndistortRectifyMap", lambda *a: made.append(a) or make(*a))
    rectifier, image = Rectifier(), dots(SPOTS)
    first = rectifier.rectify(image, calibration("plumb_bob"))
    unfilled = calibration("plumb_bob")
    unfilled.p[2] = np.nan
    for info in (calibration("plumb_bob"), unfilled, unfilled):
        rectifier.rectify(image, info)
    assert len(made) == 2
    changed = calibration("plumb_bob", d=[0.1, 0.0, 0.0, 0.0, 0.0])
    assert not np.array_equal(rectifier.rectify(image, changed), first)
    assert np.array_equal(rectifier.rectify(image, calibration("plumb_bob")), first)


@pytest.mark.parametrize(
    ("info", "reason"),
    [
        (calibration("double_sphere"), "'double_sphere' .* not known: .* one of plumb_bob, rational"),
        (calibration("", d=[0.1, 0, 0, 0, 0]), "distortion_model '' is not known"),
        (calibration("equidistant", d=[0.1] * 5), r"d = .* equidistant takes 4 finite coefficients"),
        (calibration("plumb_bob", d=[0.1, np.nan, 0, 0, 0]), "plumb_bob takes 0, 4, 5, 8, 12, 14 finite"),
        (calibration("plumb_bob", r=2 * np.eye(3)), r"r = \[\[2.0, .* is no rotation"),
        (calibration("plumb_bob", k=K * [[1e-6], [1], [1]]), r"intrinsics = .* would show"),
    ],
)
def test_a_calibration_that_cannot_be_used_is_refused_by_name(info, reason):
    with pytest.raises(ValueError, match=reason):
        Rectifier().rectify(dots(SPOTS), info)
