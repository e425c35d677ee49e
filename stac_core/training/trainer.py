"""The training loop: draw, predict, compare, step; evaluate, and keep the state safe."""

from __future__ import annotations

import logging
import signal
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager, nullcontext
from dataclasses import asdict
from functools import cached_property
from pathlib import Path
from types import FrameType
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch._dynamo.exc import TorchDynamoException
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer

from stac_core.checkpoint import load_weights, read_metadata
from stac_core.command import closing_signals
from stac_core.config import NETWORKS
from stac_core.device import Stopwatch, computes_in_bfloat16, send
from stac_core.network.causal_vggt import CausalVGGT
from stac_core.network.execution import compile_blocks, undo
from stac_core.network.initial_weights import initialise
from stac_core.settings import in_one_line
from stac_core.training.batches import draw_dense_frames, draw_sequences, draw_visible, step_random
from stac_core.training.clips import Clips, open_clips
from stac_core.training.config import TrainingConfig
from stac_core.training.held_out import held_out_worlds, measure
from stac_core.training.initialise import prepare_for_matching
from stac_core.training.muon import Muon
from stac_core.training.processes import Processes
from stac_core.training.progress import Progress
from stac_core.training.schedule import learning_rate
from stac_core.training.sequences import Sequences, normalise
from stac_core.training.state import capture, commands, read_state, restore, training_command, write_state
from stac_core.training.supervised import Supervised

log = logging.getLogger(__name__)

REGRESSIONS = (
    "network.camera_head.pose_branch.fc2.",
    "matching.shifts.",
    "motion.patches.",
    "motion.cameras.",
)
HELD_OUT_WORLDS, HELD_OUT_FRAMES = 24, 8  # of the curve; `evaluate` measures on more


