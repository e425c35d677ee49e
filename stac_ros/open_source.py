"""Find out what kind of source a name means, and open it."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from stac_core.evaluation.datasets import READERS, bag, open_sequence
from stac_ros import camera_source
from stac_ros.bag_source import BagSource
from stac_ros.calibrated_source import CalibratedSource
from stac_ros.camera_source import CameraSource
from stac_ros.sequence_source import SequenceSource
from stac_ros.sources import Source
from stac_ros.topics import COMPRESSED_IMAGE


def open_source(
    name: str,
    topic: str,
    more_topics: Iterable[str],
    compressed: bool,
    frame_id: str,
    calibration: str = "",
) -> Source:
    """Open a bag, a video, a folder of images, a known dataset, `world:SEED` or `camera:0`.

    topic: the image topic of a bag with several. more_topics: topics of a bag to replay beside
    images, calibration and transforms. compressed, frame_id: how images without a bag are sent.
    calibration: a file whose calibration is sent with every image; empty = what the source has, if anything.

    Raises ValueError or OSError naming what cannot be read and what was looked for.
    """
    source = _open_source(name, topic, more_topics, compressed, frame_id)
    if not calibration:
        return source
    return CalibratedSource(source, Path(calibration), live=isinstance(source, CameraSource))


def _open_source(
    name: str, topic: str, more_topics: Iterable[str], compressed: bool, frame_id: str
) -> Source:
    path = Path(name)
    if bag.recognises(path):
        return BagSource(path, topic, more_topics)
    if topic:
        raise ValueError(f"--topic {topic!r}: {name} is not a rosbag2 recording and has no topics")
    if name.startswith(camera_source.PREFIX):
        return CameraSource(name, compressed, frame_id)
    if path.exists() and not any(reader.recognises(path) for reader in READERS.values()):
        raise ValueError(
            f"{name}: no images, no video, no rosbag2 and none of the known datasets ({', '.join(READERS)})"
        )
    return SequenceSource(open_sequence(name), compressed, frame_id)


def sends_compressed(name: str, topic: str, compressed: bool) -> bool:
    """Whether the images of a source leave compressed: those of a bag as recorded, others as asked for.

    Raises ValueError or OSError for a bag whose images cannot be found.
    """
    path = Path(name)
    if not bag.recognises(path):
        return compressed
    return BagSource(path, topic, []).image_topic == COMPRESSED_IMAGE.name
