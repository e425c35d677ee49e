"""Give recorded messages other stamps, without knowing their types."""

from __future__ import annotations

import struct
from collections.abc import Callable
from typing import Any

from builtin_interfaces.msg import Time
from rclpy.serialization import deserialize_message
from std_msgs.msg import Header
from tf2_msgs.msg import TFMessage

from stac_ros.stamps import stamp_message, stamp_nanoseconds

NewStamp = Callable[[int], int]  # nanoseconds → nanoseconds


def restamp(payload: Any, kind: type[Any], new_stamp: NewStamp) -> Any:
    """The same message with every header stamp changed; types without a stamp as they are."""
    if kind is TFMessage:
        message = deserialize_message(payload, TFMessage)  # only bags have transforms
        for transform in message.transforms:
            transform.header = _restamped(transform.header, new_stamp)
        return message
    if not starts_with_header(kind):
        return payload
    if not isinstance(payload, bytes):
        payload.header = _restamped(payload.header, new_stamp)
        return payload
    layout = _stamp_layout(payload)
    stamp = stamp_message(new_stamp(header_stamp_ns(payload)))
    return payload[:4] + struct.pack(layout, stamp.sec, stamp.nanosec) + payload[12:]


def starts_with_header(kind: type[Any]) -> bool:
    fields = kind.get_fields_and_field_types()
    return next(iter(fields.values()), "") == "std_msgs/Header"


def header_stamp_ns(payload: Any) -> int:
    """The stamp of a message, or of its serialised bytes, whose first field is a header."""
    if not isinstance(payload, bytes):
        return stamp_nanoseconds(payload.header.stamp)
    seconds, nanoseconds = struct.unpack(_stamp_layout(payload), payload[4:12])
    return stamp_nanoseconds(Time(sec=seconds, nanosec=nanoseconds))


def _stamp_layout(payload: bytes) -> str:
    """Four bytes announce the byte order (CDR), then come seconds and nanoseconds."""
    return "<iI" if payload[1] & 1 else ">iI"


def _restamped(header: Header, new_stamp: NewStamp) -> Header:
    """A header of its own: an image and its calibration may share one."""
    return Header(stamp=stamp_message(new_stamp(stamp_nanoseconds(header.stamp))), frame_id=header.frame_id)
