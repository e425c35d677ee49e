"""Where a camera is, from landmarks that it sees: a guess refined.

The distance of a landmark is uncertain, its direction from where it was first seen is not. The pose is the
most probable one given the guess and what is seen of the landmarks, whatever their distances; then their
distances follow. Landmarks that do not fit, because they moved or were taken for others, count little.

Source: iteratively re-weighted Gauss-Newton with Cauchy's weights (Hartley and Zisserman, appendix 6.8);
distances by a filter each, as in SVO (Forster et al. 2014).
"""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.spatial.transform import Rotation

Array = NDArray[np.floating[Any]]

PIXEL = 0.5  # standard deviation of where a landmark is seen, pixels
TURN = 0.0075  # of the guess, radians
WAY = 0.03  # of the guess, median distances of landmarks
LEAST_VARIANCE = 0.02**2  # of the log of a distance: many views alike must not make it certain
HALF = 2.0  # standard deviations by which a landmark misses where it counts half
FITS = 4.0  # standard deviations: beyond, it is another thing that is seen
STEPS = 5
LONGEST_STEP = 0.3  # of the log of a distance at once


@dataclass(frozen=True)
class Landmarks:
    """n points of the scene."""

    position: Array  # [n, 3] in world
    origin: Array  # [n, 3] the centre of the camera that saw it first
    variance: Array  # [n] of the log of the distance between the two

    @classmethod
    def none(cls) -> Landmarks:
        return cls(np.empty((0, 3)), np.empty((0, 3)), np.empty(0))

    def __len__(self) -> int:
        return len(self.position)

    def __getitem__(self, chosen: Any) -> Landmarks:
        """Those of a mask or of indices."""
        return Landmarks(*(getattr(self, field.name)[chosen] for field in fields(self)))

    def and_(self, others: Landmarks) -> Landmarks:
        """Both, in this order."""
        columns = (field.name for field in fields(self))
        return Landmarks(*(np.concatenate([getattr(self, c), getattr(others, c)]) for c in columns))


@dataclass(frozen=True)
class Fit:
    """A camera, and landmarks as they look from there."""

    camera_from_world: Array  # [4, 4]
    landmarks: Landmarks  # [n] with the distances that follow
    fits: NDArray[np.bool_]  # [n]


def fit_camera(guess: Array, landmarks: Landmarks, seen: Array, focal: float) -> Fit:
    """guess: camera_from_world [4, 4]; seen: x / z and y / z of the landmarks [n, 2]; focal: pixels."""
    pixel = PIXEL / focal
    distance = np.median(np.linalg.norm(landmarks.position @ guess[:3, :3].T + guess[:3, 3], axis=1))
    certainty = np.repeat([1 / (WAY * distance), 1 / TURN], 3) ** 2
    camera = guess
    for _ in range(STEPS):
        view = _look(camera, landmarks, seen, pixel)
        weighted = view.by_camera.swapaxes(1, 2) @ view.information  # [n, 6, 2]
        weighted *= view.weight[:, None, None]
        normal = (weighted @ view.by_camera).sum(0) + np.diag(certainty)
        downhill = (weighted @ view.error[:, :, None]).sum(0)[:, 0] + certainty * _difference(camera, guess)
        camera = _moved(camera, np.linalg.solve(normal, -downhill))
    view = _look(camera, landmarks, seen, pixel)
    return Fit(camera, _with_distances(landmarks, view, pixel), view.fits)


@dataclass(frozen=True)
class _View:
    """n landmarks from a camera, beside where they are seen."""

    error: Array  # [n, 2]
    by_camera: Array  # [n, 2, 6] its derivative by `_moved`
    by_distance: Array  # [n, 2] and by the log of the distance
    information: Array  # [n, 2, 2] inverse covariance of the error, the distance unknown
    misfit: Array  # [n] squared, in standard deviations
    in_front: NDArray[np.bool_]  # [n]

    @property
    def weight(self) -> Array:
        return self.in_front / (1 + self.misfit / HALF**2)

    @property
    def fits(self) -> NDArray[np.bool_]:
        return self.in_front & (self.misfit < FITS**2)


def _look(camera: Array, landmarks: Landmarks, seen: Array, pixel: float) -> _View:
    rotation = camera[:3, :3]
    x, y, depth = (landmarks.position @ rotation.T + camera[:3, 3]).T
    in_front = depth > 1e-3 * np.abs(np.median(depth))  # also where most are behind
    z = np.where(in_front, depth, np.inf)
    one, none = 1 / z, np.zeros_like(z)
    projection = np.array([[one, none, -x / z**2], [none, one, -y / z**2]]).transpose(2, 0, 1)
    here = np.array([[none, depth, -y], [-depth, none, x], [y, -x, none]]).transpose(2, 0, 1)  # d turn
    shift = np.broadcast_to(np.eye(3), here.shape)
    by_camera = projection @ np.concatenate([shift, here], axis=2)
    ray = (landmarks.position - landmarks.origin) @ rotation.T
    by_distance = (projection @ ray[:, :, None])[:, :, 0]
    error = np.stack([x / z, y / z], axis=1) - seen
    along = landmarks.variance / (pixel**2 + landmarks.variance * (by_distance**2).sum(1))
    unknown = by_distance[:, :, None] * by_distance[:, None, :] * along[:, None, None]
    information = (np.eye(2) - unknown) / pixel**2  # by Sherman and Morrison: it always exists
    misfit = (error[:, None, :] @ information @ error[:, :, None])[:, 0, 0]
    return _View(error, by_camera, by_distance, information, misfit, in_front)


def _with_distances(landmarks: Landmarks, view: _View, pixel: float) -> Landmarks:
    """Distances that the view makes most probable; one that fits badly says little."""
    noise = pixel**2 * np.maximum(1, view.misfit / HALF**2) / np.maximum(view.weight, 1e-12)
    variance = 1 / (1 / landmarks.variance + (view.by_distance**2).sum(1) / noise)
    step = -variance * (view.by_distance * view.error).sum(1) / noise
    grown = np.exp(step.clip(-LONGEST_STEP, LONGEST_STEP))[:, None]
    position = landmarks.origin + grown * (landmarks.position - landmarks.origin)
    return replace(landmarks, position=position, variance=np.maximum(variance, LEAST_VARIANCE))


def _moved(camera: Array, motion: Array) -> Array:
    """A camera_from_world after a small shift [3] and turn [3] in the camera's own frame."""
    step = np.eye(4)
    step[:3, :3], step[:3, 3] = Rotation.from_rotvec(motion[3:]).as_matrix(), motion[:3]
    return step @ camera


def _difference(camera: Array, guess: Array) -> Array:
    """The motion [6] that makes one of the other."""
    step = camera @ np.linalg.inv(guess)
    return np.concatenate([step[:3, 3], Rotation.from_matrix(step[:3, :3]).as_rotvec()])
