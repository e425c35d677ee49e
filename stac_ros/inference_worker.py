"""One thread that owns the network's stream: it takes images and commands from a mailbox, in order."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from typing import Any

from stac_ros.mailbox import Mailbox, mailbox_room
from stac_ros.run_statistics import Statistics

logger = logging.getLogger(__name__)


class InferenceWorker:
    """Calls `process` with chunks of images on its own thread; all else that needs the stream is a command.

    Nothing can race, because nobody but this thread touches what `process` and the commands touch. What
    they raise is counted, and the thread lives on.

    chunk_wait_s: how long a chunk that is not full yet waits for its next image; 0 = not at all.
    """

    def __init__(
        self,
        process: Callable[[Sequence[Any]], None],
        chunk_size: int,
        mailbox_size: int,
        statistics: Statistics,
        chunk_wait_s: float = 0.0,
    ) -> None:
        self._process, self._chunk_size, self._statistics = process, chunk_size, statistics
        self.room = mailbox_room(mailbox_size, chunk_size)  # images that may wait
        self._mailbox = Mailbox(self.room, chunk_wait_s)
        # A daemon: a process that is interrupted before it could call `stop` must not wait for ever.
        self._thread = threading.Thread(target=self._run, name="inference", daemon=True)

    def start(self) -> None:
        self._thread.start()

    @property
    def waiting(self) -> int:
        """Images in the mailbox."""
        return len(self._mailbox)

    def offer(self, image: Any) -> None:
        """Hand over an image; returns at once."""
        self._statistics.arrived()
        if self._mailbox.put_image(image):
            self._statistics.drop("mailbox full")

    def ask(self, action: Callable[[], Any]) -> Future[Any]:
        """Call `action` on the worker's thread after all that came before; no chunk waits across it."""
        return self._mailbox.put_command(action)

    def flush(self) -> None:
        """A chunk that is not full yet waits no longer."""
        self._mailbox.put_command(lambda: None)

    def stop(self) -> None:
        """Finish the chunk at hand, forget what waits, end the thread."""
        self._mailbox.close()
        self._thread.join()

    def _run(self) -> None:
        while (taken := self._mailbox.take(self._chunk_size)) is not None:
            if isinstance(taken, tuple):
                action, future = taken
                try:
                    future.set_result(action())
                except Exception as error:
                    future.set_exception(error)
                continue
            try:
                self._process(taken)
            except Exception as error:
                logger.exception("a chunk of %d images was lost", len(taken))
                self._statistics.error("internal", repr(error), len(taken), lost_by="network")
