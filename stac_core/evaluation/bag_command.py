"""`stac-eval bag`: replay a bag to the real node in its own process, record it, judge the recording."""

from __future__ import annotations

import argparse
import json
import logging
import math
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from stac_core.checkpoint import CheckpointError, describe_weights
from stac_core.config import require_stream
from stac_core.evaluation.bag_pictures import draw_pictures
from stac_core.evaluation.bag_report import QUALITY, BagReport, judge_bag
from stac_core.evaluation.bag_result import BagResult
from stac_core.evaluation.datasets import absolute_source, bag
from stac_core.evaluation.datasets.bag import BagOptions, BagSequence
from stac_core.evaluation.depth_metrics import DEPTH_ALIGNMENTS
from stac_core.evaluation.flags import (
    Overrides,
    add_config_flags,
    configure,
    describe,
    given_flags,
    mode_name,
    sweep,
)
from stac_core.evaluation.report_html import to_html
from stac_core.evaluation.results import ResultTable, Row, digest, in_one_line
from stac_core.evaluation.scene_flags import TOPIC_FLAGS, add_flags
from stac_core.evaluation.score import ReconOptions
from stac_core.evaluation.trajectory_metrics import POSE_ALIGNMENTS
from stac_core.files import write_whole
from stac_core.version import version

logger = logging.getLogger(__name__)
RECORDER = "stac_ros.bag_evaluation"  # started by name: the core runs without ROS
_INTERRUPTED = 130  # its exit status after a signal
_LONGEST_NAME = 200  # bytes of a folder's name; file systems allow 255


def add_parser(tasks: Any) -> None:
    """Add the subcommand to `stac-eval`."""
    text = "a bag through the real mapping node: errors, latency, memory, in one page"
    parser = tasks.add_parser("bag", help=text, description=text)
    add = parser.add_argument
    add("bag", type=Path, help="rosbag2 folder, .mcap or .db3")
    add_flags(parser, TOPIC_FLAGS)
    add("--rate", type=float, default=0.0, help="1 = as recorded; 0 = as fast as the node answers (default)")
    add(
        "--outside_player",
        action="store_true",
        help="start node and recorder, and wait until you play the bag yourself (ros2 bag play)",
    )
    add("--result", type=Path, help="judge this recording of the node's topics; start nothing")
    add("--output_dir", type=Path, default=Path("out/bag"))
    add("--model_name", default="", help="name of the rows (default: the backbone's)")
    add("--align", default="sim3", choices=POSE_ALIGNMENTS)
    add("--depth_align", default="scale", choices=DEPTH_ALIGNMENTS)
    add("--sweep", nargs="+", default=[], metavar="SETTING=A,B", help="one replay per combination")
    add("--node_params", nargs="+", default=[], metavar="NAME:=VALUE", help="further parameters of the node")
    add("--limit_s", type=float, default=120.0, help="longest time to wait for the node's next answer")
    add_config_flags(parser)
    parser.set_defaults(command=run)


def topic_options(arguments: argparse.Namespace) -> BagOptions:
    return BagOptions(arguments.topic, arguments.depth_topic, arguments.truth)


def run(arguments: argparse.Namespace) -> int:
    """Every combination of settings; 0 where all replays ended well and could be judged."""
    sequence = bag.read(arguments.bag, topic_options(arguments))
    sequence.frame(0)  # an encoding that cannot be decoded is told before a node starts
    if not 0 <= arguments.rate < math.inf:
        raise ValueError(f"--rate {arguments.rate:g}: must be positive, or 0 for as fast as the node answers")
    if not 0 < arguments.limit_s < math.inf:
        raise ValueError(f"--limit_s {arguments.limit_s:g}: must be positive")
    settings = sweep(arguments.sweep, given_flags(arguments))
    if arguments.result and len(settings) > 1:
        raise ValueError("--result is the answer to one setting; leave --sweep out")
    for overrides in settings:
        require_stream(configure(overrides))
    table = ResultTable(arguments.output_dir)
    failures, rows = 0, []
    for overrides in settings:
        replayed, problems, row = _run_one(arguments, sequence, table, overrides)
        rows += [row] if row else []
        for problem in problems:
            print(
                f"stac-eval bag: {sequence.name} [{_settings(arguments, overrides)}]: {problem}",
                file=sys.stderr,
            )
        failures += bool(problems)
        if replayed == _INTERRUPTED:
            break
    for row in rows:
        print(in_one_line(row))
    return _INTERRUPTED if replayed == _INTERRUPTED else int(bool(failures))


