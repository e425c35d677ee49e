"""How a command ends where it cannot go on."""

from __future__ import annotations

import signal
import sys
from collections.abc import Callable
from types import FrameType


def status_of(
    name: str,
    work: Callable[[], int],
    refusals: tuple[type[Exception], ...] = (ValueError, OSError),
    interrupted: str = "interrupted",
) -> int:
    """The exit status of a command's work; what stops it is told in one line. Closing signals interrupt it.

    refusals: errors that tell what is wrong; any other is a fault of the program, and is raised.
    """
    before = {number: signal.signal(number, _interrupt) for number in closing_signals()}
    try:
        return work()
    except refusals as error:
        print(f"{name}: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print(f"{name}: {interrupted}", file=sys.stderr)
        return 130
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def closing_signals() -> list[signal.Signals]:
    """What asks a process to end beside Ctrl-C: SIGTERM, and SIGHUP where its terminal is closed."""
    if signal.getsignal(signal.SIGHUP) is signal.SIG_IGN:  # as under nohup: to outlive its terminal
        return [signal.SIGTERM]
    return [signal.SIGTERM, signal.SIGHUP]


def _interrupt(number: int, frame: FrameType | None) -> None:
    """As Ctrl-C does."""
    if number == signal.SIGHUP:  # which both the shell and the system send
        signal.signal(number, signal.SIG_IGN)
    signal.default_int_handler(number, frame)
