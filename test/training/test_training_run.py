"""Whole runs: they learn, resume exactly, and end well when they are interrupted or killed."""

import csv
import dataclasses
import itertools
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import save_file

from stac_core.checkpoint import BOX, load_network
from stac_core.config import NETWORKS, ModelConfig
from stac_core.network.causal_vggt import CausalVGGT
from stac_core.network.execution import compile_blocks
from stac_core.network.initial_weights import initialise
from stac_core.training import clips as clips_module
from stac_core.training import trainer as trainer_module
from stac_core.training.config import TrainingConfig
from stac_core.training.processes import Processes, join_processes
from stac_core.training.ship import about_run
from stac_core.training.state import read_state, training_command
from stac_core.training.trainer import Trainer

ALONE = Processes(rank=0, count=1, device=torch.device("cpu"))
SMALL = dict(
    patches_per_step=128,
    first_width=56,
    last_width=56,
    first_frames=2,
    last_frames=3,
    first_clips=3,
    clips_per_step=0.0,
    clip_frames=6,
    clip_width=56,
    warmup_steps=2,
    evaluate_every=0,
    log_every=1,
    precision="float32",
    execution="eager",
)


NARROW = dict(
    width=48, encoder_blocks=1, dense_features=8, dense_channels=(8, 8, 8, 8), camera_iterations=2
)  # fmt: skip


@pytest.fixture
def narrow_network(monkeypatch):
    """A small network under the name of the bundled one: what becomes of a run and its files is the same."""
    monkeypatch.setitem(NETWORKS, "embedded", dataclasses.replace(NETWORKS["embedded"], **NARROW))


narrow = pytest.mark.usefixtures("narrow_network")


@pytest.fixture(scope="module")
def clips(tmp_path_factory) -> Path:
    """One folder of rendered clips for all runs."""
    return tmp_path_factory.mktemp("clips")


def folder(path: Path, clips: Path) -> str:
    path.mkdir()
    (path / "clips").symlink_to(clips)
    return str(path)


def trained(out: str, steps: int, stop_after: int = 0, **settings) -> Trainer:
    trainer = Trainer(TrainingConfig(out=out, steps=steps, **{**SMALL, **settings}), ALONE)
    if stop_after:
        step = trainer._train_step

        def then_interrupt(part, progress):
            step(part, progress)
            if trainer.step == stop_after:
                os.kill(os.getpid(), signal.SIGINT)

        trainer._train_step = then_interrupt
    assert trainer.run() == (not stop_after)
    return trainer


def rows(out: str) -> list[dict[str, float]]:
    with open(f"{out}/training.csv") as file:
        return [{k: float(v) for k, v in row.items()} for row in csv.DictReader(file)]


@pytest.mark.parametrize("rank", ["0", "3"])
def test_cuda_is_the_gpu_of_this_process(monkeypatch, rank):
    chosen = []
    monkeypatch.setattr(torch.cuda, "set_device", chosen.append)
    monkeypatch.setenv("LOCAL_RANK", rank)
    with join_processes("cuda") as processes:
        assert [processes.device] == chosen == [torch.device(f"cuda:{rank}")]


@narrow
def test_resumed_run_equals_one_that_was_never_interrupted(tmp_path, clips):
    whole, parts = folder(tmp_path / "whole", clips), folder(tmp_path / "parts", clips)
    uninterrupted = trained(whole, steps=4)
    assert trained(parts, steps=4, stop_after=2).step == 2
    resumed = trained(parts, steps=4)
    assert resumed.step == 4
    for a, b in zip(uninterrupted.model.parameters(), resumed.model.parameters(), strict=True):
        assert torch.equal(a, b)
    assert [row["step"] for row in rows(parts)] == [1, 2, 3, 4]
    assert [row["loss"] for row in rows(parts)] == [row["loss"] for row in rows(whole)]


@narrow
def test_a_run_goes_on_eagerly_where_blocks_cannot_be_compiled(tmp_path, clips, monkeypatch, caplog):
    def broken(graph, inputs):
        raise OSError("no compiler here")

    monkeypatch.setattr(trainer_module, "compile_blocks", lambda network: compile_blocks(network, broken))
    refused, eager = folder(tmp_path / "refused", clips), folder(tmp_path / "eager", clips)
    trained(refused, steps=3, execution="compiled")
    trained(eager, steps=3)
    assert caplog.text.count("no compiler here") == 1
    assert [row["loss"] for row in rows(refused)] == [row["loss"] for row in rows(eager)]


