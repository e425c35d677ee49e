"""Many machines: one Slurm job per scene and setting, through submitit (an optional extra).

Submitit and not Ray: evaluation jobs are independent and long, and the machines that researchers
share run Slurm already; nothing has to be kept running between jobs. Every job has a result folder
of its own, so that none waits for another; `stac-eval table` finds them all.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path

from stac_core.evaluation.experiments import Plan, run_plan
from stac_core.evaluation.results import digest


def split_plan(plan: Plan) -> list[Plan]:
    """One plan per scene and setting, each with a folder below the whole plan's.

    The folder's name follows from both, so a command with more of either finds the finished rows again.
    """
    jobs = plan.output / "jobs"
    return [
        dataclasses.replace(
            plan, sources=[source], settings=[settings], output=jobs / digest({"source": source, **settings})
        )
        for settings in plan.settings
        for source in plan.sources
    ]


def submit(plan: Plan, partition: str, minutes: int, cluster: str | None = None) -> int:
    """Run the plan as one job array and wait; returns how many runs failed.

    cluster: None = Slurm where there is one, else processes on this machine ("local" asks for
    these). Raises ValueError where submitit is not installed.
    """
    try:
        import submitit
    except ImportError as error:
        raise ValueError("--slurm needs submitit, which is not installed: pip install submitit") from error
    executor = submitit.AutoExecutor(folder=Path(plan.output) / "slurm", cluster=cluster)
    executor.update_parameters(
        timeout_min=minutes, slurm_partition=partition, gpus_per_node=_gpus(plan), cpus_per_task=4
    )
    jobs = executor.map_array(run_plan, split_plan(plan))
    return sum(_failures(job) for job in jobs)


def _gpus(plan: Plan) -> int:
    """Per node: 0 where every setting runs on the CPU."""
    return int(any(settings.get("model.device") != "cpu" for settings in plan.settings))


def _failures(job) -> int:  # type: ignore[no-untyped-def]
    """Failed runs of one job; a job that died counts as one, and its log says why."""
    try:
        return int(job.result())
    except Exception as error:  # whatever happened on the other machine
        print(f"stac-eval: job {job.job_id} died: {error}; see {job.paths.stderr}")
        return 1
