"""When to play what: recording time mapped to wall time, with pause and stop from other threads."""

from __future__ import annotations

import threading
import time


class Schedule:
    """Plays a recording's clock at `rate` times its speed; rate 0 never waits.

    All times are nanoseconds. One thread calls `start` and `wait_until`; any thread the rest.
    """

    def __init__(self, rate: float) -> None:
        self._rate = rate
        self._changed = threading.Condition()
        self._recording_ns = 0  # recording time when the clock was last set going or stopped
        self._wall_ns = 0  # that moment on a steady clock; 0 = not started
        self._utc_ns = 0  # and on the wall clock
        self._paused = False
        self._interrupted = False
        self._stopped = False

    def start(self, recording_ns: int) -> None:
        """Set the clock to a time of the recording; an interruption is over."""
        with self._changed:
            self._interrupted = False
            self._set(recording_ns)

    def now_ns(self) -> int:
        """The recording time of this moment, 0 before the start; with rate 0, that of the last message."""
        with self._changed:
            return self._now()

    def wall_of_ns(self, recording_ns: int) -> int:
        """The wall time (UTC) at which a recorded moment takes place; with rate 0, that of the last message.

        The same one for messages of the same moment: an image and its calibration belong together by it.
        """
        with self._changed:
            if not self._rate:
                return self._utc_ns
            return self._utc_ns + int((recording_ns - self._recording_ns) / self._rate)

    def wait_until(self, recording_ns: int) -> bool:
        """Sleep until a moment of the recording is due; False if interrupted or stopped meanwhile."""
        with self._changed:
            while not self.interrupted:
                left_s = self._seconds_until(recording_ns)
                if left_s is not None and left_s <= 0:
                    if not self._rate and recording_ns != self._recording_ns:
                        self._set(recording_ns)
                    return True
                self._changed.wait(left_s)
            return False

    def pause(self, paused: bool) -> None:
        """Hold the clock still, or let it run on from where it stood."""
        with self._changed:
            self._set(self._now())
            self._paused = paused
            self._changed.notify_all()

    def interrupt(self) -> None:
        """Make `wait_until` return False until the next `start`."""
        with self._changed:
            self._interrupted = True
            self._changed.notify_all()

    @property
    def interrupted(self) -> bool:
        """Whether `wait_until` would return False."""
        return self._interrupted or self._stopped

    def stop(self) -> None:
        """Make `wait_until` return False for ever."""
        with self._changed:
            self._stopped = True
            self._changed.notify_all()

    def _set(self, recording_ns: int) -> None:
        self._recording_ns = recording_ns
        self._wall_ns, self._utc_ns = time.monotonic_ns(), time.time_ns()

    def _now(self) -> int:
        if self._paused or not self._rate or not self._wall_ns:
            return self._recording_ns
        return self._recording_ns + int((time.monotonic_ns() - self._wall_ns) * self._rate)

    def _seconds_until(self, recording_ns: int) -> float | None:
        """Wall seconds until a moment is due; None = not before something changes."""
        if self._paused:
            return None
        if not self._rate:
            return 0.0
        return (recording_ns - self._now()) / self._rate / 1e9
