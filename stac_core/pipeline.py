"""Work on two threads that meet piece by piece: what comes next, and what is left to be done."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

T = TypeVar("T")


def one_ahead(chunks: Iterator[T]) -> Iterator[T]:
    """The same; each is made, on a thread of its own, while the one before it is in use."""
    with ThreadPoolExecutor(1) as thread:
        coming = thread.submit(next, chunks, None)
        while (chunk := coming.result()) is not None:
            coming = thread.submit(next, chunks, None)
            yield chunk


def with_next(chunks: Iterator[T]) -> Iterator[tuple[T, T | None]]:
    """Each together with the one after it, None where there is none; what breaks off does so in its place."""
    chunk = next(chunks, None)
    while chunk is not None:
        try:
            following = next(chunks, None)
        except Exception:
            yield chunk, None
            raise
        yield chunk, following
        chunk = following


class OneBehind:
    """Work that is done, piece after piece, on a thread of its own while its caller goes on."""

    def __enter__(self) -> OneBehind:
        self._thread, self._under_way = ThreadPoolExecutor(1), Future[None]()
        self._under_way.set_result(None)
        return self

    def do(self, work: Callable[[], None]) -> None:
        """Waits only for the piece before; raises what that has raised."""
        self._under_way.result()
        self._under_way = self._thread.submit(work)

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        """Waits for the last piece, and raises what it has raised unless the caller has."""
        self._thread.shutdown()
        if kind is None:
            self._under_way.result()
