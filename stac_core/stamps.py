"""Moments as text."""

from __future__ import annotations


def stamp_text(stamp_ns: int) -> str:
    """Seconds with all nine places; as a float they would lose some."""
    seconds, nanoseconds = divmod(stamp_ns, 1_000_000_000)
    return f"{seconds}.{nanoseconds:09d}"