def _run_one(
    arguments: argparse.Namespace, sequence: BagSequence, table: ResultTable, overrides: Overrides
) -> tuple[int, list[str], Row | None]:
    """The exit status of the replay, what the user must know, and the figures, where there are any."""
    topics = topic_options(arguments).told()
    measured = [f"pose={arguments.align} depth={arguments.depth_align}", _player(arguments), *topics]
    key: Row = {
        "task": "bag",
        "dataset": "bag",
        "scene": sequence.name,
        "source": absolute_source(arguments.bag),
        "model_name": arguments.model_name or configure(overrides).model.name,
        "settings": _settings(arguments, overrides),
        "measured": " ".join(measured),
    }
    if known := _known(arguments, table, key, overrides):
        logger.info("%s [%s]: already in %s", sequence.name, key["settings"], table.folder)
        return 0, [], known
    folder = arguments.output_dir / _folder_name(key, topics, _player(arguments))
    recording = arguments.result or folder / "result"
    status = 0 if arguments.result else _replay(arguments, sequence.topic, overrides, recording)
    problems = [f"the replay ended with status {status}, see above"] if status else []
    try:
        result = BagResult(recording, sequence.topic)
    except (ValueError, OSError) as error:
        return status, [*problems, str(error)], None
    report = judge_bag(sequence, result, arguments.align, arguments.depth_align, ReconOptions())
    problems += _problems(report, arguments.truth)
    said = result.diagnostics().texts
    key["weights"] = said.get("inference: weights", "")
    row = {**key, "mode": mode_name(configure(overrides)), **_made_by(said), **report.row()}
    pictures = draw_pictures(report, sequence, result, arguments.align)
    write_report(folder, arguments.bag, row, report, pictures)
    if not problems:
        table.add(row)
    return status, problems, row


def _made_by(said: dict[str, str]) -> Row:
    """Machine and version, as far as the node's diagnostics tell: earlier ones said less."""
    device = ", ".join(said.get(f"inference: {name}", "?") for name in ("device", "precision"))
    node, judge = said.get("inference: version", "unknown"), version()
    return {
        "ran_on": said.get("inference: machine", device),
        "version": node if node == judge else f"{node}, judged by {judge}",
    }


def _known(arguments: argparse.Namespace, table: ResultTable, key: Row, overrides: Overrides) -> Row | None:
    """The row of an earlier replay with the same weights; a recording is judged anew, which takes seconds."""
    if arguments.result:
        return None
    if any(parameter.startswith("model.") for parameter in arguments.node_params):
        return table.find(key, unknown="weights")  # they are the node's own matter
    try:
        return table.find({**key, "weights": describe_weights(configure(overrides).model)})
    except CheckpointError:  # the node will say so
        return None


def _settings(arguments: argparse.Namespace, overrides: Overrides) -> str:
    """Of the node that is judged."""
    return " ".join([describe(overrides), *arguments.node_params])


def _player(arguments: argparse.Namespace) -> str:
    """Whose replay is judged."""
    if arguments.result:
        return f"recording={arguments.result}"
    return "player=outside" if arguments.outside_player else f"rate={arguments.rate:g}"


def _replay(arguments: argparse.Namespace, topic: str, overrides: Overrides, recording: Path) -> int:
    """Run node, player and recorder in processes of their own; returns the exit status."""
    command = [sys.executable, "-m", RECORDER, str(arguments.bag), str(recording), "--topic", topic]
    command += ["--outside_player"] if arguments.outside_player else ["--rate", str(arguments.rate)]
    command += ["--limit_s", str(arguments.limit_s), "--params"]
    command += [*_node_parameters(overrides), *arguments.node_params]
    process = subprocess.Popen(command, start_new_session=True)
    while True:
        try:
            return process.wait()
        except KeyboardInterrupt:  # it ends the node and finishes the recording
            process.terminate()


def _node_parameters(overrides: Overrides) -> list[str]:
    """Parameters of the node bear the settings' names; JSON keeps 1.0, "1" and 1 apart, as YAML reads it."""
    config, parameters = configure(overrides), []
    for dotted in overrides:
        section, name = dotted.split(".")
        parameters.append(f"{dotted}:={json.dumps(getattr(getattr(config, section), name))}")
    return parameters


def write_report(
    folder: Path, source: Path, row: Row, report: BagReport, pictures: Iterable[tuple[str, Figure]]
) -> None:
    """`report.html` for people and `report.json` for programs."""
    told = "settings", "mode", "measured", "weights", "ran_on", "version"
    facts = {"bag": source.name, **{name: row[name] for name in told}}
    plain = {**facts, **report.figures, "not judged": report.untold | report.failed}
    write_whole(folder / "report.json", json.dumps(plain, indent=2))
    write_whole(folder / "report.html", to_html(f"{source.name}: {row['settings']}", facts, report, pictures))
    print(folder / "report.html")


def _problems(report: BagReport, truth: str) -> list[str]:
    """What the user must know: measures that failed, and a bag without any truth, unless asked for."""
    problems = [f"{section}: {why}" for section, why in report.failed.items()]
    if truth != "none" and all(section in report.untold for section in QUALITY):
        problems.append("; ".join(report.untold.values()) + " (--truth none if only the costs matter)")
    return problems


def _folder_name(key: Row, topics: list[str], player: str) -> str:
    """Of one row; people read what differs from a replay with the defaults, as far as it fits."""
    parts = [key["scene"]]
    if key["settings"] != "defaults":
        parts += key["settings"].split(" ")
    parts += topics
    if player != "rate=0" and not player.startswith("recording="):
        parts.append(player)
    name = "_".join(parts).replace("/", "-").encode()[:_LONGEST_NAME].decode(errors="ignore")
    return f"{name}_{digest(key)}"
