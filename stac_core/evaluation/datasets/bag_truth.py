"""The true camera path of a bag: from TF, Odometry, PoseStamped or a TUM file beside it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from scipy.spatial.transform import Rotation, Slerp

from stac_core.evaluation.datasets.bag_file import BagFile, header_stamp, pose_matrix
from stac_core.evaluation.datasets.sequence import Array
from stac_core.evaluation.trajectory import Stamps, Trajectory, read_tum

ODOMETRY = "nav_msgs/msg/Odometry"
POSE = "geometry_msgs/msg/PoseStamped"
TF = "tf2_msgs/msg/TFMessage"


def read_truth(bag: BagFile, source: str, camera_frame: str, stamps: Stamps) -> Trajectory | None:
    """Camera poses at the given image stamps, or None where the bag holds none.

    source: "" = the first of Odometry, PoseStamped, TF; "none"; a topic; or a TUM file. Body poses
    are carried to the camera by the bag's own static transforms, where both frames are in them.
    Raises ValueError for a source that does not exist.
    """
    if source == "none":
        return None
    if source.endswith((".tum", ".txt")):
        return read_tum(Path(source))
    known = bag.all_topics()
    if source and source not in known:
        raise ValueError(f"{bag.path}: no topic {source!r}; it has {', '.join(sorted(known)) or 'none'}")
    if source and known[source] not in (ODOMETRY, POSE, TF):
        raise ValueError(
            f"{bag.path}: {source} ({known[source]}) is no camera path: {ODOMETRY}, {POSE} or {TF}"
        )
    tree = TransformTree.from_bag(bag)
    for topic in [source] if source else bag.topics(ODOMETRY) + bag.topics(POSE):
        if known[topic] in (ODOMETRY, POSE):
            return _stamped_poses(bag, topic, camera_frame, tree)
    return tree.trajectory(camera_frame, stamps)


def _stamped_poses(bag: BagFile, topic: str, camera_frame: str, tree: TransformTree) -> Trajectory:
    """Poses that were lost, as NaN or as nothing, are left out."""
    stamps, poses = [], []
    for item in bag.messages(topic):
        message = item.message
        body_frame = getattr(message, "child_frame_id", camera_frame)
        pose = pose_matrix(message.pose.pose if hasattr(message.pose, "pose") else message.pose)
        camera = tree.between(body_frame, camera_frame, header_stamp(message))
        if np.isfinite(pose).all():
            stamps.append(header_stamp(message))
            poses.append(pose @ (np.eye(4) if camera is None else camera))
    order = np.argsort(np.array(stamps, np.int64), kind="stable")
    return Trajectory(np.array(stamps, np.int64)[order], np.array(poses).reshape(-1, 4, 4)[order])


class TransformTree:
    """Frames and their parents; moving links are interpolated, static ones hold for ever."""

    def __init__(self) -> None:
        self._parents: dict[str, str] = {}
        self._links: dict[str, list[tuple[int, Array]]] = {}
        self._static: set[str] = set()

    @classmethod
    def from_bag(cls, bag: BagFile) -> TransformTree:
        tree = cls()
        for item in bag.messages(*bag.topics(TF)):
            for link in item.message.transforms:
                tree.add(link, static=item.topic.endswith("tf_static"))
        for child in tree._links:
            tree._links[child].sort(key=lambda entry: entry[0])
        return tree

    def add(self, link: Any, static: bool) -> None:
        """Take one geometry_msgs/TransformStamped, unless it is not finite."""
        child, pose = link.child_frame_id.lstrip("/"), pose_matrix(link.transform)
        if not np.isfinite(pose).all():
            return
        self._parents[child] = link.header.frame_id.lstrip("/")
        entry = (header_stamp(link), pose)
        self._links.setdefault(child, []).append(entry)
        if static:
            self._static.add(child)

    def trajectory(self, camera_frame: str, stamps: Stamps) -> Trajectory | None:
        """The camera in its topmost ancestor at the stamps that the moving links cover."""
        camera_frame = camera_frame.lstrip("/")
        chain = self._chain(camera_frame)
        if not any(child not in self._static for child in chain):
            return None
        found = [(stamp, self._from_root(chain, int(stamp))) for stamp in stamps]
        known = [(stamp, pose) for stamp, pose in found if pose is not None]
        if not known:
            return None
        return Trajectory(np.array([s for s, _ in known], np.int64), np.array([p for _, p in known]))

    def between(self, body: str, camera: str, stamp: int) -> Array | None:
        """body_from_camera where both frames hang on one tree, else None."""
        body, camera = body.lstrip("/"), camera.lstrip("/")
        body_chain, camera_chain = self._chain(body), self._chain(camera)
        shared = set(body_chain) & set(camera_chain)
        above_body = [child for child in body_chain if child not in shared]
        above_camera = [child for child in camera_chain if child not in shared]
        if self._root(body) != self._root(camera):
            return None
        top_from_body, top_from_camera = (
            self._from_root(above_body, stamp),
            self._from_root(above_camera, stamp),
        )
        if top_from_body is None or top_from_camera is None:
            return None
        return np.linalg.inv(top_from_body) @ top_from_camera

    def _chain(self, frame: str) -> list[str]:
        """The frame and its ancestors but the topmost, upwards."""
        chain: list[str] = []
        while frame in self._parents and frame not in chain:
            chain.append(frame)
            frame = self._parents[frame]
        return chain

    def _root(self, frame: str) -> str:
        chain = self._chain(frame)
        return self._parents[chain[-1]] if chain else frame

    def _from_root(self, chain: list[str], stamp: int) -> Array | None:
        pose = np.eye(4)
        for child in reversed(chain):
            link = self._at(child, stamp)
            if link is None:
                return None
            pose = pose @ link
        return pose

    def _at(self, child: str, stamp: int) -> Array | None:
        entries = self._links[child]
        if child in self._static:
            return entries[-1][1]
        times = np.array([time for time, _ in entries], np.int64)
        if not times[0] <= stamp <= times[-1]:
            return None
        after = int(np.searchsorted(times, stamp))
        if times[after] == stamp:
            return entries[after][1]
        return _interpolate(*entries[after - 1], *entries[after], stamp)


def _interpolate(before: int, first: Array, after: int, second: Array, stamp: int) -> Array:
    share = (stamp - before) / (after - before)
    turn = Slerp([0.0, 1.0], Rotation.from_matrix(np.stack([first[:3, :3], second[:3, :3]])))
    pose = np.eye(4)
    pose[:3, :3] = turn([share]).as_matrix()[0]
    pose[:3, 3] = (1 - share) * first[:3, 3] + share * second[:3, 3]
    return pose
