"""Command `stac-eval`: reconstruction, poses and depth of datasets, bags through the node, tables."""

from __future__ import annotations

import argparse
import logging
import sys
from collections.abc import Sequence
from pathlib import Path

from stac_core.command import status_of
from stac_core.config import ModelConfig
from stac_core.evaluation import bag_command
from stac_core.evaluation.cluster import submit
from stac_core.evaluation.collect import collect
from stac_core.evaluation.datasets import find_scenes, world
from stac_core.evaluation.experiments import Measures, Plan, run_plan
from stac_core.evaluation.flags import add_config_flags, given_flags, sweep
from stac_core.evaluation.scene_flags import add_scene_flags
from stac_core.evaluation.score import ReconOptions


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one subcommand; 0 = all went well, 1 = a failure was named, 2 = wrong usage, 130 = a signal."""
    logging.basicConfig(level=logging.INFO, format="%(levelname)s %(name)s: %(message)s")
    parsed = make_parser().parse_args(arguments)
    name, resumed = f"stac-eval {parsed.task}", "interrupted; the same command goes on from here"
    return status_of(name, lambda: int(parsed.command(parsed)), interrupted=resumed)


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="stac-eval", description=__doc__)
    tasks = parser.add_subparsers(dest="task", required=True)
    for task, help_text in (
        ("recon", "clouds: accuracy, completeness, normal consistency, F-score"),
        ("pose", "camera paths: ATE and RPE"),
        ("depth", "depth maps: AbsRel, RMSE, delta"),
    ):
        task_parser = tasks.add_parser(task, help=help_text, description=help_text)
        add_scene_flags(task_parser, task)
        add_config_flags(task_parser)
        task_parser.set_defaults(command=_evaluate)
    bag_command.add_parser(tasks)
    table = tasks.add_parser("table", help="gather runs into Markdown, CSV and plots")
    table.add_argument("folders", nargs="+", type=Path, help="output folders of earlier runs")
    table.add_argument("--output_dir", type=Path, default=Path("out/table"))
    table.set_defaults(command=_table)
    return parser


def _evaluate(arguments: argparse.Namespace) -> int:
    plan = _make_plan(arguments)
    failures = submit(plan, arguments.slurm, arguments.slurm_minutes) if arguments.slurm else run_plan(plan)
    print(f"rows below {plan.output}")
    if failures:
        runs = len(plan.sources) * len(plan.settings)
        print(f"stac-eval {plan.task}: {failures} of {runs} runs failed, see above", file=sys.stderr)
    return 1 if failures else 0


def _make_plan(arguments: argparse.Namespace) -> Plan:
    overrides = given_flags(arguments)
    if arguments.eval_cpu:
        overrides["model.device"] = "cpu"
    settings = sweep(arguments.sweep, overrides)
    task = arguments.task
    stride = (
        arguments.pose_eval_stride if task == "pose" and arguments.pose_eval_stride else arguments.kf_every
    )
    measures = Measures(
        recon=task == "recon" and not arguments.no_recon,
        pose=task == "pose" or arguments.eval_cam,
        depth=task == "depth" or arguments.eval_depth,
        pose_align=arguments.pose_align,
        depth_align=arguments.depth_align,
        depth_per=arguments.align_per,
        stride=stride,
        options=ReconOptions(
            arguments.cloud_voxel, arguments.f_threshold, arguments.icp_distance, arguments.drop_percent
        ),
    )
    if not (measures.recon or measures.pose or measures.depth):
        raise ValueError("--no_recon leaves nothing to measure; add --eval_cam or --eval_depth")
    name = arguments.model_name or overrides.get("model.name", ModelConfig().name)
    folder = f"{name}_{arguments.save_tag}" if arguments.save_tag else name
    return Plan(
        task, arguments.dataset_type, _find_sources(arguments), settings, measures, name,
        arguments.output_dir / folder, arguments.vis_tag, bag_command.topic_options(arguments),
    )  # fmt: skip


def _find_sources(arguments: argparse.Namespace) -> list[str]:
    """The scenes to run. Raises ValueError or OSError listing what there is to choose from."""
    kind, wanted = arguments.dataset_type, arguments.scene_name
    if not arguments.sources and kind == "auto":
        raise ValueError(
            "name a scene or a folder of scenes, or a --dataset_type to look for under --data_root"
        )
    roots = arguments.sources or [str(arguments.data_root / kind)]
    scenes = [name for root in roots for name in _scenes_below(root, kind)]
    if not wanted:
        return scenes
    chosen = [scene for scene in scenes if any(_is_called(scene, name) for name in wanted)]
    missing = [name for name in wanted if not any(_is_called(scene, name) for scene in scenes)]
    if missing:
        raise ValueError(f"no scene {', '.join(missing)}; there is {', '.join(Path(s).name for s in scenes)}")
    return chosen


def _scenes_below(root: str, kind: str) -> list[str]:
    if world.recognises(root):
        return [root]
    if not Path(root).exists():
        raise FileNotFoundError(f"{root}: no such file or folder")
    scenes = find_scenes(Path(root), kind)
    if not scenes:
        raise ValueError(f"{root}: no scene of kind {kind} in it")
    return [str(scene) for scene in scenes]


def _is_called(scene: str, name: str) -> bool:
    """A scene answers to its folder's name and to the end of its path, such as chess/seq-03."""
    return scene == name or scene.endswith("/" + name)


def _table(arguments: argparse.Namespace) -> int:
    for path in collect(arguments.folders, arguments.output_dir):
        print(path)
    return 0


if __name__ == "__main__":
    sys.exit(main())
