"""`stac-ros`: start the mapping node and what belongs to it, where `launch` is not installed.

    stac-ros up image_topic:=/camera/image_raw viewer:=true
    stac-ros demo source:=walk.mp4
    stac-ros parameters

Arguments are those of launch/stac.launch.py, written in the same way; parameters of the mapping node may
stand among both, as cache.memory_budget:=1e9. `up` ends with the recording that it plays, unless a viewer
shows the map; the launch file goes on until Ctrl-C. `demo` maps a recording, by default a synthetic one,
and writes map, trajectory and report into a folder; it talks to nobody but its own processes, in a ROS
domain of their own (`up source:=…` plays in yours). `parameters` prints all parameters of the mapping
node, as Markdown.
"""

from __future__ import annotations

import argparse
import json
import logging
import shutil
import sys
from typing import Any

from stac_ros.arguments import ARGUMENTS, Child, children, complete, is_true
from stac_ros.domain import private_ros_environment
from stac_ros.fastdds import profile_environment
from stac_ros.processes import Processes
from stac_ros.reference import parameter_reference

logger = logging.getLogger("stac-ros")
DEMO = {
    "source": "world:3,frames=96,height=210,width=280,kind=room,motion=forward,step_min=0.01,step_max=0.03",
    "rate": "0",
    "image_qos": "reliable",  # every frame counts: nothing may be lost
    "record": "out",
    "log_level": "warn",
}


def main() -> None:
    logging.basicConfig(level=logging.INFO, format="%(name)s: %(message)s")
    parser = argparse.ArgumentParser(
        prog="stac-ros", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("action", choices=("up", "demo", "parameters"))
    parser.add_argument("values", nargs="*", metavar="name:=value")
    parser.add_argument("--show-args", action="store_true", help="list the arguments and end")
    arguments = parser.parse_args()
    if arguments.show_args:
        return _show_arguments()
    if arguments.action == "parameters":
        return print(parameter_reference())
    try:
        given = dict(_split(text) for text in arguments.values)
        demo = arguments.action == "demo"
        values = complete(given, DEMO if demo else None)
        environment = profile_environment(values["fastdds_profile"])
        if demo:
            environment |= private_ros_environment()
        if values["source"]:
            logger.info("mapping %s%s", values["source"], values["record"] and f" into {values['record']}/")
        sys.exit(run(values, environment))
    except (ValueError, OSError) as error:
        sys.exit(f"stac-ros: {error}")


def run(values: dict[str, str], environment: dict[str, str]) -> int:
    """Start what the values ask for and stay until it ends: by a signal, a failure, or a recording's end.

    With a viewer open the rest stays, for there is something to look at; but all ends with the node.
    """
    commands = {child.executable: command(child, values) for child in children(values)}
    processes = Processes(environment)
    try:
        for name, words in commands.items():
            processes.start(name, words)
        status = processes.wait("stac-replay", "stac_node")
        watched = is_true(values["viewer"]) or is_true(values["rviz"])
        status = status or processes.end("stac-record")
        if watched and not status and not processes.asked_to_end and processes.is_running("stac_node"):
            logger.info("the recording has ended; Ctrl-C ends the viewer")
            status = processes.wait("stac_node")
    finally:
        ended = processes.end_all()
    return status or ended


def command(child: Child, values: dict[str, str]) -> list[str]:
    """The command line of a child. Raises FileNotFoundError for a program that is not installed."""
    words = [sys.executable, "-m", child.module] if child.module else [_program(child.executable)]
    words += [*child.arguments, "--ros-args", "--log-level", values["log_level"]]
    if values["namespace"]:
        words += ["-r", f"__ns:=/{values['namespace'].strip('/')}"]
    for ours, theirs in child.remappings.items():
        words += ["-r", f"{ours}:={theirs}"]
    for file in child.parameter_files:
        words += ["--params-file", file]
    for name, value in child.parameters.items():
        words += ["-p", f"{name}:={_yaml(value)}"]
    return words


def _program(executable: str) -> str:
    found = shutil.which(executable)
    if not found:
        raise FileNotFoundError(f"{executable} is not installed; it comes with a ROS desktop installation")
    return found


def _yaml(value: Any) -> str:
    """JSON is YAML that keeps "1" and 1 apart; but what JSON escapes as two halves, YAML refuses."""
    return json.dumps(value, ensure_ascii=False)


def _split(text: str) -> tuple[str, str]:
    name, separator, value = text.partition(":=")
    if not separator:
        raise ValueError(f"{text!r}: expected name:=value, e.g. image_topic:=/camera/image_raw")
    return name, value


def _show_arguments() -> None:
    for argument in ARGUMENTS:
        choices = f" ({', '.join(argument.choices)})" if argument.choices else ""
        print(f"  {argument.name}:={argument.default}\n      {argument.help}{choices}")
    print("  section.name:=value\n      any parameter of the mapping node; `stac-ros parameters` lists them")


if __name__ == "__main__":
    main()
