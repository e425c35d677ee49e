"""A second thread, which owns map and outputs: it maps one chunk while the network works on the next."""

from __future__ import annotations

import logging
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor, wait
from typing import Any

from std_msgs.msg import Header

from stac_ros.mapper import Mapper
from stac_ros.predictor import Predicted
from stac_ros.run_statistics import Statistics

logger = logging.getLogger(__name__)


class MappingWorker:
    """Hands what a `Mapper` is told to a thread of its own, which does one thing after the other, in order.

    Nothing can race, because nobody but this thread touches the map and the outputs. What they raise is
    counted, and the thread lives on. Any thread may `ask` and `order`; the rest is for the one before.
    """

    def __init__(self, mapper: Mapper, statistics: Statistics) -> None:
        self._mapper, self._statistics = mapper, statistics
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="mapping")
        self._chunk = self.order(lambda: None)  # done once the latest chunk is

    def add(self, predicted: Predicted) -> None:
        self.order(lambda: self._add(predicted))

    def begin_stream(self, keep: bool) -> None:
        self.order(lambda: self._mapper.begin_stream(keep))

    def done_with(self, newest: Header) -> None:
        """Waits until the chunk before this one is mapped, so that no more than one of them is under way."""
        chunk_before, self._chunk = self._chunk, self.order(lambda: self._mapper.done_with(newest))
        wait([chunk_before])

    def ask(self, action: Callable[[], Any]) -> Future[Any]:
        """Call `action` on this thread after all that came before; RuntimeError once it has been stopped."""
        try:
            return self._thread.submit(action)
        except RuntimeError:
            refused: Future[Any] = Future()
            refused.set_exception(RuntimeError("the node is shutting down"))
            return refused

    def order(self, action: Callable[[], object]) -> Future[Any]:
        """The same, though nobody waits for an answer: a failure is told by the statistics."""

        def act() -> None:
            try:
                action()
            except Exception as error:
                self._statistics.error("command", repr(error), 0)

        return self.ask(act)

    def stop(self) -> None:
        """Finish all that came before, end the thread."""
        self._thread.shutdown()

    def _add(self, predicted: Predicted) -> None:
        images = len(predicted.views)
        try:
            self._mapper.add(predicted)
        except Exception as error:
            logger.exception("a chunk of %d images was lost", images)
            self._statistics.error("internal", repr(error), images, lost_by="map")
