"""The one table of launch arguments, and the processes they ask for.

`launch/stac.launch.py` and the starter `stac-ros` both read it, so the two cannot differ. An empty
value means "not set": the node's own default holds (`stac_core.config`, `stac_ros.settings`).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from os.path import expanduser
from pathlib import Path
from typing import Any

from stac_core.config import Config
from stac_ros.listen import outside_name
from stac_ros.replay_settings import START_LIMIT_S, ReplaySettings
from stac_ros.settings import RosConfig, settings_of, unknown
from stac_ros.share import share_file
from stac_ros.topics import CAMERA_INFO, COMPRESSED_IMAGE, IMAGE, NODE_NAME, OUTPUTS, RECORDER_NAME

SWITCH = ("true", "false")
VIEWER_PORT = 8080
SETTINGS = settings_of(RosConfig, Config)
LOG_LEVELS = ("debug", "info", "warn", "error", "fatal")


@dataclass(frozen=True)
class Argument:
    """One `name:=value`; where `parameter` is named, a given value sets that parameter of the node."""

    name: str
    default: str
    help: str
    choices: tuple[str, ...] = ()
    parameter: str = ""


ARGUMENTS = (
    Argument("namespace", "", "namespace of all nodes, e.g. robot1"),
    Argument("use_sim_time", "false", "follow /clock instead of the wall clock", SWITCH),
    Argument("params_file", "", "YAML of node parameters"),
    Argument("image_topic", IMAGE.name, "camera images (raw; /compressed is appended where compressed)"),
    Argument("camera_info_topic", CAMERA_INFO.name, "the camera's calibration"),
    Argument("compressed", "", "JPEG or PNG images; of a bag as recorded", SWITCH, "input.compressed"),
    Argument("rectify", "", "raw images: remove lens distortion by camera_info", SWITCH, "input.rectify"),
    Argument("image_qos", "", "QoS of the image subscription", parameter="input.image_qos"),
    Argument("map_frame", "", "the fixed frame", parameter="frames.map"),
    Argument("odom_frame", "", "odometry frame, where there is one", parameter="frames.odom"),
    Argument("camera_frame", "", "optical frame; empty = as the images say", parameter="frames.camera"),
    Argument("publish_tf", "", "publish transforms", SWITCH, "frames.publish_tf"),
    Argument("model", "", "backbone", parameter="model.name"),
    Argument("checkpoint", "", "weights: file or folder", parameter="model.checkpoint"),
    Argument("device", "", "auto, cpu, cuda, cuda:1, ...", parameter="model.device"),
    Argument("cache_mode", "", "how the key/value cache is bounded", parameter="cache.mode"),
    Argument("map_directory", "", "where ~/save_map and autosave write", parameter="map.directory"),
    Argument("load_map", "", "go on with this folder of ~/save_map or autosave", parameter="map.load"),
    Argument("source", "", "play this: rosbag2, video, folder of images, dataset, world:SEED or camera:0"),
    Argument("topic", "", "image topic of a bag with several"),
    Argument("calibration", "", "YAML of camera_calibration, sent as camera_info with the source's images"),
    Argument("rate", str(ReplaySettings.rate), "speed of the replay; 0 = as fast as the node answers"),
    Argument("loop", "false", "replay for ever", SWITCH),
    Argument("record", "", "write map, trajectory, depth and a report into this folder"),
    Argument("rviz", "false", "open RViz", SWITCH),
    Argument("rviz_config", "", "RViz configuration; empty = rviz/stac.rviz"),
    Argument("viewer", "false", "serve the web viewer on this computer", SWITCH),
    Argument("viewer_port", str(VIEWER_PORT), "port of the web viewer"),
    Argument("fastdds_profile", "auto", "Fast DDS profile: auto = config/fastdds.xml, none, or a file"),
    Argument("log_level", "info", "least severe message shown", LOG_LEVELS),
)
# Files and folders: ~ is the home directory, which no shell says in name:=~/value.
_PATHS = (
    "params_file", "checkpoint", "map_directory", "load_map", "source", "calibration", "record",
    "rviz_config", "fastdds_profile",
)  # fmt: skip


@dataclass(frozen=True)
class Child:
    """One process. As a ROS node it takes parameters and remappings beside its own arguments."""

    executable: str  # in lib/<package> and on the command line
    module: str = ""  # the Python module behind it; empty = not ours
    package: str = "stac_ros"
    arguments: list[str] = field(default_factory=list)
    parameter_files: list[str] = field(default_factory=list)
    parameters: dict[str, Any] = field(default_factory=dict)
    remappings: dict[str, str] = field(default_factory=dict)


def complete(given: Mapping[str, str], usual: Mapping[str, str] | None = None) -> dict[str, str]:
    """All arguments, the given ones over the defaults, and the parameters given as section.field.

    usual: arguments whose default is another one.

    A parameter that has an argument of its own is found under that. Raises ValueError naming an argument or
    a parameter that does not exist, a value that is no choice, or one thing given twice.
    """
    known = {argument.name: argument for argument in ARGUMENTS}
    own_names = {argument.parameter: argument.name for argument in ARGUMENTS if argument.parameter}
    found: dict[str, str] = {}
    for name, value in given.items():
        own_name = own_names.get(name, name)
        if own_name in found:
            raise ValueError(f"{name}:={value}: {own_name} says the same; give one of them")
        if own_name in known:
            _check_choice(name, value, known[own_name].choices)
        elif "." in name and name not in SETTINGS:
            raise ValueError(f"no parameter {unknown(name, SETTINGS)}; `stac-ros parameters` lists them")
        elif name not in SETTINGS:
            raise ValueError(f"no argument {unknown(name, known)}; arguments: {', '.join(known)}")
        found[own_name] = expanduser(value) if own_name in _PATHS else value
    return {name: argument.default for name, argument in known.items()} | dict(usual or {}) | found


def children(values: Mapping[str, str]) -> list[Child]:
    """The processes that complete argument values ask for, in the order of starting.

    Raises ValueError or OSError for a bag whose images cannot be found, and for a calibration of nothing.
    """
    if values["calibration"] and not values["source"]:
        raise ValueError(
            f"calibration:={values['calibration']}: is sent with the images of a source, and none is named; "
            "a camera's driver sends its own, see its camera_info_url"
        )
    values = _with_kind_of_images(values)
    wanted = [_mapping_node(values)]
    if values["record"]:
        wanted.append(_listener("stac-record", "stac_ros.recorder", [values["record"]], values))
    if is_true(values["viewer"]):
        arguments = ["--port", values["viewer_port"]]
        wanted.append(_listener("stac-view", "stac_ros.viewer", arguments, values))
    if is_true(values["rviz"]):
        wanted.append(_rviz(values))
    if values["source"]:
        wanted.append(_replay(values))
    return wanted


def is_true(text: str) -> bool:
    return text.lower() == "true"


def _check_choice(name: str, value: str, choices: tuple[str, ...]) -> None:
    if value and choices and value.lower() not in choices:
        raise ValueError(f"{name}:={value}: choose one of {', '.join(choices)}")


def _typed(name: str, text: str) -> Any:
    """The value of a parameter, of the type of its default. Raises ValueError where it is none."""
    kind: type[Any] = type(SETTINGS[name].default)
    try:
        if kind is bool:
            return {"true": True, "false": False}[text.lower()]
        return int(float(text)) if kind is int and float(text).is_integer() else kind(text)
    except (ValueError, KeyError):
        raise ValueError(f"{name}:={text}: expected {kind.__name__}") from None


def _with_kind_of_images(values: Mapping[str, str]) -> Mapping[str, str]:
    """What is played decides it, and the node listens accordingly: a bag is sent as recorded."""
    if not values["source"]:
        return values
    from stac_ros.open_source import sends_compressed  # needs rosbags, which a live camera does not

    compressed = sends_compressed(values["source"], values["topic"], is_true(values["compressed"]))
    return {**values, "compressed": str(compressed).lower()}


def _mapping_node(values: Mapping[str, str]) -> Child:
    given: dict[str, Any] = {
        argument.parameter: _typed(argument.parameter, text)
        for argument in ARGUMENTS
        if argument.parameter and (text := values[argument.name])
    }
    if _sends_as_answered(values):
        given["worker.chunk_wait"] = ReplaySettings().answer_limit
    given |= {name: _typed(name, text) for name, text in values.items() if name in SETTINGS}
    return Child(
        "stac_node",
        "stac_ros.mapping_node",
        parameter_files=[values["params_file"]] if values["params_file"] else [],
        parameters=given | _sim_time(values),
        remappings=_remappings(values),
    )


def _sends_as_answered(values: Mapping[str, str]) -> bool:
    """Whether a source is played as fast as the node answers, so that a chunk is worth waiting for."""
    try:
        return bool(values["source"]) and float(values["rate"]) == 0
    except ValueError:  # stac-replay will say so
        return False


def _listener(executable: str, module: str, arguments: list[str], values: Mapping[str, str]) -> Child:
    return Child(
        executable, module, arguments=arguments, parameters=_sim_time(values), remappings=_remappings(values)
    )


def _rviz(values: Mapping[str, str]) -> Child:
    """Its configuration holds absolute names; they follow the namespace, the image topic, the map's frame."""
    config = values["rviz_config"] or str(share_file("rviz/stac.rviz"))
    wanted = {outside_name(one): outside_name(one) for one in OUTPUTS if one.name.startswith("~/")}
    wanted |= _image_topics(values)
    inside = Path("/", values["namespace"].strip("/"))  # an absolute name stays as it is
    remappings = {f"/{ours}": str(inside / theirs) for ours, theirs in wanted.items()}
    return Child(
        "rviz2",
        package="rviz2",
        arguments=["-d", config, *(["-f", values["map_frame"]] if values["map_frame"] else [])],
        parameters=_sim_time(values),
        remappings={ours: theirs for ours, theirs in remappings.items() if ours != theirs},
    )