@pytest.mark.slow
def test_compiled_steps_learn_the_same(tmp_path, clips):
    compiled, eager = folder(tmp_path / "compiled", clips), folder(tmp_path / "eager", clips)
    trained(compiled, steps=4, execution="compiled")
    trained(eager, steps=4)
    for a, b in zip(rows(compiled), rows(eager), strict=True):
        assert a["loss"] == pytest.approx(b["loss"], rel=1e-3)


def test_a_step_whose_gradient_is_not_finite_is_not_taken(tmp_path, clips, caplog):
    config = TrainingConfig(out=folder(tmp_path / "run", clips), steps=3, **SMALL)
    trainer = Trainer(config, ALONE)
    first = next(p for p in trainer.model.parameters() if p.requires_grad)
    first.register_hook(lambda gradient: gradient * (torch.nan if trainer.step == 1 else 1))
    seen = []
    update = trainer._update

    def watch(rate):
        before = [p.detach().clone() for p in trainer.model.parameters()]
        norm = update(rate)
        seen.append([torch.equal(a, b) for a, b in zip(trainer.model.parameters(), before, strict=True)])
        return norm

    trainer._update = watch
    assert trainer.run()
    assert all(seen[1]) and not all(seen[0]) and not all(seen[2])
    assert caplog.text.count("its step was not taken") == 1 and "up to step 2" in caplog.text


@narrow
def test_auxiliary_losses_of_no_weight_are_left_out(tmp_path, clips):
    out = folder(tmp_path / "run", clips)
    run = trained(out, steps=3, matching_weight=0.0, motion_weight=0.0)
    assert not {"match", "shift", "motion"} & set(rows(out)[0])
    fresh = Trainer(run.config, ALONE)  # resumes
    for name, value in fresh.model.matching.state_dict().items():
        assert torch.equal(value, run.model.matching.state_dict()[name])


@narrow
def test_the_table_of_a_run_that_goes_on_without_a_loss_keeps_its_columns(tmp_path, clips):
    out = folder(tmp_path / "run", clips)
    trained(out, steps=3)
    trained(out, steps=5, matching_weight=0.0)
    with open(f"{out}/training.csv") as file:
        table = list(csv.DictReader(file))
    assert [bool(row["match"]) for row in table] == [True] * 3 + [False] * 2
    assert all(0 <= float(row["rendering_share"]) <= 1 and float(row["frames_per_s"]) > 0 for row in table)


@narrow
def test_a_run_may_end_by_the_clock(tmp_path, clips, monkeypatch):
    looks = itertools.count()  # at a clock that goes on by a second in between, however long a step takes
    clock = SimpleNamespace(monotonic=lambda: next(looks), time=time.time)
    monkeypatch.setattr(trainer_module, "time", clock)
    run = trained(folder(tmp_path / "run", clips), steps=100_000, minutes=0.2)
    assert 4 <= run.step <= 12
    last = rows(str(tmp_path / "run"))[-1]
    assert last["step"] == run.step
    assert all(o.param_groups[0]["lr"] < 0.5 * run.config.learning_rate for o in run.optimizers)


@narrow
def test_a_cpu_without_instructions_for_bfloat16_trains_in_float32(tmp_path, clips, monkeypatch):
    """A step would take it fifty times as long."""
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX2")
    for precision in ("auto", "float32"):
        trained(folder(tmp_path / precision, clips), steps=3, precision=precision)
    ours, theirs = (rows(str(tmp_path / precision)) for precision in ("auto", "float32"))
    assert [row["loss"] for row in ours] == [row["loss"] for row in theirs]


def test_a_run_may_begin_with_the_weights_of_the_box(tmp_path, clips):
    config = TrainingConfig(out=folder(tmp_path / "run", clips), steps=3, **SMALL)
    trainer = Trainer(config, ALONE, weights=BOX)
    box = load_network(ModelConfig(device="cpu", checkpoint=str(BOX))).network.state_dict()
    for name, value in trainer.model.network.state_dict().items():
        assert torch.equal(value, box[name]), name


