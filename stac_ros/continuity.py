"""Which images continue a stream, which are strays to be left out, and which begin a new stream."""

from __future__ import annotations

from dataclasses import dataclass

from stac_ros.settings import InputSettings
from stac_ros.stamps import SECOND

PERSISTENT = 3  # images of one other size in a row are a camera set anew; fewer are strays

Size = tuple[int, int]  # height, width


class StrayImage(ValueError):
    """An image that neither continues the stream nor begins a new one; `cause` is for statistics."""

    def __init__(self, cause: str, message: str) -> None:
        super().__init__(message)
        self.cause = cause


@dataclass(frozen=True)
class Change:
    """What is different from an image on."""

    event: str  # for statistics
    text: str
    ends_stream: bool


class Continuity:
    """Compares each image with the one mapped before it; the first of a stream is like no other."""

    def __init__(self, settings: InputSettings) -> None:
        self._settings = settings
        self.forget()

    def forget(self) -> None:
        """What follows is a new stream."""
        self._size: Size | None = None
        self._stamp_ns = 0
        self._before_ns: int | None = None  # of the image before that one
        self._frame = ""
        self._other_size: Size | None = None
        self._others = 0  # images of that size since the last one of the stream's own

    def judge(self, size: Size, stamp_ns: int, frame: str) -> Change | None:
        """What an image would change. Raises StrayImage for one that has to be left out."""
        if self._size is None:
            return None
        if size != self._size:
            return self._judge_size(self._size, size)
        self._others = 0
        back_s = (self._stamp_ns - stamp_ns) / SECOND
        if back_s >= 0:
            return self._judge_step_back(stamp_ns, back_s)
        return self._judge_frame(frame) if frame != self._frame else None

    def accept(self, size: Size, stamp_ns: int, frame: str) -> None:
        """An image joins the stream."""
        self._before_ns = self._stamp_ns if self._size is not None else None
        self._size, self._stamp_ns, self._frame = size, stamp_ns, frame

    def _judge_size(self, old: Size, new: Size) -> Change:
        self._others = self._others + 1 if new == self._other_size else 1
        self._other_size = new
        old_text, new_text = f"{old[1]}×{old[0]}", f"{new[1]}×{new[0]}"
        if self._others < PERSISTENT:
            raise StrayImage(
                "size",
                f"an image of {new_text} among those of {old_text} is left out; {PERSISTENT} in a row begin "
                "a new stream. If this goes on, two cameras share the topic: remap `image` to that of one",
            )
        return Change("size changes", f"image size changed from {old_text} to {new_text}", ends_stream=True)

    def _judge_step_back(self, stamp_ns: int, back_s: float) -> Change:
        if not back_s:
            raise StrayImage(
                "duplicate",
                "an image has the stamp of the one mapped last and is left out; if this goes on, the topic "
                "has two publishers, or its driver stamps in too large steps",
            )
        if back_s < self._settings.late_tolerance:
            raise StrayImage(
                "late",
                f"an image is stamped {back_s:.3f} s before the one mapped last and is left out; if this "
                "goes on, the topic has two publishers: remap `image` to the topic of one camera",
            )
        if self._before_ns is not None and stamp_ns > self._before_ns:
            text = (
                f"a single image was stamped {back_s:.3f} s or more ahead of those around it: the stream "
                "goes on. If that repeats, look after the clock of the camera"
            )
            return Change("stray stamps", text, ends_stream=False)
        text = f"stamps went back by {back_s:.3f} s"
        if self._settings.time_jump == "continue":
            return Change("time jumps", f"{text}: the stream goes on, as input.time_jump says", False)
        return Change("time jumps", text, ends_stream=True)

    def _judge_frame(self, frame: str) -> Change:
        text = (
            f"frame_id of the images changed from {self._frame!r} to {frame!r} within a stream; if there "
            "are two cameras, remap `image` to the topic of one; if one, name its frame in frames.camera"
        )
        return Change("frame changes", text, ends_stream=False)
