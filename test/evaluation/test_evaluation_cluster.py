"""Jobs of a plan, and submitit's own local executor running them."""

import dataclasses
from pathlib import Path

import pytest

from stac_core.evaluation.cluster import split_plan, submit
from stac_core.evaluation.collect import find_rows
from stac_core.evaluation.experiments import Measures, Plan

WORLDS = [f"world:{seed},frames=3,height=56,width=70,kind=room" for seed in (1, 2)]


def make_plan(output: Path) -> Plan:
    settings = [
        {"cache.mode": mode, "image.size": "70", "model.device": "cpu"} for mode in ("causal", "window_kv")
    ]
    return Plan("depth", "auto", WORLDS, settings, Measures(depth=True), "tiny", output)


def test_every_job_has_one_scene_one_setting_and_its_own_folder(tmp_path):
    jobs = split_plan(make_plan(tmp_path))
    assert len({job.output for job in jobs}) == 4
    assert sorted((job.sources[0], job.settings[0]["cache.mode"]) for job in jobs) == [
        (world, mode) for world in WORLDS for mode in ("causal", "window_kv")
    ]


def test_a_job_keeps_its_folder_when_the_plan_grows(tmp_path):
    plan = make_plan(tmp_path)
    fewer = split_plan(dataclasses.replace(plan, sources=WORLDS[1:], settings=plan.settings[1:]))
    assert {job.output for job in fewer} < {job.output for job in split_plan(plan)}


def test_missing_submitit_is_named(tmp_path, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "submitit", None)
    with pytest.raises(ValueError, match="pip install submitit"):
        submit(make_plan(tmp_path), "gpu", 10)


@pytest.mark.slow
def test_jobs_run_and_their_rows_are_found(tmp_path):
    pytest.importorskip("submitit", reason="submitit is an optional extra")
    plan = make_plan(tmp_path)
    assert submit(plan, "none", 5, cluster="local") == 0
    rows = [row for _, row in find_rows([tmp_path])]
    assert {(row["scene"], row["mode"]) for row in rows} == {
        (scene, mode) for scene in {row["scene"] for row in rows} for mode in ("causal", "window_kv")
    }
    assert len(rows) == 4
