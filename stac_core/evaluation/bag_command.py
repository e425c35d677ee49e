"""`stac-eval bag`: replay a bag to the real node in its own process, record it, judge the recording."""

from __future__ import annotations

import argparse
import json
import logging
import subprocess
import sys
from pathlib import Path
from typing import Any

from stac_core.config import MODES, Config
from stac_core.evaluation.bag_report import QUALITY, BagReport, make_report
from stac_core.evaluation.bag_result import BagResult
from stac_core.evaluation.datasets import bag
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
from stac_core.evaluation.results import ResultTable, Row
from stac_core.evaluation.score import ReconOptions
from stac_core.evaluation.trajectory_metrics import POSE_ALIGNMENTS
from stac_core.files import write_whole

logger = logging.getLogger(__name__)
RECORDER = "stac_ros.bag_evaluation"  # started by name: the core runs without ROS


def add_parser(tasks: Any) -> None:
    """Add the subcommand to `stac-eval`."""
    text = "a bag through the real mapping node: errors, latency, memory, in one page"
    parser = tasks.add_parser("bag", help=text, description=text)
    add = parser.add_argument
    add("bag", type=Path, help="rosbag2 folder, .mcap or .db3")
    add_topic_flags(parser)
    add("--rate", type=float, default=0.0, help="1 = as recorded; 0 = as fast as the node answers (default)")
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


def add_topic_flags(parser: argparse.ArgumentParser) -> None:
    """The flags that choose what a bag's reader reads."""
    parser.add_argument("--topic", default="", help="image topic of a bag; needed where it has several")
    parser.add_argument("--depth_topic", default="", help="true depth of a bag")
    parser.add_argument("--truth", default="", help="true path of a bag: a topic, a TUM file, or none")


def topic_options(arguments: argparse.Namespace) -> BagOptions:
    return BagOptions(arguments.topic, arguments.depth_topic, arguments.truth)


def run(arguments: argparse.Namespace) -> int:
    """Every combination of settings; 0 where all replays ended well and could be judged."""
    sequence = bag.read(arguments.bag, topic_options(arguments))
    sequence.frame(0)  # an encoding that cannot be decoded is told before a node starts
    if arguments.rate < 0:
        raise ValueError(f"--rate {arguments.rate}: must be positive, or 0 for as fast as the node answers")
    settings = sweep(arguments.sweep, given_flags(arguments))
    for overrides in settings:
        _require_stream(configure(overrides))
    table = ResultTable(arguments.output_dir)
    return max(_run_one(arguments, sequence, table, overrides) for overrides in settings)


def _require_stream(config: Config) -> None:
    if MODES[config.cache.mode].offline:
        streams = ", ".join(name for name, mode in MODES.items() if not mode.offline)
        raise ValueError(
            f"cache.mode = {config.cache.mode!r} needs all images at once; a node streams: {streams}"
        )


def _run_one(
    arguments: argparse.Namespace, sequence: BagSequence, table: ResultTable, overrides: Overrides
) -> int:
    key: Row = {
        "task": "bag",
        "dataset": "bag",
        "scene": sequence.name,
        "model_name": arguments.model_name or overrides.get("model.name", "embedded"),
        "settings": " ".join([describe(overrides), *arguments.node_params]),
        "measured": f"pose={arguments.align} depth={arguments.depth_align} rate={arguments.rate:g}",
    }
    if table.has(key, unknown="weights"):
        logger.info("%s [%s]: already in %s", sequence.name, key["settings"], table.folder)
        return 0
    folder = arguments.output_dir / _folder_name(sequence.name, key["settings"])
    recording = arguments.result or folder / "result"
    failed = 0 if arguments.result else _replay(arguments, sequence.topic, overrides, recording)
    result = BagResult(recording)
    report = make_report(sequence, result, arguments.align, arguments.depth_align, ReconOptions())
    key["weights"] = result.diagnostics().texts.get("inference: weights", "")
    row = {**key, "mode": mode_name(configure(overrides)), **report.row()}
    write_report(folder, arguments.bag, row, report)
    problems = _problems(report, arguments.truth) + ["the replay did not end well"] * bool(failed)
    for problem in problems:
        print(f"stac-eval bag: {sequence.name}: {problem}", file=sys.stderr)
    if not problems:
        table.add(row)
    return int(bool(problems))


def _replay(arguments: argparse.Namespace, topic: str, overrides: Overrides, recording: Path) -> int:
    """Run node, player and recorder in processes of their own; returns the exit status."""
    command = [sys.executable, "-m", RECORDER, str(arguments.bag), str(recording), "--topic", topic]
    command += ["--rate", str(arguments.rate), "--limit_s", str(arguments.limit_s), "--params"]
    command += [*_node_parameters(overrides), *arguments.node_params]
    return subprocess.run(command, check=False).returncode


def _node_parameters(overrides: Overrides) -> list[str]:
    """Parameters of the node bear the settings' names; JSON keeps 1.0, "1" and 1 apart, as YAML reads it."""
    config, parameters = configure(overrides), []
    for dotted in overrides:
        section, name = dotted.split(".")
        parameters.append(f"{dotted}:={json.dumps(getattr(getattr(config, section), name))}")
    return parameters


def write_report(folder: Path, source: Path, row: Row, report: BagReport) -> None:
    """`report.html` for people and `report.json` for programs."""
    facts = {"bag": source.name, **{name: row[name] for name in ("settings", "measured", "weights")}}
    plain = {**facts, **report.figures, "not judged": report.untold | report.failed}
    write_whole(folder / "report.json", json.dumps(plain, indent=2))
    write_whole(folder / "report.html", to_html(f"{source.name}: {row['settings']}", facts, report))
    print(folder / "report.html")


def _problems(report: BagReport, truth: str) -> list[str]:
    """What the user must know: measures that failed, and a bag without any truth, unless asked for."""
    problems = [f"{section}: {why}" for section, why in report.failed.items()]
    if truth != "none" and all(section in report.untold for section in QUALITY):
        problems.append("; ".join(report.untold.values()) + " (--truth none if only the costs matter)")
    return problems


def _folder_name(name: str, settings: str) -> str:
    return name if settings == "defaults" else f"{name}_{settings.replace(' ', '_').replace('/', '-')}"
