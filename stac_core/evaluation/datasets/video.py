"""A video file; frames are decoded as they are asked for, quickest in order."""

from __future__ import annotations

from pathlib import Path

import cv2
import numpy as np

from stac_core.evaluation.datasets.sequence import FRAME_PERIOD_NS, Array, Frame

SUFFIXES = (".mp4", ".mov", ".avi", ".mkv", ".webm", ".m4v")


def recognises(path: Path) -> bool:
    return path.is_file() and path.suffix.lower() in SUFFIXES


def read(path: Path) -> VideoSequence:
    """Open a video. Raises ValueError where nothing can be decoded."""
    return VideoSequence(path)


class VideoSequence:
    """Frames of one video, stamped by its own frame rate."""

    max_depth_m = np.inf

    def __init__(self, path: Path) -> None:
        self.name = path.stem
        self._path = path
        self._capture = cv2.VideoCapture(str(path))
        self._count = int(self._capture.get(cv2.CAP_PROP_FRAME_COUNT))
        if not self._capture.isOpened() or self._count < 1:
            raise ValueError(f"{path}: cannot be decoded as a video; convert it, for example to H.264 MP4")
        rate = self._capture.get(cv2.CAP_PROP_FPS)
        self._period_ns = round(1e9 / rate) if rate > 0 else FRAME_PERIOD_NS
        self._next = 0

    def __len__(self) -> int:
        return self._count

    def frame(self, index: int) -> Frame:
        """Decode one frame. Raises ValueError where the stream ends or breaks before it."""
        if index < self._next:
            self._capture.set(cv2.CAP_PROP_POS_FRAMES, 0)
            self._next = 0
        while self._next < index and self._capture.grab():  # exact, unlike seeking
            self._next += 1
        decoded, image = self._capture.read()
        if not decoded:
            raise ValueError(
                f"{self._path}: decoding stopped at frame {self._next} of {self._count}; the file is "
                "truncated or damaged"
            )
        self._next += 1
        return Frame(np.asarray(image[:, :, ::-1].copy(), np.uint8), index * self._period_ns)

    def cloud(self) -> Array | None:
        return None
