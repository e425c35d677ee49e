"""Stamps of messages ↔ whole nanoseconds."""

from __future__ import annotations

from builtin_interfaces.msg import Time

SECOND = 1_000_000_000


def stamp_nanoseconds(stamp: Time) -> int:
    return int(stamp.sec) * SECOND + int(stamp.nanosec)


def stamp_message(stamp_ns: int) -> Time:
    seconds, nanoseconds = divmod(stamp_ns, SECOND)
    return Time(sec=seconds, nanosec=nanoseconds)
