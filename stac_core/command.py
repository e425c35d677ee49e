"""How a command ends where it cannot go on."""

from __future__ import annotations

import signal
import sys
from collections.abc import Callable


def status_of(
    name: str,
    work: Callable[[], int],
    refusals: tuple[type[Exception], ...] = (ValueError, OSError),
    interrupted: str = "interrupted",
) -> int:
    """The exit status of a command's work; what stopped it is told in one line. SIGTERM counts as Ctrl-C.

    refusals: errors that tell what is wrong; any other is a fault of the program, and is raised.
    """
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        return work()
    except refusals as error:
        print(f"{name}: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print(f"{name}: {interrupted}", file=sys.stderr)
        return 130
    finally:
        signal.signal(signal.SIGTERM, before)
