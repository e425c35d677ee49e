"""The node's health as DiagnosticArray: input, inference, memory and map, each with a level and figures."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from builtin_interfaces.msg import Time
from diagnostic_msgs.msg import DiagnosticArray, DiagnosticStatus, KeyValue
from std_msgs.msg import Header

from stac_core import SessionStats
from stac_ros.run_statistics import Snapshot

OK, WARN, ERROR, STALE = (
    DiagnosticStatus.OK,
    DiagnosticStatus.WARN,
    DiagnosticStatus.ERROR,
    DiagnosticStatus.STALE,
)
CHUNKS_FAILED, LAST_ERROR = "chunks failed", "last error"  # keys that others look for

# Causes, by their beginning, for which images are dropped through no fault of this computer's speed.
_LEFT_OUT = ("bad image", "no odometry", "late", "duplicate", "size")


@dataclass(frozen=True)
class InputState:
    """What is known of the image topic from outside of the images."""

    topic: str
    publishers: int
    complaint: str  # of the watchdog; empty = none
    waiting: int  # images in the mailbox
    paused: bool
    searching: bool  # for the camera, in the map


@dataclass(frozen=True)
class MapState:
    """Size of the map and what its lengths mean."""

    points: int
    bytes: int
    voxel_size: float
    coarsened: bool
    points_outside: int
    poses: int
    scale: str
    intrinsics: str  # of the latest image: predicted, or camera_info


@dataclass(frozen=True)
class Facts:
    """What does not change while the node runs."""

    node: str
    network: str
    weights: str
    device: str
    dtype: str
    machine: str  # with what else figures depend on, in their last digits
    version: str
    libraries: str

    @property
    def untrained(self) -> bool:
        return self.weights.startswith("random weights")


def diagnostic_array(
    stamp: Time,
    facts: Facts,
    source: InputState,
    counts: Snapshot,
    previous: Snapshot,
    session: SessionStats,
    map_state: MapState,
) -> DiagnosticArray:
    """One status per part of the node; `previous` counts tell what is new since the last report."""
    return DiagnosticArray(
        header=Header(stamp=stamp),
        status=[
            _status(facts, "input", *_input(source, counts, previous)),
            _status(facts, "inference", *_inference(facts, counts, previous)),
            _status(facts, "memory", *_memory(session)),
            _status(facts, "map", *_map(map_state)),
        ],
    )


def failure(report: DiagnosticArray) -> str:
    """What to tell of a mapping node that has failed to map a chunk; empty for others."""
    for status in report.status:
        values = {pair.key: pair.value for pair in status.values}
        if values.get(CHUNKS_FAILED, "0") != "0":
            return f"the mapping node failed to map a chunk: {values[LAST_ERROR]}"
    return ""


Part = tuple[bytes, str, Mapping[str, Any]]


def _input(source: InputState, counts: Snapshot, previous: Snapshot) -> Part:
    if source.complaint:
        level, text = (WARN if source.publishers else STALE), source.complaint
    elif troubles := _input_troubles(source, counts, previous):
        level, text = WARN, "; ".join(troubles)
    else:
        level, text = OK, "paused" if source.paused else f"{counts.rate_hz:.1f} images/s"
    return level, text, {
        "topic": source.topic,
        "publishers": source.publishers,
        "images received": counts.received,
        "rate [Hz]": f"{counts.rate_hz:.2f}",
        "age of the last image [s]": "never" if counts.age_s is None else f"{counts.age_s:.2f}",
        "images waiting": source.waiting,
        "paused": source.paused,
        "searching": source.searching,
        **{f"dropped: {cause}": count for cause, count in sorted(counts.dropped.items())},
        **{f"events: {name}": count for name, count in sorted(counts.events.items())},
    }  # fmt: skip


def _input_troubles(source: InputState, counts: Snapshot, previous: Snapshot) -> list[str]:
    """What is wrong with the images though they arrive."""
    found = []
    if source.publishers > 1:
        found.append(
            f"{source.publishers} publishers on {source.topic}, whose images would mix: stop one, or remap "
            "`image` to the topic of one camera"
        )
    if source.searching:
        found.append("the camera has not been found in the map yet: move it to where it has been")
    if left_out := _new(counts, previous, *_LEFT_OUT):
        causes = ", ".join(f"{count} {cause}" for cause, count in left_out.items())
        found.append(f"{sum(left_out.values())} images left out since the last report: {causes}")
    return found


def _inference(facts: Facts, counts: Snapshot, previous: Snapshot) -> Part:
    steps = np.array(counts.steps_ms or [0.0])
    if counts.failing:
        level, text = ERROR, f"the last chunk failed: {counts.last_error}"
    elif facts.untrained:
        level, text = WARN, facts.weights
    else:
        level, text = OK, f"{counts.mapped - previous.mapped} images mapped since the last report"
    return level, text, {
        "images mapped": counts.mapped,
        "chunks": _chunks(counts.chunks),
        CHUNKS_FAILED: counts.failed,
        "step mean [ms]": f"{steps.mean():.1f}",
        "step p95 [ms]": f"{np.percentile(steps, 95):.1f}",
        "step max [ms]": f"{steps.max():.1f}",
        "mapping mean [ms]": f"{np.mean(counts.mapping_ms or [0.0]):.1f}",
        "network": facts.network,
        "weights": facts.weights,
        "device": facts.device,
        "precision": facts.dtype,
        "machine": facts.machine,
        "version": facts.version,
        "libraries": facts.libraries,
        LAST_ERROR: counts.last_error or "none",
        "age of the last error [s]": f"{counts.last_error_age_s:.1f}" if counts.last_error else "never",
    }  # fmt: skip


def _chunks(chunks: Mapping[int, int]) -> str:
    """How many of how many images, the longest first."""
    return (
        ", ".join(f"{count} of {images}" for images, count in sorted(chunks.items(), reverse=True)) or "none"
    )


def _memory(session: SessionStats) -> Part:
    cache, level, text = session.cache, OK, "stream memory"
    if cache.full:
        level = WARN
        text = (
            f"the limit of {cache.byte_limit} bytes is reached: {cache.coarsened_voxels} voxels have become "
            f"part of wider ones, {cache.forgotten} tokens are forgotten; raise cache.memory_budget or "
            "cache.host_budget"
        )
    return level, text, _numbers(dataclasses.asdict(session))


def _map(state: MapState) -> Part:
    if state.coarsened:
        level, text = WARN, f"the map was full: voxels are {state.voxel_size:g} now; raise map.voxel_size"
    else:
        level, text = OK, f"{state.points} points"
    return level, text, _numbers(dataclasses.asdict(state))


def _new(counts: Snapshot, previous: Snapshot, *prefixes: str) -> dict[str, int]:
    """Images dropped since the last report, by cause, for causes that begin like this."""
    new = {cause: count - previous.dropped.get(cause, 0) for cause, count in sorted(counts.dropped.items())}
    return {cause: count for cause, count in new.items() if count and cause.startswith(prefixes)}


def _numbers(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested figures by dotted names, so that whatever a memory reports shows up unasked."""
    flat: dict[str, Any] = {}
    for name, value in values.items():
        if isinstance(value, dict):
            flat |= _numbers(value, f"{prefix}{name}.")
        else:
            flat[f"{prefix}{name}"] = f"{value:.6g}" if isinstance(value, float) else value
    return flat


def _status(facts: Facts, part: str, level: bytes, text: str, values: Mapping[str, Any]) -> DiagnosticStatus:
    return DiagnosticStatus(
        level=level,
        name=f"{facts.node}: {part}",
        message=text,
        hardware_id=facts.device,
        values=[KeyValue(key=str(name), value=str(value)) for name, value in values.items()],
    )
