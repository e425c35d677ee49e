"""What happened so far, counted where it happens and read by diagnostics."""

from __future__ import annotations

import logging
import threading
import time
from collections import Counter, deque
from dataclasses import dataclass
from typing import Literal

logger = logging.getLogger(__name__)
_STEPS = 200  # durations of chunks kept for mean, 95 % and maximum
_ARRIVALS = 50  # arrivals kept for the rate

Stage = Literal["network", "map"]


@dataclass(frozen=True)
class Snapshot:
    """The counts at one moment."""

    received: int
    rate_hz: float
    age_s: float | None  # since the last image; None = never
    mapped: int
    dropped: dict[str, int]  # images by cause
    events: dict[str, int]
    chunks: dict[int, int]  # mapped so far, by their number of images
    steps_ms: list[float]  # of the latest chunks through the network, until they are on the host
    mapping_ms: list[float]  # of the latest chunks, from predictions to what is published
    failed: int  # chunks that could not be mapped
    failing: bool  # the last chunk was one of them
    last_error: str
    last_error_age_s: float


class Statistics:
    """Counters shared by the threads of the node; every method is short and safe to call from any."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._arrivals: deque[float] = deque(maxlen=_ARRIVALS)
        self._steps_ms: deque[float] = deque(maxlen=_STEPS)
        self._mapping_ms: deque[float] = deque(maxlen=_STEPS)
        self._chunks: Counter[int] = Counter()
        self._dropped: Counter[str] = Counter()
        self._events: Counter[str] = Counter()
        self._logged: set[str] = set()
        self._received = self._mapped = self._failed = 0
        self._failing: set[Stage] = set()  # those that lost the last chunk they had
        self._last_error, self._last_error_at = "", 0.0

    def arrived(self) -> None:
        """An image was received."""
        with self._lock:
            self._received += 1
            self._arrivals.append(time.monotonic())

    def predicted(self, seconds: float) -> None:
        """A chunk went through the network."""
        with self._lock:
            self._steps_ms.append(1e3 * seconds)
        self.works("network")

    def works(self, stage: Stage) -> None:
        """Nothing is wrong with it any more, though a chunk may not have come out of it."""
        with self._lock:
            self._failing.discard(stage)

    def mapped(self, images: int, seconds: float) -> None:
        """A chunk was mapped."""
        with self._lock:
            self._mapped += images
            self._chunks[images] += 1
            self._mapping_ms.append(1e3 * seconds)
            self._failing.discard("map")

    def event(self, name: str, text: str = "") -> None:
        """Something noteworthy happened; its first text is logged."""
        with self._lock:
            self._events[name] += 1
        if text:
            self._log_once(logging.WARNING, name, text)

    def drop(self, cause: str, images: int = 1, text: str = "") -> None:
        """Images were left out for a reason that is no error; the first text of a cause is logged."""
        with self._lock:
            self._dropped[cause] += images
        if text:
            self._log_once(logging.WARNING, cause, text)

    def error(self, cause: str, text: str, images: int, lost_by: Stage | None = None) -> None:
        """Something went wrong: lost images are counted, and the first error of a cause is logged.

        lost_by: who had the chunk that it has cost.
        """
        with self._lock:
            if images:
                self._dropped[cause] += images
            self._last_error, self._last_error_at = f"{cause}: {text}", time.monotonic()
            if lost_by:
                self._failed += 1
                self._failing.add(lost_by)
        self._log_once(logging.ERROR, cause, text)

    def log_again(self) -> None:
        """Forget what has been logged: a new stream deserves to hear it once more."""
        with self._lock:
            self._logged.clear()

    def snapshot(self) -> Snapshot:
        with self._lock:
            now = time.monotonic()
            return Snapshot(
                received=self._received,
                rate_hz=self._rate(now),
                age_s=now - self._arrivals[-1] if self._arrivals else None,
                mapped=self._mapped,
                dropped=dict(self._dropped),
                events=dict(self._events),
                chunks=dict(self._chunks),
                steps_ms=list(self._steps_ms),
                mapping_ms=list(self._mapping_ms),
                failed=self._failed,
                failing=bool(self._failing),
                last_error=self._last_error,
                last_error_age_s=now - self._last_error_at,
            )

    def _log_once(self, level: int, cause: str, text: str) -> None:
        with self._lock:
            known = cause in self._logged
            self._logged.add(cause)
        if not known:
            logger.log(level, "%s: %s (counted from now on, see /diagnostics)", cause, text)

    def _rate(self, now: float) -> float:
        """Images per second over the latest arrivals; falls towards 0 when they cease."""
        if len(self._arrivals) < 2:
            return 0.0
        seconds = max(self._arrivals[-1], now - self._typical_gap()) - self._arrivals[0]
        return (len(self._arrivals) - 1) / max(seconds, 1e-6)

    def _typical_gap(self) -> float:
        return (self._arrivals[-1] - self._arrivals[0]) / (len(self._arrivals) - 1)
