"""How far a listener has come with what was sent to it, told by the stamps of its answers."""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable


class Progress:
    """Stamps in flight. An answer to one stamp also answers all sent before it.

    interrupted: whether nobody is to wait for answers, asked when one comes and at `wake`.
    remembered: so many of the newest count; None = all.
    """

    def __init__(self, interrupted: Callable[[], bool], remembered: int | None = None) -> None:
        self._interrupted = interrupted
        self._in_flight: deque[int] = deque(maxlen=remembered)
        self._changed = threading.Condition()

    def sent(self, stamp_ns: int) -> None:
        with self._changed:
            self._in_flight.append(stamp_ns)

    def answered(self, stamp_ns: int) -> None:
        with self._changed:
            while stamp_ns in self._in_flight:  # again where several images bear it
                self._in_flight.popleft()
            self._changed.notify_all()

    def wake(self) -> None:
        """Let all waiting end, where it is interrupted by now."""
        with self._changed:
            self._changed.notify_all()

    def wait_for_room(self, most_in_flight: int, limit_s: float) -> bool:
        """Wait until one more may be sent; False after `limit_s` without any answer."""
        return self._wait(most_in_flight - 1, limit_s)

    def wait_for_all(self, limit_s: float) -> bool:
        """Wait until everything is answered; False after `limit_s` without any answer."""
        return self._wait(0, limit_s)

    def forget_oldest(self) -> None:
        """Give one up, so that a lost message does not stop everything."""
        with self._changed:
            if self._in_flight:
                self._in_flight.popleft()

    def _wait(self, most: int, limit_s: float) -> bool:
        with self._changed:
            seen, limit = len(self._in_flight), time.monotonic() + limit_s
            while len(self._in_flight) > most and not self._interrupted():
                if len(self._in_flight) != seen:  # an answer came: the patience starts anew
                    seen, limit = len(self._in_flight), time.monotonic() + limit_s
                if time.monotonic() >= limit:
                    return False
                self._changed.wait(limit - time.monotonic())
            return True
