"""The flags of `stac-replay`, their defaults and limits."""

from __future__ import annotations

from dataclasses import dataclass

from stac_core.settings import check_settings, setting
from stac_ros.settings import NAMELESS_CAMERA
from stac_ros.topics import INPUT_PROFILES, NODE_NAME

START_LIMIT_S = 180.0  # until a new node listens: a large model loads for long from a slow disk


@dataclass(frozen=True)
class ReplaySettings:
    """How a recording is played."""

    topic: str = setting("", "image topic of a bag; empty = the only one")
    more_topics: str = setting("", "further topics of a bag to replay, separated by commas")
    rate: float = setting(1.0, "speed; 0 = as fast as the mapping node answers", minimum=0.0, maximum=1000.0)
    in_flight: int = setting(
        0,
        "images sent and not yet answered, with rate 0; 0 = as many as the mapping node lets wait",
        minimum=0,
        maximum=1000,
    )
    answer_limit: float = setting(
        60.0, "patience for an answer before the next image is sent, with rate 0", minimum=0.1, unit="s"
    )
    loop: bool = setting(False, "begin again at the end; recorded time jumps back")
    start_offset: float = setting(0.0, "skip this much of the recording", minimum=0.0, unit="s")
    duration: float = setting(0.0, "play this much of the recording; 0 = all", minimum=0.0, unit="s")
    clock: float = setting(0.0, "rate of /clock; 0 = none", minimum=0.0, maximum=1000.0, unit="Hz")
    wait_for_subscribers: float = setting(
        0.0,
        "wait up to this long for someone to listen to the images; 0 = begin at once",
        minimum=0.0,
        unit="s",
    )
    wait_for_nodes: str = setting(
        NODE_NAME, "the listeners that are waited for, separated by commas; empty = anyone"
    )
    use_wall_stamps: bool = setting(False, "stamp messages with the time of playing, not of recording")
    compressed: bool = setting(False, "send JPEG images (bags are sent as recorded)")
    frame_id: str = setting(NAMELESS_CAMERA, "frame of images that carry none")
    calibration: str = setting(
        "",
        "YAML file as camera_calibration writes it, sent as camera_info with every image, in place of what "
        "the source has of its own; empty = that, if anything",
    )
    image_qos: str = setting("reliable", "QoS of the images", choices=INPUT_PROFILES)

    def __post_init__(self) -> None:
        check_settings(self)