def _replay(values: Mapping[str, str]) -> Child:
    """It makes the time of the others, so it follows the wall clock itself."""
    arguments = [values["source"], "--rate", values["rate"], "--wait-for-subscribers", f"{START_LIMIT_S:g}"]
    listeners = [NODE_NAME, *([RECORDER_NAME] if values["record"] else [])]
    arguments += ["--wait-for-nodes", ",".join(listeners)]
    for name in ("topic", "calibration"):
        arguments += [f"--{name}", values[name]] if values[name] else []
    arguments += ["--clock", "100"] if is_true(values["use_sim_time"]) else []
    arguments += [f"--{switch}" for switch in ("loop", "compressed") if is_true(values[switch])]
    return Child("stac-replay", "stac_ros.replay", arguments=arguments, remappings=_remappings(values))


def _remappings(values: Mapping[str, str]) -> dict[str, str]:
    wanted = {**_image_topics(values), CAMERA_INFO.name: values["camera_info_topic"]}
    return {ours: theirs for ours, theirs in wanted.items() if ours != theirs}


def _image_topics(values: Mapping[str, str]) -> dict[str, str]:
    """Our names of the images, raw and compressed, and theirs."""
    image = values["image_topic"]
    return {IMAGE.name: image, COMPRESSED_IMAGE.name: f"{image}/compressed"}


def _sim_time(values: Mapping[str, str]) -> dict[str, Any]:
    return {"use_sim_time": True} if is_true(values["use_sim_time"]) else {}
