"""Being asked to end: by Ctrl-C, by SIGTERM, or by SIGHUP where the terminal is closed."""

from __future__ import annotations

import signal
from collections.abc import Callable


def when_asked_to_end(act: Callable[[int], object]) -> None:
    """Have the main thread call `act` with the number of each such signal."""
    numbers = [signal.SIGINT, signal.SIGTERM]
    if signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN:  # as under nohup: to outlive its terminal
        numbers.append(signal.SIGHUP)
    for number in numbers:
        signal.signal(number, lambda number, frame: act(number))
