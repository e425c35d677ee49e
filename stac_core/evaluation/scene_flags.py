"""The flags of `stac-eval recon`, `pose` and `depth`, as one table."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from stac_core.evaluation.datasets import READERS
from stac_core.evaluation.depth_metrics import DEPTH_ALIGNMENTS
from stac_core.evaluation.score import ReconOptions
from stac_core.evaluation.trajectory_metrics import POSE_ALIGNMENTS

Flag = tuple[tuple[str, ...], dict[str, Any]]  # names, and what argparse wants to know


def add_scene_flags(parser: argparse.ArgumentParser, task: str) -> None:
    """All flags but those of the core's settings, in the groups of the table."""
    for title, flags in _table(task).items():
        add_flags(parser.add_argument_group(title), flags)


def add_flags(parser: argparse._ActionsContainer, flags: list[Flag]) -> None:
    for names, options in flags:
        parser.add_argument(*names, **options)


def _flag(*names: str, **options: Any) -> Flag:
    return names, options


TOPIC_FLAGS = [  # what a bag's reader reads
    _flag("--topic", default="", help="image topic of a bag; needed where it has several"),
    _flag("--depth_topic", default="", help="true depth of a bag"),
    _flag("--truth", default="", help="true path of a bag: a topic, a TUM file, or none"),
]


def _length(name: str, default: float, text: str) -> Flag:
    return _flag(name, type=float, default=default, help=f"{text} (default: {default:g})", metavar="M")


def _alignment(measure: str, task: str, choices: tuple[str, ...]) -> Flag:
    """`--align` is the task's own alignment; a task that measures both means the path."""
    short = ["--align"] if task == measure or (task == "recon" and measure == "pose") else []
    names = [f"--{measure}_align", *short]
    return _flag(*names, default=choices[0], choices=choices, help=f"default: {choices[0]}")


def _table(task: str) -> dict[str, list[Flag]]:
    recon = ReconOptions()
    kinds = ("auto", *READERS)
    return {
        "scenes": [
            _flag("sources", nargs="*",
                  help="scenes, folders of scenes, videos, bags, or world:SEED,frames=300"),
            _flag("--dataset_type", "--eval_dataset", default="auto", choices=kinds,
                  help="layout of the files (default: told from them)"),
            _flag("--data_root", type=Path, default=Path("data"),
                  help="where <dataset>/<scene>/ lies if no source is named (default: data)"),
            _flag("--scene_name", "--seq_list", nargs="+", default=[], help="only these scenes"),
            *TOPIC_FLAGS,
            _flag("--kf_every", type=int, default=1, metavar="N", help="use every N-th frame"),
            _flag("--pose_eval_stride", type=int, default=0, metavar="N",
                  help="the same for the pose task; 0 = --kf_every"),
        ],
        "results": [
            _flag("--output_dir", type=Path, default=Path("out/eval"), help="default: out/eval"),
            _flag("--model_name", default="", help="name of the rows (default: the backbone's)"),
            _flag("--save_tag", default="", help="appended to the name of the run's folder"),
            _flag("--vis_tag", default="", help="also write clouds, paths and depth pictures to vis_<tag>/"),
        ],
        "measures": [
            _flag("--eval_depth", action="store_true", help="measure depth too"),
            _flag("--eval_cam", action="store_true", help="measure poses too"),
            _flag("--no_recon", action="store_true", help="leave the cloud out"),
            _alignment("pose", task, POSE_ALIGNMENTS),
            _alignment("depth", task, DEPTH_ALIGNMENTS),
            _flag("--align_per", default="sequence", choices=("sequence", "frame"),
                  help="one depth alignment per ..."),
            _length("--cloud_voxel", recon.voxel_size, "clouds are thinned to this"),
            _length("--f_threshold", recon.threshold, "distance of the F-score"),
            _length("--icp_distance", recon.icp_distance, "farthest pairs of ICP; 0 = no ICP"),
            _flag("--drop_percent", type=float, default=recon.drop_percent, metavar="PERCENT",
                  help="least confident share left out"),
        ],
        "where and how often": [
            _flag("--eval_cpu", action="store_true", help="run the network on the CPU"),
            _flag("--sweep", nargs="+", default=[], metavar="SETTING=A,B",
                  help="all combinations, e.g. cache.mode=stac,causal"),
            _flag("--slurm", default="", metavar="PARTITION", help="one Slurm job per scene and setting"),
            _flag("--slurm_minutes", type=int, default=240, metavar="MIN", help="time limit of one job"),
        ],
    }  # fmt: skip
