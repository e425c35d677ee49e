"""Points followed from frame to frame, and what they tell of the camera: the network's poses refined.

A network that looks at patches tells a turn to about a degree, a corner followed through the images tells it
to a tenth of that. Where in the scene the corner lies, the network's depth says; where to look for it in the
next image, its poses do. Needs the camera's true intrinsics: a wrong focal length takes shifts for turns.

Source: tracking by optical flow (Lucas and Kanade, of OpenCV) of corners (Shi and Tomasi), as in PTAM and
SVO; the motion of the network is the prior, as that of a constant speed is there.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import cv2
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from stac_core.camera_fit import Array, Landmarks, fit_camera
from stac_core.device import send
from stac_core.geometry import VALID_DEPTH, encode_pose, invert_pose
from stac_core.prediction import Prediction

Gray = NDArray[np.uint8]
Pixels = NDArray[np.float32]

DEPTH = 0.1  # standard deviation of the log of a depth that the network says
APART = 6  # pixels between two corners
CORNER = 0.005  # least quality of one, of the best in the image
WINDOW, LEVELS = 15, 2  # pixels that must look alike; times that the image is halved
THERE_AND_BACK = 1.0  # pixels by which a corner may miss itself when followed back
FARTHEST = 0.25  # of the image's width: a guess beyond is not believed
ENOUGH = 15  # landmarks that tell a camera or a length
TRUST = 0.5  # in lengths of landmarks, which drift, as against those of the network, which waver


class CameraTracker:
    """The landmarks of one stream; where there are none, poses move on as the network says."""

    def __init__(self, most: int) -> None:
        """most: landmarks that are followed at once."""
        self._most = most
        self.forget()

    def forget(self) -> None:
        """What follows is a new stream."""
        self._gray: Gray | None = None  # the last frame [H, W]
        self._forget_landmarks()
        self._pose: Array = np.eye(4)  # world_from_camera of the last frame
        self._predicted: Array = np.eye(4)  # and what the network said it was
        self._factor = 1.0  # by which lengths of the network are multiplied

    def __len__(self) -> int:
        """Landmarks that the last frame shows."""
        return len(self._landmarks)

    def refine(self, pixels: Tensor, prediction: Prediction, calibrated: bool = True) -> Prediction:
        """The next frames [S, 3, H, W], and what the network says of them, its cameras and lengths corrected.

        calibrated: the intrinsics are true; else poses move on as the network says. Waits for the device.
        """
        if not calibrated:
            if self._gray is None:
                return prediction
            self._forget_landmarks()
        grays = (255 * pixels.mean(1)).round().byte().cpu().numpy()
        depths = prediction.depth.float().cpu().numpy()
        cameras = prediction.world_from_camera, prediction.intrinsics
        poses, lenses = (tensor.double().cpu().numpy() for tensor in cameras)
        found = [self._follow(*frame, calibrated) for frame in zip(grays, depths, poses, lenses, strict=True)]
        corrections = (torch.from_numpy(np.stack(part)).float() for part in zip(*found, strict=True))
        return _corrected(prediction, *(send(part, pixels.device) for part in corrections))

    def go_on(self) -> None:
        """The network sees the last frame anew, and it lies where it lay; its lengths may be others."""
        self._predicted, self._factor = self._pose, 1.0

    def state(self) -> dict[str, Any]:
        """Everything needed to go on, as nested dicts of tensors; nothing before the first frame."""
        if self._gray is None:
            return {}
        parts = {
            "gray": self._gray,
            "seen": self._seen,
            "pose": self._pose,
            "predicted": self._predicted,
            "factor": np.float64(self._factor),
            **vars(self._landmarks),
        }
        return {name: torch.from_numpy(np.array(part)) for name, part in parts.items()}

    def restore(self, state: dict[str, Any]) -> None:
        """Go on where `state` was taken. KeyError where something is missing."""
        self.forget()
        if state:
            arrays = {name: tensor.cpu().numpy() for name, tensor in state.items()}
            self._gray, self._seen, self._factor = arrays["gray"], arrays["seen"], float(arrays["factor"])
            self._pose, self._predicted = arrays["pose"], arrays["predicted"]
            self._landmarks = Landmarks(arrays["position"], arrays["origin"], arrays["variance"])

    def _follow(
        self, gray: Gray, depth: NDArray[np.float32], predicted: Array, lens: Array, calibrated: bool
    ) -> tuple[Array, float]:
        """The next frame: its world_from_camera [4, 4], and the factor of its depth."""
        motion = np.linalg.inv(self._predicted) @ predicted
        motion[:3, 3] *= self._factor
        pose = self._pose @ motion if self._gray is not None else predicted
        if not np.isfinite(pose).all():
            self.forget()
            return predicted, 1.0
        if self._gray is not None:
            pose = self._locate(self._gray, gray, pose, lens)
            self._factor = self._factor_of(depth, pose)
        self._gray, self._pose, self._predicted = gray, pose, predicted
        if calibrated:
            self._find_more(self._factor * depth, lens)
        return pose, self._factor

    def _locate(self, last: Gray, gray: Gray, guess: Array, lens: Array) -> Array:
        """world_from_camera of the next frame; landmarks that it does not show are forgotten."""
        camera = np.linalg.inv(guess)
        expected = _project(camera, self._landmarks.position, lens)
        near = (np.abs(expected - self._seen) < FARTHEST * gray.shape[1]).all(1, keepdims=True)
        self._seen, found = _followed(last, gray, self._seen, np.where(near, expected, self._seen))
        self._keep(found)
        if len(self._landmarks) < ENOUGH:
            return guess
        fit = fit_camera(camera, self._landmarks, _directions(self._seen, lens), lens[0, 0])
        if fit.fits.sum() < ENOUGH:  # those found were found by chance, or the lens is another
            self._forget_landmarks()
            return guess
        # What does not fit stays, and counts little: found anew on what moves, it would count again.
        self._landmarks = fit.landmarks
        return np.linalg.inv(fit.camera_from_world)

    def _factor_of(self, depth: NDArray[np.float32], pose: Array) -> float:
        """Of the last frame: what brings its lengths nearer to those of the landmarks."""
        camera_from_world = np.linalg.inv(pose)
        true = self._landmarks.position @ camera_from_world[2, :3] + camera_from_world[2, 3]
        said = _at(depth, self._seen)
        valid = (said > VALID_DEPTH) & np.isfinite(said) & (true > VALID_DEPTH)
        if valid.sum() < ENOUGH:
            return self._factor
        return float(np.median(true[valid] / said[valid]) ** TRUST)

    def _find_more(self, depth: NDArray[np.float32], lens: Array) -> None:
        """New landmarks where the last frame shows corners and none is near."""
        missing = self._most - len(self._landmarks)
        if self._gray is None or missing <= 0:
            return
        free = np.full(self._gray.shape, 255, np.uint8)
        for x, y in self._seen.round().astype(int):
            cv2.circle(free, (int(x), int(y)), APART, 0, -1)
        corners = cv2.goodFeaturesToTrack(self._gray, missing, CORNER, APART, mask=free)
        if corners is None:
            return
        corners = np.asarray(corners, np.float32)[:, 0]
        z = _at(depth, corners).astype(np.float64)
        valid = (z > VALID_DEPTH) & np.isfinite(z)
        corners, z = corners[valid], z[valid]
        in_camera = np.column_stack([_directions(corners, lens), np.ones_like(z)]) * z[:, None]
        position = in_camera @ self._pose[:3, :3].T + self._pose[:3, 3]
        origin = np.broadcast_to(self._pose[:3, 3], position.shape)
        self._landmarks = self._landmarks.and_(Landmarks(position, origin, np.full(len(z), DEPTH**2)))
        self._seen = np.concatenate([self._seen, corners])

    def _forget_landmarks(self) -> None:
        self._landmarks = Landmarks.none()
        self._seen = np.empty((0, 2), np.float32)  # where the last frame shows them, pixels

    def _keep(self, chosen: NDArray[np.bool_]) -> None:
        self._landmarks, self._seen = self._landmarks[chosen], self._seen[chosen]


def _followed(last: Gray, gray: Gray, seen: Pixels, expected: Array) -> tuple[Pixels, NDArray[np.bool_]]:
    """Where the next image shows what the last one shows at `seen` [n, 2], and whether it does."""
    if not len(seen):
        return seen, np.empty(0, bool)
    there, found = _flow(last, gray, seen, expected.astype(np.float32))
    back, returned = _flow(gray, last, there, seen)
    inside = ((there >= 0) & (there <= np.array(gray.shape[::-1]) - 1)).all(1)
    same = np.linalg.norm(back - seen, axis=1) < THERE_AND_BACK
    return there, found & returned & inside & same


def _flow(last: Gray, gray: Gray, seen: Pixels, expected: Pixels) -> tuple[Pixels, NDArray[np.bool_]]:
    """Pixels [n, 2] of one image in the next, sought from where they are expected; and whether found."""
    there, found, _ = cv2.calcOpticalFlowPyrLK(
        last,
        gray,
        seen,
        expected.copy(),  # it is written to
        winSize=(WINDOW, WINDOW),
        maxLevel=LEVELS,
        flags=cv2.OPTFLOW_USE_INITIAL_FLOW,
    )
    return np.asarray(there, np.float32), np.asarray(found)[:, 0] > 0


def _project(camera_from_world: Array, points: Array, lens: Array) -> Array:
    """Pixels [n, 2] where a camera shows points [n, 3] of world; NaN for those behind it."""
    x, y, z = (points @ camera_from_world[:3, :3].T + camera_from_world[:3, 3]).T
    z = np.where(z > 0, z, np.nan)
    return np.column_stack([x / z * lens[0, 0] + lens[0, 2], y / z * lens[1, 1] + lens[1, 2]])


def _directions(pixels: Pixels, lens: Array) -> Array:
    """x / z and y / z of pixels [n, 2]."""
    return (pixels - lens[:2, 2]) / np.diag(lens)[:2]


def _at(values: NDArray[np.float32], pixels: Pixels) -> NDArray[np.float32]:
    """Values of an image [H, W] at pixels [n, 2] inside it."""
    column, row = pixels.round().astype(int).T
    return values[row, column]


def _corrected(prediction: Prediction, poses: Tensor, factors: Tensor) -> Prediction:
    """What the network said, with its cameras elsewhere [S, 4, 4] and its lengths multiplied [S]."""
    points = prediction.points
    if points is not None:
        was, scale = invert_pose(prediction.world_from_camera), factors[:, None, None, None]
        in_camera = _moved(was, points)
        points = _moved(poses, scale * in_camera)
    return replace(
        prediction,
        world_from_camera=poses,
        pose_encoding=encode_pose(poses, prediction.intrinsics, *prediction.depth.shape[-2:]),
        depth=factors[:, None, None] * prediction.depth,
        points=points,
    )


def _moved(poses: Tensor, points: Tensor) -> Tensor:
    """Points [S, H, W, 3] by a pose [S, 4, 4] for each frame."""
    rotation, shift = poses[:, None, :3, :3], poses[:, None, None, :3, 3]
    return points @ rotation.transpose(-1, -2) + shift