class Trainer:
    """One run in one folder. Goes on from `<out>/state.safetensors`, else from the state `resume`, else
    begins with the network weights of the file `weights`, else with random ones."""

    def __init__(
        self,
        config: TrainingConfig,
        processes: Processes,
        resume: Path | None = None,
        weights: Path | None = None,
    ) -> None:
        self.config, self.processes, self.device = config, processes, processes.device
        self.folder = Path(config.out)
        self.folder.mkdir(parents=True, exist_ok=True)
        self.path = self.folder / "state.safetensors"
        torch.manual_seed(config.seed)
        self.model = Supervised(_first_network(config, weights), config).to(self.device)
        if config.execution == "compiled":
            compile_blocks(self.model.network)
        self.optimizers = make_optimizers(self.model, config)
        self.step = 0
        self._before = "" if weights is None else read_metadata(weights).get("command", weights.name)
        self._resume(resume)
        self.parallel: nn.Module = self.model
        if processes.count > 1:
            self.parallel = DistributedDataParallel(self.model)
        self.stopped = False
        self._began = time.monotonic()

    def run(self) -> bool:
        """Train to the end; False when a signal ended the run early, its state written."""
        progress = Progress(
            self.folder, self.step, self.config.steps, self.config.log_every, self.processes.leads
        )
        with closing(progress):
            try:
                with self._stop_on_signals():
                    finished = self._train(progress)
            except OSError:  # clips cannot be rendered; the step had changed nothing yet
                self._save_or_warn()
                raise
            self._save()
        return finished

    def _train(self, progress: Progress) -> bool:
        """Step by step to the end; False where a signal ended it early."""
        saved = time.monotonic()
        while (part := self._part_behind()) < 1:
            if self.processes.any(self.stopped):
                return False
            self._train_step(part, progress)
            if self.config.evaluate_every and self.step % self.config.evaluate_every == 0:
                self._evaluate(progress)
            if time.monotonic() - saved > 60 * self.config.checkpoint_minutes:
                self._save_or_warn()
                saved = time.monotonic()
        return True

    def _part_behind(self) -> float:
        """Of the run, what lies behind: by steps or, where the clock counts and is ahead, by the clock.

        One number in all processes, or they would learn at different rates and part ways.
        """
        by_steps, minutes = self.step / self.config.steps, self.config.minutes
        if not minutes:
            return by_steps
        return self.processes.as_leader(max(by_steps, (time.monotonic() - self._began) / (60 * minutes)))

    def _train_step(self, part: float, progress: Progress) -> None:
        watch = Stopwatch(self.device)
        random = step_random(self.config, self.step, self.processes.rank)
        sequences = self._draw(part, random)
        watch.mark()
        count, frames = sequences.depth.shape[:2]
        visible = draw_visible(frames, random)
        dense_frames = send(draw_dense_frames(self.config, count * frames, random), self.device)
        rate = learning_rate(self.config, self.step, part)
        loss, figures = self._differentiate_or_eagerly(sequences, visible, dense_frames)
        gradient = self._update(rate)
        self.step += 1
        seen = count * frames * self.processes.count
        progress.update(self.step, {"loss": loss, "gradient": gradient, **figures}, seen, watch)

    def _update(self, rate: float) -> Tensor:
        """Step along the gradient that the parameters hold, unless it is not finite; its norm."""
        norm = clip_by_parts(self.model, self.config.gradient_clip)
        unusable = (~torch.isfinite(norm)).float()
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = group["share"] * rate
            # As `GradScaler` tells fused optimizers not to step. The host need not know, hence not wait.
            optimizer.found_inf = unusable  # type: ignore[attr-defined]
            optimizer.step()
        return norm

    def _draw(self, part: float, random: np.random.Generator) -> Sequences:
        """The sequences of this step. OSError in all processes where one of them cannot draw its own."""
        failure, drawn = None, None
        try:
            drawn = normalise(draw_sequences(self.config, self._clips, self.step, part, random))
        except OSError as error:
            failure = error
        if self.processes.any(failure is not None) or drawn is None:
            raise failure or OSError("another process could not render its clips")
        return drawn

    def _differentiate_or_eagerly(self, *batch: Any) -> tuple[Tensor, dict[str, Tensor]]:
        try:
            return self._differentiate(*batch)
        except TorchDynamoException as error:
            cause = getattr(error, "inner_exception", error)  # what the compiler itself had said
            log.warning(
                "blocks cannot be compiled here, the run goes on eagerly, and slower: %s", in_one_line(cause)
            )
            undo(self.model.network)
            return self._differentiate(*batch)

    def _differentiate(
        self, sequences: Sequences, visible: Tensor, dense_frames: Tensor
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Loss and figures of a batch; the gradient is left with the parameters."""
        with self._precision():
            loss, figures = self.parallel(sequences, visible, dense_frames)
        self.model.zero_grad(set_to_none=True)
        loss.backward()
        return loss.detach(), figures

    @cached_property
    def _clips(self) -> Clips:
        return open_clips(self.config, self.device)

    @cached_property
    def _held_out(self) -> list[Sequences]:
        width = NETWORKS[self.config.network].image_size
        return held_out_worlds(0, HELD_OUT_WORLDS, HELD_OUT_FRAMES, width)

    def _evaluate(self, progress: Progress) -> None:
        if not self.processes.leads:
            return
        with torch.compiler.set_stance("force_eager"):  # a few passes do not pay for compilation
            figures = measure(self.model.network, self._held_out)
        progress.add_held_out({"step": self.step, "time": int(time.time()), **asdict(figures)})

    def _resume(self, resume: Path | None) -> None:
        source = self.path if self.path.exists() else resume
        if source is None:
            return
        state = read_state(source)
        restore(state, self.model, self.optimizers, NETWORKS[self.config.network])
        self.step, self._before = state.step, state.config.get("before", "")
        if training_command(state.config["run"]) != training_command(asdict(self.config)):
            self._before = f"{commands(state)}, to step {state.step}"
        log.info("resumed %s at step %d", source, self.step)

    def _save(self) -> None:
        if self.processes.leads:
            network = NETWORKS[self.config.network]
            state = capture(self.model, self.optimizers, self.step, self.config, network, self._before)
            write_state(state, self.path)

    def _save_or_warn(self) -> None:
        try:
            self._save()
        except OSError as error:  # a full disk must not end the run; the old state is still whole
            log.error("state of step %d not written, the last good one stays: %s", self.step, error)

    @contextmanager
    def _precision(self) -> Iterator[None]:
        """Autocast; on a CPU also plain attention, whose backward is faster there for short sequences."""
        wanted = self.config.precision
        enabled = wanted == "bfloat16" or (wanted == "auto" and computes_in_bfloat16(self.device))
        plain = sdpa_kernel(SDPBackend.MATH) if self.device.type == "cpu" else nullcontext()
        with plain, torch.autocast(self.device.type, torch.bfloat16, enabled=enabled):
            yield

    @contextmanager
    def _stop_on_signals(self) -> Iterator[None]:
        def stop(number: int, frame: FrameType | None) -> None:
            log.info("%s: stopping after this step", signal.Signals(number).name)
            self.stopped = True

        before = {number: signal.signal(number, stop) for number in (signal.SIGINT, *closing_signals())}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)


def _first_network(config: TrainingConfig, weights: Path | None) -> CausalVGGT:
    row = NETWORKS[config.network]
    if weights is not None:
        return load_weights(row, weights, torch.float32, torch.device("cpu"))
    network = initialise(CausalVGGT(row), config.seed)
    prepare_for_matching(network.aggregator)
    return network


def clip_by_parts(model: Supervised, limit: float) -> Tensor:
    """Shorten the gradients of the trunk and of every head, each to the limit; → the norm of all before.

    Taken together, the last layer of the camera head would be nearly all of the norm, and decide how far all
    else steps.
    """
    parts = [*model.network.children(), model.matching, model.motion]
    learning = [[p for p in part.parameters() if p.grad is not None] for part in parts]
    return torch.stack([nn.utils.clip_grad_norm_(found, limit) for found in learning if found]).norm()


def make_optimizers(model: nn.Module, config: TrainingConfig) -> list[Optimizer]:
    """Muon for the matrices of the blocks, AdamW for all else; only matrices decay, not norms, biases, tokens
    or position embeddings.

    Heads that regress a few small numbers from many channels learn at a lower rate: a full step of
    every channel would move their answers by as much as a whole camera motion.
    """
    matrices: dict[tuple[float, float], list[Tensor]] = {}
    others: dict[tuple[float, float], list[Tensor]] = {}
    for name, parameter in model.named_parameters():
        of_block = parameter.ndim == 2 and (".attn." in name or ".mlp." in name)
        plain = parameter.ndim < 2 or "token" in name or "pos_embed" in name
        share = config.regression_rate if name.startswith(REGRESSIONS) else 1.0
        groups = matrices if of_block else others
        groups.setdefault((0.0 if plain else config.weight_decay, share), []).append(parameter)
    by_muon, by_adamw = (
        [{"params": p, "weight_decay": decay, "share": share} for (decay, share), p in groups.items()]
        for groups in (matrices, others)
    )
    rate = config.learning_rate
    return [Muon(by_muon, rate), torch.optim.AdamW(by_adamw, rate, betas=(0.9, 0.95), fused=True)]