@narrow
def test_a_state_knows_every_command_that_led_to_it(tmp_path, clips):
    out, weights = folder(tmp_path / "run", clips), tmp_path / "weights.safetensors"
    tensors = initialise(CausalVGGT(NETWORKS["embedded"]), 1).state_dict()
    save_file(tensors, weights, {"command": "python -m first --seed 1"})
    runs = [TrainingConfig(out=out, steps=steps, seed=seed, **SMALL) for steps, seed in ((3, 0), (4, 5))]
    for config in (*runs, runs[1]):
        assert Trainer(config, ALONE, weights=weights).run()
    first, second = (training_command(dataclasses.asdict(config)) for config in runs)
    known = about_run(read_state(Path(out, "state.safetensors")))["command"]
    assert known == f"python -m first --seed 1; then {first}, to step 3; then {second}"


@narrow
def test_a_full_disk_neither_ends_the_run_nor_harms_the_last_state(tmp_path, clips, monkeypatch, caplog):
    out = folder(tmp_path / "run", clips)
    trained(out, steps=3)
    good = Path(out, "state.safetensors").read_bytes()

    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):  # at the end nothing is left but to say so
        trained(out, steps=5, checkpoint_minutes=0.0)
    assert "the last good one stays" in caplog.text
    assert Path(out, "state.safetensors").read_bytes() == good


@narrow
def test_a_table_on_a_full_disk_is_one_warning(tmp_path, clips, caplog):
    out = folder(tmp_path / "run", clips)
    Path(out, "training.csv").symlink_to("/dev/full")
    assert trained(out, steps=4).step == 4
    assert read_state(Path(out, "state.safetensors")).step == 4
    assert caplog.text.count("the run goes on") == 1 and "No space left" in caplog.text


@narrow
def test_clips_that_cannot_be_rendered_end_the_run_with_its_state_written(tmp_path, monkeypatch):
    sizes = dict(clip_frames=3, first_clips=2, clips_per_step=50.0)
    trainer = Trainer(TrainingConfig(out=str(tmp_path), steps=6, **{**SMALL, **sizes}), ALONE)
    write = clips_module.write_whole

    def full(path: Path, content: bytes) -> None:
        if trainer.step == 2:
            raise OSError(28, "No space left on device")
        write(path, content)

    monkeypatch.setattr(clips_module, "write_whole", full)
    with pytest.raises(OSError, match="No space left"):
        trainer.run()
    assert read_state(trainer.path).step == 2


@pytest.mark.slow
def test_smoke_run_learns(tmp_path, clips):
    """The loss falls and patches begin to match, within a minute on two cores."""
    out = folder(tmp_path / "run", clips)
    trained(out, steps=35, patches_per_step=256, first_clips=6, clip_frames=24, clip_width=168)
    table = rows(out)
    first, last = table[:10], table[-10:]
    for name, factor in (("loss", 0.85), ("point", 0.7)):
        assert sum(r[name] for r in last) < factor * sum(r[name] for r in first)
    assert sum(r["match_attention"] for r in last) > 1.3 * sum(r["match_attention"] for r in first)


@pytest.mark.slow
def test_command_survives_kill_and_stops_on_sigterm_with_its_state_written(tmp_path, clips):
    out = folder(tmp_path / "run", clips)
    flags = [f"--{k.replace('_', '-')}={v}" for k, v in SMALL.items()]
    command = [sys.executable, "-m", "stac_core.training.train", "--out", out, "--steps", "100000", *flags]
    command += ["--checkpoint-minutes", "0.001", "--threads", "1"]

    def start(until: int) -> subprocess.Popen:
        process = subprocess.Popen(command, stderr=subprocess.DEVNULL)
        deadline = time.monotonic() + 120
        while not (Path(out, "training.csv").exists() and rows(out) and rows(out)[-1]["step"] >= until):
            assert process.poll() is None and time.monotonic() < deadline
            time.sleep(0.2)
        return process

    killed = start(until=3)
    killed.kill()
    killed.wait()
    step = read_state(Path(out, "state.safetensors")).step
    assert step >= 1
    stopped = start(until=int(rows(out)[-1]["step"]) + 2)
    stopped.send_signal(signal.SIGTERM)
    assert stopped.wait(60) == 130
    assert read_state(Path(out, "state.safetensors")).step >= step + 1


