"""What waits for the worker: a bounded number of images, newest kept, and commands in their place."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any

Command = tuple[Callable[[], Any], "Future[Any]"]


class Mailbox:
    """A queue that never blocks those who put. Items leave in order of arrival.

    An image that finds the mailbox full pushes out the oldest image; commands are never dropped.
    """

    def __init__(self, size: int) -> None:
        self._size = size
        self._items: deque[Any] = deque()  # a tuple is a command, all else an image
        self._images = 0
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
            self._changed.notify()
            return full

    def put_command(self, action: Callable[[], Any]) -> Future[Any]:
        """Have the worker call `action` after all that came before; the future holds what it returns."""
        future: Future[Any] = Future()
        with self._changed:
            if self._closed:
                future.set_exception(RuntimeError("the node is shutting down"))
            else:
                self._items.append((action, future))
                self._changed.notify()
        return future

    def take(self, most: int) -> list[Any] | Command | None:
        """Wait for the next command, or for 1 … `most` images in a row; None when closed."""
        with self._changed:
            self._changed.wait_for(lambda: self._items or self._closed)
            if self._closed:
                return None
            if isinstance(self._items[0], tuple):
                return self._items.popleft()
            images: list[Any] = []
            while self._items and len(images) < most and not isinstance(self._items[0], tuple):
                images.append(self._items.popleft())
            self._images -= len(images)
            return images

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
