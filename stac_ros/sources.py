"""What a replay plays: messages in order of time. One file per kind; `open_source.py` picks it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Protocol

STATIC_TOPICS = ("/tf_static",)  # latched, and sent before everything else


@dataclass(frozen=True)
class Item:
    """One message and when it is due on the recording's clock."""

    due_ns: int
    topic: str
    payload: Any  # a message, or the bytes of a serialised one


class Source(Protocol):
    """A recording or a camera: the topics it fills and their messages."""

    image_topic: str
    types: dict[str, type[Any]]  # by topic

    def items(self) -> Iterator[Item]:
        """All messages from the beginning. Raises ValueError or OSError naming the file."""
