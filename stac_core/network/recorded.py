"""Passes recorded once and replayed: everything of a frame except the attention across frames.

For one number of frames a pass launches the same kernels every time, on the same shapes. Only what the
context does varies, because the past grows and shrinks. So a pass is recorded by running the network with a
context that answers nothing, but ends one recording and begins the next; a replay runs the parts and asks
the real context in between. The network never notices, and the host launches a few dozen graphs instead of
thousands of kernels (CUDA graphs: CUDA programming guide, section on graphs).
"""

from __future__ import annotations

import gc
import logging
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, suppress
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from stac_core.network.context import AttentionContext
from stac_core.prediction import Prediction
from stac_core.words import copy_rows

Forward = Callable[[Tensor, AttentionContext, bool], Prediction]
Replay = Callable[[], None]

REPLAY_TOLERANCE = 0.01  # the same kernels on the same numbers; a library may choose another one

logger = logging.getLogger(__name__)


class Tape(Protocol):
    """What kernels are recorded on. All parts share memory, so they are replayed in their order."""

    def recording(self) -> AbstractContextManager[None]:
        """Everything inside `with` belongs to one pass."""

    def begin(self) -> None:
        """From here on kernels are recorded, not run."""

    def end(self) -> Replay:
        """Up to here; → what runs them, on the memory they were recorded with."""


class CudaTape:
    """CUDA graphs that share one pool of memory."""

    def __init__(self, device: torch.device) -> None:
        self._pool, self._stream = torch.cuda.graph_pool_handle(), torch.cuda.Stream(device)
        self._graph: torch.cuda.CUDAGraph | None = None  # being recorded

    @contextmanager
    def recording(self) -> Iterator[None]:
        gc.collect()  # nothing on the device may be freed by chance in between
        torch.cuda.synchronize(self._stream.device)
        with torch.cuda.stream(self._stream):
            try:
                yield
            except BaseException:
                self._abandon()
                raise
        torch.cuda.synchronize(self._stream.device)

    def _abandon(self) -> None:
        """After an error: leave the recording mode, and the memory to those who have recorded before."""
        graph, self._graph = self._graph, None
        if graph is not None:
            with suppress(RuntimeError):  # says that the recording is broken
                graph.capture_end()
        self._pool = torch.cuda.graph_pool_handle()

    def begin(self) -> None:
        self._graph = torch.cuda.CUDAGraph()
        self._graph.capture_begin(self._pool, capture_error_mode="thread_local")

    def end(self) -> Replay:
        graph, self._graph = self._graph, None
        assert graph is not None
        graph.capture_end()
        return graph.replay


@dataclass(frozen=True)
class Question:
    """One call of the context. The tensors are shared by all questions of one shape."""

    of: str  # name of the context's method
    where: tuple[int, ...]  # layer, or iteration and layer
    asked: Tensor  # [3, B, heads, T, D] q, k and v
    answer: Tensor  # [B, heads, T, D]

    def put(self, context: AttentionContext) -> None:
        copy_rows(self.answer, getattr(context, self.of)(*self.where, *self.asked))


class _Cutter:
    """The context of a recording: every question ends a part."""

    frames_seen = 1  # a later frame than the first

    def __init__(self, tape: Tape) -> None:
        self.parts: list[tuple[Replay, Question]] = []
        self.announced = (0, 0)  # frames, tokens of each
        self._tape = tape
        self._tensors: dict[tuple[torch.Size, torch.dtype], tuple[Tensor, Tensor]] = {}

    def begin(self, frames: int, tokens_per_frame: int) -> None:
        self.announced = frames, tokens_per_frame

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return self._cut("attend", (layer,), q, k, v)

    def attend_camera(self, iteration: int, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return self._cut("attend_camera", (iteration, layer), q, k, v)

    def _cut(self, of: str, where: tuple[int, ...], *qkv: Tensor) -> Tensor:
        """Leave q, k and v where the question is put from, and go on with its answer."""
        like, key = qkv[0], (qkv[0].shape, qkv[0].dtype)
        if key not in self._tensors:
            batch, heads, tokens, dim = like.shape
            answer = like.new_empty(batch, tokens, heads, dim).transpose(1, 2)  # in the order of its use
            self._tensors[key] = like.new_empty(3, *like.shape), answer
        asked, answer = self._tensors[key]
        for place, tensor in zip(asked, qkv, strict=True):
            copy_rows(place, tensor)
        self.parts.append((self._tape.end(), Question(of, where, asked, answer)))
        self._tape.begin()
        return answer


class RecordedPass:
    """A pass over one number of frames of one size, not the first of a stream."""

    def __init__(self, forward: Forward, images: Tensor, points: bool, tape: Tape) -> None:
        """Records; `images` [B, S, 3, H, W] gives the shape. What `forward` looks up must exist already."""
        self._images, cutter = images.clone(), _Cutter(tape)
        with tape.recording():
            tape.begin()
            self._prediction = forward(self._images, cutter, points)
            self._last = tape.end()
        self._parts, self._announced = cutter.parts, cutter.announced

    def replay(self, images: Tensor, context: AttentionContext) -> Prediction:
        self._images.copy_(images)
        context.begin(*self._announced)
        for run, question in self._parts:
            run()
            question.put(context)
        self._last()
        return self._prediction.map(torch.clone)  # the next replay overwrites its own


class RecordedForward:
    """The forward of a network: a stream's first pass as it is, the others recorded at first sight.

    Keeps the passes of the latest image size. Where one cannot be recorded, a warning says why and that
    shape goes on unrecorded; `refusal` keeps the reason.
    """

    def __init__(self, forward: Forward, tape: Tape) -> None:
        self._forward, self._tape = forward, tape
        self.passes: dict[tuple[torch.Size, bool], RecordedPass | None] = {}
        self.refusal = ""

    @torch.inference_mode()
    def __call__(self, images: Tensor, context: AttentionContext, points: bool = False) -> Prediction:
        """As `CausalVGGT.forward`, without gradients."""
        key = images.shape, points
        recorded = self.passes.get(key) if context.frames_seen else None
        if recorded is not None:
            return recorded.replay(images, context)
        prediction = self._forward(images, context, points)  # also builds all that a recording looks up
        if context.frames_seen and key not in self.passes:
            kept = {k: p for k, p in self.passes.items() if k[0][-2:] == images.shape[-2:]}
            self.passes = {**kept, key: self._record(images, points)}
        return prediction

    def check(self, images: Tensor, context: AttentionContext) -> None:
        """RuntimeError where a recorded pass answers otherwise than the pass itself, or there is none."""
        if self.refusal:
            raise RuntimeError(self.refusal)
        plain, replayed = self._forward(images, context, False), self(images, context)
        for name in ("pose_encoding", "depth", "depth_confidence"):
            expected, found = getattr(plain, name), getattr(replayed, name)
            if not torch.allclose(expected, found, rtol=REPLAY_TOLERANCE, atol=REPLAY_TOLERANCE):
                worst = float((expected - found).abs().max())
                raise RuntimeError(f"a replayed pass differs from the pass itself by {worst:.3g} in {name}")

    def _record(self, images: Tensor, points: bool) -> RecordedPass | None:
        batch, frames, _, height, width = images.shape
        try:
            recorded = RecordedPass(self._forward, images, points, self._tape)
        except RuntimeError as cause:
            self.refusal = str(cause)
            logger.warning("passes over %d frames of %d×%d stay unrecorded: %s", frames, width, height, cause)
            return None
        logger.info("recorded the pass over %d frames of %d×%d", batch * frames, width, height)
        return recorded
