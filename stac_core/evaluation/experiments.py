"""Scenes × settings, one row each, written as it finishes and never computed twice."""

from __future__ import annotations

import logging
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from tqdm import tqdm

from stac_core.checkpoint import LoadedNetwork, load_network
from stac_core.config import Config, KernelConfig, ModelConfig
from stac_core.evaluation.datasets import Sequence, absolute_source, find_kind, open_sequence
from stac_core.evaluation.datasets.bag import BagOptions
from stac_core.evaluation.flags import Overrides, configure, describe, mode_name
from stac_core.evaluation.results import ResultTable, Row, digest, in_one_line
from stac_core.evaluation.scene_run import SceneRun, frame_indices, remove_maps, run_scene
from stac_core.evaluation.score import ReconOptions, score_depth, score_pose, score_recon
from stac_core.evaluation.trajectory import write_tum
from stac_core.evaluation.visualise import is_drawn, visualise
from stac_core.version import version

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Measures:
    """What is computed for every scene."""

    recon: bool = False
    pose: bool = False
    depth: bool = False
    pose_align: str = "sim3"
    depth_align: str = "scale"
    depth_per: str = "sequence"
    stride: int = 1
    options: ReconOptions = field(default_factory=ReconOptions)

    def describe(self) -> str:
        """One text for everything that changes a figure."""
        parts = [f"stride={self.stride}"]
        if self.pose:
            parts.append(f"pose={self.pose_align}")
        if self.depth:
            parts.append(f"depth={self.depth_align}/{self.depth_per}")
        if self.recon:
            options = self.options
            parts.append(
                f"recon={options.voxel_size:g}/{options.threshold:g}/{options.icp_distance:g}/{options.drop_percent:g}"
            )
        return " ".join(parts)


@dataclass(frozen=True)
class Plan:
    """Everything a run is made of."""

    task: str
    dataset: str
    sources: list[str]
    settings: list[Overrides]
    measures: Measures
    model_name: str
    output: Path
    vis_tag: str = ""
    bag_options: BagOptions = field(default_factory=BagOptions)


def run_plan(plan: Plan) -> int:
    """Run what is missing in the output folder, and tell the main figures of all at the end.

    Names every scene that fails, wholly or in one measure, and returns how many did.
    """
    table, rows = ResultTable(plan.output), []
    failures = 0
    with tqdm(total=0, unit="frame", dynamic_ncols=True, disable=None) as bar:  # None: on a terminal only
        for loaded, config, overrides in _networks(plan.settings):
            for source in plan.sources:
                try:
                    row = _run_one(plan, table, source, loaded, config, overrides, bar)
                    rows.append(row)
                    problem = row.get("failed", "")
                except (ValueError, OSError, RuntimeError) as error:
                    problem = str(error)
                if problem:
                    failures += 1
                    where = f"{source} [{describe(overrides)}]"
                    bar.write(f"stac-eval {plan.task}: {where}: {problem}", file=sys.stderr)
    for row in rows:
        print(in_one_line(row))
    return failures


def _networks(settings: list[Overrides]) -> Iterator[tuple[LoadedNetwork, Config, Overrides]]:
    """Each configuration with its network, which is loaded once for as long as it stays the same."""
    loaded: tuple[tuple[ModelConfig, KernelConfig], LoadedNetwork] | None = None
    for overrides in settings:
        config = configure(overrides)
        key = config.model, config.kernels
        if loaded is None or loaded[0] != key:
            loaded = key, load_network(*key)
        yield loaded[1], config, overrides


def _run_one(
    plan: Plan,
    table: ResultTable,
    source: str,
    loaded: LoadedNetwork,
    config: Config,
    overrides: Overrides,
    bar: tqdm,
) -> Row:
    """The row of one scene, computed unless it is there; its column `failed` tells measures that failed.

    Raises ValueError, OSError or RuntimeError where there is nothing to tell.
    """
    sequence = open_sequence(source, plan.dataset, plan.bag_options)
    key: Row = {
        "task": plan.task,
        "dataset": find_kind(source, plan.dataset),
        "scene": sequence.name,
        "source": absolute_source(source),
        "model_name": plan.model_name,
        "settings": describe(overrides),
        "measured": " ".join([plan.measures.describe(), *plan.bag_options.told()]),
        "weights": loaded.weights,
    }
    folder = plan.output / "scenes" / f"{sequence.name}_{digest(key)}"
    pictures = plan.output / f"vis_{plan.vis_tag}" / folder.name if plan.vis_tag else None
    known = table.find(key)
    if known and (pictures is None or is_drawn(pictures)):
        logger.info("%s [%s]: already in %s", sequence.name, key["settings"], table.folder)
        return known
    made_by = {"ran_on": loaded.machine, "version": version()}
    started = time.perf_counter()
    bar.total += len(frame_indices(sequence, plan.measures.stride))
    bar.set_description(f"{sequence.name} {config.cache.mode}")
    with _maps(folder, kept=pictures is not None):
        run = run_scene(sequence, loaded.network, config, folder, plan.measures.stride, bar.update)
        write_tum(folder / "trajectory.tum", run.trajectory)
        run.write_frames_csv(folder / "frames.csv")
        row = {**key, "mode": mode_name(config), **made_by}
        row |= {"frames": len(run.indices), **run.cost()}
        columns, problems = _score(run, sequence, plan.measures)
        if not columns:
            raise ValueError("; ".join(problems))
        row |= columns
        row |= {
            "seconds": round(time.perf_counter() - started, 3),
            "frames_file": str((folder / "frames.csv").relative_to(plan.output)),
        }
        row |= {"failed": "; ".join(problems)} if problems else {}
        table.add(row)
        if pictures:
            visualise(run, sequence, pictures, plan.measures.options)
    return row


@contextmanager
def _maps(folder: Path, kept: bool) -> Iterator[None]:
    """Depth and confidence of a scene serve its scores; they are the only large files.

    kept: they stay, but only where all went well.
    """
    stays = False
    try:
        yield
        stays = kept
    finally:
        if not stays:
            remove_maps(folder)


def _score(run: SceneRun, sequence: Sequence, measures: Measures) -> tuple[dict[str, float], list[str]]:
    """The columns of every measure that succeeds, and why the others did not."""
    wanted = {
        "pose": (measures.pose, lambda: score_pose(run, sequence, measures.pose_align)),
        "depth": (
            measures.depth,
            lambda: score_depth(run, sequence, measures.depth_align, measures.depth_per),
        ),
        "recon": (measures.recon, lambda: score_recon(run, sequence, measures.options)),
    }
    columns: dict[str, float] = {}
    problems = []
    for name, (asked, measure) in wanted.items():
        try:
            found = measure() if asked else {}
        except (ValueError, OSError) as error:
            problems.append(f"{name}: {error}")
            continue
        if all(np.isfinite(value) for value in found.values()):
            columns |= found
        else:
            problems.append(f"{name}: {sequence.name}: a figure is not finite: {found}")
    return columns, problems