@pytest.mark.slow
def test_two_processes_train_one_model(tmp_path, clips):
    """Started by torchrun: both see other data, one writes, and twice the frames are counted."""
    alone, both = folder(tmp_path / "alone", clips), folder(tmp_path / "both", clips)
    flags = [f"--{k.replace('_', '-')}={v}" for k, v in {**SMALL, "steps": 3}.items()]
    trained(alone, steps=3)
    run_twice("-m", "stac_core.training.train", "--out", both, *flags)
    assert [row["step"] for row in rows(both)] == [1, 2, 3]
    assert read_state(Path(both, "state.safetensors")).step == 3
    assert (
        rows(both)[0]["loss"] == rows(alone)[0]["loss"]
    )  # process 0 of the first step sees what one alone sees
    assert rows(both)[2]["loss"] != rows(alone)[2]["loss"]


DRIFTING = """
import json, sys
from pathlib import Path
from stac_core.training import clips
from stac_core.training.config import TrainingConfig
from stac_core.training.processes import join_processes
from stac_core.training.trainer import Trainer

config = TrainingConfig(**json.loads(sys.argv[1]))
with join_processes("cpu") as processes:
    trainer, rates, error = Trainer(config, processes), [], ""
    if not processes.leads:
        trainer._began -= 30 * config.minutes  # half the run, by this clock
    step, write = trainer.optimizers[0].step, clips.write_whole

    def note_rate():
        rates.append(trainer.optimizers[0].param_groups[0]["lr"])
        step()

    def full(path, content):
        if trainer.step == 4 and not processes.leads:
            raise OSError("full")
        write(path, content)

    trainer.optimizers[0].step, clips.write_whole = note_rate, full
    try:
        trainer.run()
    except OSError as caught:
        error = str(caught)
    Path(config.out, f"{processes.rank}.json").write_text(json.dumps([rates, error]))
"""


@pytest.mark.slow
def test_processes_share_one_clock_and_end_together_where_one_cannot_render(tmp_path):
    sizes = dict(clip_frames=3, clip_width=56, first_clips=2, clips_per_step=50.0)
    config = {**SMALL, **sizes, "steps": 1000, "minutes": 1000.0, "out": str(tmp_path)}
    (tmp_path / "drifting.py").write_text(DRIFTING)
    run_twice(str(tmp_path / "drifting.py"), json.dumps(config))
    ours, theirs = (json.loads((tmp_path / f"{rank}.json").read_text()) for rank in (0, 1))
    assert len(ours[0]) == 4 and ours[0] == theirs[0]
    assert (ours[1], theirs[1]) == ("another process could not render its clips", "full")
    assert read_state(tmp_path / "state.safetensors").step == 4


def run_twice(*program: str) -> None:
    """In two processes that torchrun starts."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--local-addr", "127.0.0.1"]
    environment = {**os.environ, "GLOO_SOCKET_IFNAME": "lo", "OMP_NUM_THREADS": "1"}
    command += ["--nproc-per-node", "2", *program]
    subprocess.run(command, check=True, env=environment, timeout=200, stderr=subprocess.DEVNULL)


@narrow
def test_state_of_another_network_is_refused(tmp_path, clips, monkeypatch):
    from stac_core.training import trainer as module

    out = folder(tmp_path / "run", clips)
    trained(out, steps=3)
    row = dataclasses.replace(module.NETWORKS["embedded"], camera_iterations=3)
    monkeypatch.setitem(module.NETWORKS, "embedded", row)
    with pytest.raises(ValueError, match=r"camera_iterations = 2, the network has 3"):
        trained(out, steps=4)


def test_longest_sequence_must_fit_a_clip():
    with pytest.raises(ValueError, match=r"last_frames = 25.*nearest value that works: 24"):
        TrainingConfig(last_frames=25)
    assert TrainingConfig(last_frames=25, clip_frames=25).last_frames == 25
