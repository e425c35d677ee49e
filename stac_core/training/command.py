"""How a command of the training ends where it cannot go on."""

from __future__ import annotations

import sys
from collections.abc import Callable


def status_of(name: str, work: Callable[[], int]) -> int:
    """The exit status of a command's work; what stopped it is told in one line."""
    try:
        return work()
    except (ValueError, OSError) as error:
        print(f"{name}: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print(f"{name}: interrupted", file=sys.stderr)
        return 130
