"""A tree of frames over time: who is whose parent, and where, at a given stamp.

Plain numbers, no ROS: `transforms.py` fills it from /tf and /tf_static where tf2 is not installed.
Conventions are those of tf2: `add` takes parent_from_child, `lookup(target, source)` returns
target_from_source.
"""

from __future__ import annotations

import threading
from bisect import bisect_left, bisect_right
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from stac_ros.quaternions import interpolate_quaternions, pose_matrix

KEPT_S = 10.0  # of moving frames, as tf2 does


class TransformError(LookupError):
    """A transform that cannot be told; the message names the frames and the reason."""


class StampError(TransformError):
    """A transform that is known, but not at the stamp asked for."""

    def __init__(self, message: str, ahead_s: float) -> None:
        """ahead_s: how far the stamp lies after the newest time known, or before (negative) the oldest."""
        super().__init__(message)
        self.ahead_s = ahead_s


@dataclass(frozen=True)
class Sample:
    """Where a child frame was in its parent: translation [3] in metres, unit quaternion [4] xyzw."""

    parent: str
    translation: NDArray[np.float64]
    quaternion: NDArray[np.float64]

    def matrix(self) -> NDArray[np.float64]:  # parent_from_child [4, 4]
        return pose_matrix(self.translation, self.quaternion)


@dataclass
class _History:
    """One child frame: its samples in order of time, or a single one that always holds."""

    static: bool
    stamps: list[int] = field(default_factory=list)
    samples: list[Sample] = field(default_factory=list)


class TransformTree:
    """The last `seconds` of every frame; safe to fill and to ask from different threads."""

    def __init__(self, seconds: float = KEPT_S) -> None:
        self._keep_ns = int(seconds * 1e9)
        self._histories: dict[str, _History] = {}
        self._lock = threading.Lock()

    def clear(self) -> None:
        """Forget everything but the static frames."""
        with self._lock:
            self._histories = {child: h for child, h in self._histories.items() if h.static}

    def add(self, child: str, stamp_ns: int, sample: Sample, static: bool = False) -> None:
        with self._lock:
            history = self._histories.setdefault(child, _History(static))
            if static or history.static:
                self._histories[child] = _History(static, [stamp_ns], [sample])
                return
            if history.stamps and self._starts_anew(history, stamp_ns, sample):
                history = self._histories[child] = _History(False)
            _insert(history, stamp_ns, sample)
            expired = bisect_left(history.stamps, history.stamps[-1] - self._keep_ns)
            del history.stamps[:expired], history.samples[:expired]

    def _starts_anew(self, history: _History, stamp_ns: int, sample: Sample) -> bool:
        """Time jumped back (a recording began again) or the frame moved to another parent."""
        jumped_back = stamp_ns < history.stamps[-1] - self._keep_ns
        return jumped_back or sample.parent != history.samples[-1].parent

    def lookup(self, target: str, source: str, stamp_ns: int = 0) -> NDArray[np.float64]:
        """target_from_source [4, 4] at a stamp in nanoseconds; 0 = the newest time both are known.

        Raises TransformError for an unknown frame or two separate trees, StampError for a stamp outside
        of what has been received.
        """
        with self._lock:
            to_root, from_root = self._path(target), self._path(source)
            shared = [frame for frame in from_root if frame in to_root]
            if not shared:
                raise TransformError(
                    f"no transform between {target!r} and {source!r}: two separate trees, with roots "
                    f"{to_root[-1]!r} and {from_root[-1]!r}"
                )
            # Only links below the common ancestor count: what lies above may be older.
            target_links = to_root[: to_root.index(shared[0])]
            source_links = from_root[: from_root.index(shared[0])]
            stamp_ns = stamp_ns or self._newest_common_time(target_links + source_links)
            ancestor_from_target = self._compose(target_links, stamp_ns)
            ancestor_from_source = self._compose(source_links, stamp_ns)
        return np.linalg.inv(ancestor_from_target) @ ancestor_from_source

    def _path(self, frame: str) -> list[str]:
        """The frame, its parent, and so on up to the root."""
        known = set(self._histories) | {h.samples[-1].parent for h in self._histories.values()}
        if frame not in known:
            names = ", ".join(sorted(known)) or "none"
            raise TransformError(f"frame {frame!r} is unknown; frames received so far: {names}")
        path = [frame]
        while path[-1] in self._histories:
            parent = self._histories[path[-1]].samples[-1].parent
            if parent in path:
                raise TransformError(f"frames {', '.join(path)} form a circle")
            path.append(parent)
        return path

    def _newest_common_time(self, links: list[str]) -> int:
        moving = [self._histories[link] for link in links if not self._histories[link].static]
        return min((history.stamps[-1] for history in moving), default=0)

    def _compose(self, links: list[str], stamp_ns: int) -> NDArray[np.float64]:
        """ancestor_from_frame [4, 4] along the links from a frame up to, not including, its ancestor."""
        ancestor_from_frame = np.eye(4)
        for child in links:
            ancestor_from_frame = _at(child, self._histories[child], stamp_ns).matrix() @ ancestor_from_frame
        return ancestor_from_frame


def _insert(history: _History, stamp_ns: int, sample: Sample) -> None:
    place = bisect_left(history.stamps, stamp_ns)
    if place < len(history.stamps) and history.stamps[place] == stamp_ns:
        history.samples[place] = sample  # said again: the later word counts
    else:
        history.stamps.insert(place, stamp_ns)
        history.samples.insert(place, sample)


def _at(child: str, history: _History, stamp_ns: int) -> Sample:
    """The sample at a stamp, interpolated between its neighbours."""
    if history.static:
        return history.samples[0]
    stamps, samples = history.stamps, history.samples
    if not stamps[0] <= stamp_ns <= stamps[-1]:
        nearest = stamps[-1] if stamp_ns > stamps[-1] else stamps[0]
        raise StampError(
            f"frame {child!r} at {stamp_ns / 1e9:.3f} s would be extrapolated: it is known from "
            f"{stamps[0] / 1e9:.3f} s to {stamps[-1] / 1e9:.3f} s",
            (stamp_ns - nearest) / 1e9,
        )
    after = bisect_right(stamps, stamp_ns)
    before = after - 1
    earlier = samples[before]
    if stamps[before] == stamp_ns:
        return earlier
    later = samples[after]
    fraction = (stamp_ns - stamps[before]) / (stamps[after] - stamps[before])
    return Sample(
        earlier.parent,
        (1 - fraction) * earlier.translation + fraction * later.translation,
        interpolate_quaternions(earlier.quaternion, later.quaternion, fraction),
    )
