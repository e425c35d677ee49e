"""What waits for the worker: a bounded number of images, newest kept, and commands in their place."""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future
from itertools import islice, takewhile
from typing import Any

Command = tuple[Callable[[], Any], "Future[Any]"]


def mailbox_room(size: int, chunk_size: int) -> int:
    """Images a mailbox asked to hold `size` has room for: a chunk at least, which else could never fill."""
    return max(size, chunk_size)


class Mailbox:
    """A queue that never blocks those who put. Images and commands leave in order of arrival.

    An image that finds the mailbox full pushes out the oldest image; commands are never dropped.

    patience_s: how long images wait for others to join them, counted from the newest; 0 = not at all.
    """

    def __init__(self, size: int, patience_s: float = 0.0) -> None:
        self._size, self._patience_s = size, patience_s
        self._items: deque[Any] = deque()  # a tuple is a command, all else an image
        self._images = 0
        self._newest_at = 0.0  # when the newest image came
        self._closed = False
        self._changed = threading.Condition()

    def __len__(self) -> int:
        """Images that wait."""
        return self._images

    def put_image(self, image: Any) -> bool:
        """Add an image; true if that pushed out another one (or if the mailbox is closed)."""
        with self._changed:
            if self._closed:
                return True
            full = self._images == self._size
            if full:
                oldest = next(i for i, item in enumerate(self._items) if not isinstance(item, tuple))
                del self._items[oldest]
                self._images -= 1
            self._items.append(image)
            self._images += 1
            self._newest_at = time.monotonic()
            self._changed.notify()
            return full

    def put_command(self, action: Callable[[], Any]) -> Future[Any]:
        """Have the worker call `action` after all that came before, and before any image that comes later.

        The future holds what it returns.
        """
        future: Future[Any] = Future()
        with self._changed:
            if self._closed:
                future.set_exception(RuntimeError("the node is shutting down"))
            else:
                self._items.append((action, future))
                self._changed.notify()
        return future

    def take(self, most: int) -> list[Any] | Command | None:
        """Wait for the next command, or for images in a row; None when closed.

        Of images `most`, or fewer where a command follows them or their patience is over.
        """
        with self._changed:
            while not self._closed:
                if self._items and isinstance(self._items[0], tuple):
                    return self._items.popleft()
                count = self._images_in_front(most)
                left_s = self._newest_at + self._patience_s - time.monotonic()
                followed = count < len(self._items)
                if count and (count == most or followed or left_s <= 0):
                    self._images -= count
                    return [self._items.popleft() for _ in range(count)]
                self._changed.wait(left_s if count else None)
            return None

    def close(self) -> None:
        """Let nothing in or out any more; commands that still wait fail with RuntimeError."""
        with self._changed:
            self._closed = True
            commands = [item for item in self._items if isinstance(item, tuple)]
            self._items.clear()
            self._images = 0
            self._changed.notify_all()
        for _, future in commands:
            future.set_exception(RuntimeError("the node is shutting down"))

    def _images_in_front(self, most: int) -> int:
        """How many images, up to `most`, come before the next command."""
        front = islice(self._items, most)
        return sum(1 for _ in takewhile(lambda item: not isinstance(item, tuple), front))
