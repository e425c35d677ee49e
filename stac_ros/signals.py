"""Being asked to end: by Ctrl-C, by SIGTERM, or by SIGHUP where the terminal is closed."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable

from stac_core.command import closing_signals


def when_asked_to_end(act: Callable[[int], object]) -> None:
    """Have the main thread call `act` with the number of each such signal."""
    for number in (signal.SIGINT, *closing_signals()):
        signal.signal(number, lambda number, frame: act(number))


def asked_to_end() -> threading.Event:
    """Set by the first such signal from now on.

    The same one again ends the process at once, but for SIGHUP, which both the shell and the system send
    where a terminal is closed.
    """
    asked = threading.Event()

    def stop(number: int) -> None:
        signal.signal(number, signal.SIG_IGN if number == signal.SIGHUP else signal.SIG_DFL)
        asked.set()

    when_asked_to_end(stop)
    return asked
