"""Passes recorded once and replayed: everything of a frame except the attention across frames.

For one number of frames a pass launches the same kernels every time, on the same shapes. Only what the
context does varies, because the past grows and shrinks. Where a context lends attention that finds the past
by itself, that is recorded with everything else. Elsewhere a pass is recorded by running the network with a
context that answers nothing, but ends one recording and begins the next; a replay runs the parts and asks
the real context in between. The network never notices, and the host launches one graph or a few dozen instead
of thousands of kernels (CUDA graphs: CUDA programming guide, section on graphs).
"""

from __future__ import annotations

import gc
import logging
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor

from stac_core.network.context import AttentionContext, LendingContext, Plan, RecordableAttention
from stac_core.prediction import Prediction
from stac_core.words import copy_rows

if TYPE_CHECKING:
    from stac_core.network.causal_vggt import CausalVGGT

Replay = Callable[[], None]
Coming = Callable[[], Tensor | None]

REPLAY_TOLERANCE = 0.01  # the same kernels on the same numbers; a library may choose another one

logger = logging.getLogger(__name__)


class Tape(Protocol):
    """What kernels are recorded on. Parts share memory, those beside others among themselves, so they are
    replayed in their order."""

    def recording(self) -> AbstractContextManager[None]:
        """Everything inside `with` belongs to one pass."""

    def begin(self, beside: bool = False) -> None:
        """From here on kernels are recorded, not run; `beside`: to be replayed beside others."""

    def end(self) -> Replay:
        """Up to here; → what runs them, on the memory they were recorded with."""

    def beside(self) -> AbstractContextManager[None]:
        """Everything launched inside `with` begins after all before, and goes on beside what comes after."""

    def join(self) -> None:
        """What is launched from here on begins after all that goes on beside."""

    def aside(self) -> AbstractContextManager[None]:
        """Made before others are launched and entered after that: everything launched inside begins after all
        before it was made. What is launched once it is left begins after all inside."""


class CudaTape:
    """CUDA graphs that share one pool of memory, or another one beside others."""

    def __init__(self, device: torch.device) -> None:
        self._pools = [torch.cuda.graph_pool_handle() for _ in range(2)]
        # Libraries have working memory of their own for each stream that they are recorded on. What a pass
        # cannot go on without comes first wherever there is room for one kernel only.
        self._streams = [torch.cuda.Stream(device, priority=priority) for priority in (-1, 0)]
        self._aside = torch.cuda.Stream(device)
        self._graph: torch.cuda.CUDAGraph | None = None  # being recorded

    @contextmanager
    def recording(self) -> Iterator[None]:
        gc.collect()  # nothing on the device may be freed by chance in between
        torch.cuda.synchronize(self._streams[0].device)
        outside = torch.cuda.current_stream(self._streams[0].device)
        try:
            yield
        except BaseException:
            self._abandon()
            raise
        finally:
            torch.cuda.set_stream(outside)
        torch.cuda.synchronize(self._streams[0].device)

    def _abandon(self) -> None:
        """After an error: leave the recording mode, and the memory to those who have recorded before."""
        graph, self._graph = self._graph, None
        if graph is not None:
            with suppress(RuntimeError):  # says that the recording is broken
                graph.capture_end()
        # To the allocator of some versions (2.11) a broken recording goes on for ever: it would neither empty
        # its cache nor draw on it where memory is short. Others say that there is none.
        for pool in self._pools:
            with suppress(RuntimeError):
                torch._C._cuda_endAllocateToPool(self._aside.device_index, pool)
        self._pools = [torch.cuda.graph_pool_handle() for _ in self._pools]

    def begin(self, beside: bool = False) -> None:
        torch.cuda.set_stream(self._streams[beside])
        self._graph = torch.cuda.CUDAGraph()
        self._graph.capture_begin(self._pools[beside], capture_error_mode="thread_local")

    def end(self) -> Replay:
        graph, self._graph = self._graph, None
        assert graph is not None
        graph.capture_end()
        return graph.replay

    @contextmanager
    def beside(self) -> Iterator[None]:
        # Tensors made in here may be used outside: their memory is given anew only in here, after the wait.
        beside = self._streams[1]
        beside.wait_stream(torch.cuda.current_stream(beside.device))
        with torch.cuda.stream(beside):
            yield

    def join(self) -> None:
        beside = self._streams[1]
        torch.cuda.current_stream(beside.device).wait_stream(beside)

    def aside(self) -> AbstractContextManager[None]:
        return self._after(torch.cuda.current_stream(self._aside.device).record_event())

    @contextmanager
    def _after(self, event: torch.cuda.Event) -> Iterator[None]:
        # Each stream is given memory anew by itself. What others had, and is given back in here, is given to
        # them again only once they wait below, as long as no other thread allocates on this device meanwhile.
        self._aside.wait_event(event)
        try:
            with torch.cuda.stream(self._aside):
                yield
        finally:
            torch.cuda.current_stream(self._aside.device).wait_stream(self._aside)


@dataclass(frozen=True)
class Question:
    """One call of the context. The tensors are shared by all questions of one shape."""

    of: str  # name of the context's method
    where: tuple[int, ...]  # layer, or iteration and layer
    asked: Tensor  # [3, B, heads, T, D] q, k and v
    answer: Tensor  # [B, heads, T, D]

    def put(self, context: AttentionContext) -> None:
        copy_rows(self.answer, getattr(context, self.of)(*self.where, *self.asked))


@dataclass(frozen=True)
class Stretch:
    """Parts of a recording, with what the context is asked after each but the last, if anything."""

    parts: list[tuple[Replay, Question | None]]
    last: Replay

    def __call__(self, context: AttentionContext, lend: Callable[[], None] | None = None) -> None:
        """lend: done before attention takes part, once the device is at what comes before that."""
        for run, question in self.parts:
            run()
            if lend is not None:
                lend()
                lend = None
            if question is not None:
                question.put(context)
        self.last()


class _Cutter:
    """The context of a recording: every question ends a part, unless it can be recorded."""

    frames_seen = 1  # a later frame than the first

    def __init__(self, tape: Tape, attention: RecordableAttention | None) -> None:
        """attention: what answers, without ending anything, where it can be recorded too."""
        self._parts: list[tuple[Replay, Question | None]] = []
        self.announced = (0, 0)  # frames, tokens of each
        self._tape, self._attention = tape, attention
        self._tensors: dict[tuple[torch.Size, torch.dtype], tuple[Tensor, Tensor]] = {}

    def take(self) -> Stretch:
        """All parts so far; the last one ends here."""
        parts, self._parts = self._parts, []
        return Stretch(parts, self._tape.end())

    def begin(self, frames: int, tokens_per_frame: int) -> None:
        self.announced = frames, tokens_per_frame

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        if self._attention is not None:
            if layer & (layer - 1) == 0:  # no part takes longer to launch than those before it take to run
                self._end_part(None)
            return self._attention.attend(layer, q, k, v)
        return self._cut("attend", (layer,), q, k, v)

    def attend_camera(self, iteration: int, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        if self._attention is not None:
            return self._attention.attend_camera(iteration, layer, q, k, v)
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
        self._end_part(Question(of, where, asked, answer))
        return answer

    def _end_part(self, question: Question | None) -> None:
        self._parts.append((self._tape.end(), question))
        self._tape.begin()


class RecordedPass:
    """A pass over one number of frames of one size, not the first of a stream."""

    def __init__(
        self, network: CausalVGGT, images: Tensor, points: bool, plan: Plan | None, tape: Tape
    ) -> None:
        """Records; `images` [B, S, 3, H, W] gives the shape. What the network looks up must exist already.

        plan: of attention that becomes part of the recording.
        """
        self._images, self._tape, size = images.clone(), tape, images.shape[-2:]
        self._encoded: Tensor | None = None  # images whose tokens are ready, or will be
        self._attention = plan.open(images.device) if plan is not None else None
        cutter = _Cutter(tape, self._attention)
        if self._attention is not None:  # its kernels have to be built
            _ask_everything(network, self._images, self._attention)
        with tape.recording():
            tape.begin(beside=True)
            encoded = network.aggregator.encode(self._images)
            self._encode = tape.end()
            tape.begin()
            tokens = network.aggregator.relate(encoded, size, cutter)
            self._relate, self._announced = cutter.take(), cutter.announced
            tape.begin()
            self._cameras = network.cameras(tokens, size, cutter)
            self._locate = cutter.take()
            tape.begin(beside=True)
            self._surfaces = network.surfaces(tokens, size, points)
            if self._attention is not None:
                self._attention.finish()
            self._measure = tape.end()

    def encode(self, images: Tensor) -> None:
        """All that a pass does without a context."""
        self._images.copy_(images)
        self._encode()
        self._encoded = images

    def forget(self) -> None:
        """Another pass is to be replayed, on the same memory: what this one has begun with is lost."""
        self._encoded = None

    def replay(self, images: Tensor, context: AttentionContext, coming: Coming | None) -> Prediction:
        """coming: makes the images of the pass that follows."""
        aside = self._tape.aside()
        if self._encoded is None or not self._encoded.is_set_to(images):
            self._tape.join()
            self.encode(images)
        self._encoded = None
        context.begin(*self._announced)
        self._tape.join()  # only now, so that the encoder goes on beside what a context begins with
        lend = None
        if self._attention is not None and isinstance(context, LendingContext):
            lend = partial(context.lend, self._attention)
        self._relate(context, lend)
        with self._tape.beside():
            self._measure()
            surfaces = _copies(self._surfaces)
        self._locate(context)
        cameras = _copies(self._cameras)
        self._tape.join()
        if coming is not None:  # not earlier: the small kernels of the camera head would wait for large ones
            self._begin_with(coming)
        if isinstance(context, LendingContext):
            with aside:
                context.catch_up()
        return Prediction(**cameras, **surfaces)

    def _begin_with(self, coming: Coming) -> None:
        """Beside what follows this pass."""
        with self._tape.beside():
            following = coming()
            if following is not None and following.shape == self._images.shape:
                self.encode(following)


def _ask_everything(network: CausalVGGT, images: Tensor, attention: RecordableAttention) -> None:
    """One pass that is not recorded."""
    context = _Unrecorded(attention)
    network.cameras(network.aggregator(images, context), images.shape[-2:], context)
    attention.finish()


class _Unrecorded:
    """A context that answers by attention that can be recorded."""

    frames_seen = 1

    def __init__(self, attention: RecordableAttention) -> None:
        self.attend, self.attend_camera = attention.attend, attention.attend_camera

    def begin(self, frames: int, tokens_per_frame: int) -> None:
        pass


def _copies(tensors: dict[str, Tensor]) -> dict[str, Any]:
    """The next replay overwrites its own."""
    return {name: tensor.clone() for name, tensor in tensors.items()}


class RecordedForward:
    """The forward of a network: a stream's first pass as it is, the others recorded at first sight.

    Keeps the passes of the latest image size. Where one cannot be recorded, a warning says why and that
    shape goes on unrecorded; `refusal` keeps the reason.
    """

    def __init__(self, network: CausalVGGT, tape: Tape) -> None:
        self._network, self._forward, self._tape = network, network.forward, tape
        self.passes: dict[tuple[torch.Size, bool, Plan | None], RecordedPass | None] = {}
        self.refusal = ""
        self._coming: Coming | None = None

    @torch.inference_mode()
    def __call__(self, images: Tensor, context: AttentionContext, points: bool = False) -> Prediction:
        """As `CausalVGGT.forward`, without gradients."""
        plan = context.plan() if isinstance(context, LendingContext) else None
        key = images.shape, points, plan
        recorded = self.passes.get(key) if context.frames_seen else None
        coming, self._coming = self._coming, None
        if recorded is not None:
            for other in self.passes.values():
                if other is not None and other is not recorded:
                    other.forget()
            return recorded.replay(images, context, coming)
        self._tape.join()
        prediction = self._forward(images, context, points)  # also builds all that a recording looks up
        if context.frames_seen and key not in self.passes:
            kept = {k: p for k, p in self.passes.items() if k[0][-2:] == images.shape[-2:]}
            self.passes = {**kept, key: self._record(images, points, plan)}
        return prediction

    def foresee(self, images: Coming) -> None:
        """As `CausalVGGT.foresee`; a pass begins with images of the shape of its own."""
        self._coming = images

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

    def _record(self, images: Tensor, points: bool, plan: Plan | None) -> RecordedPass | None:
        batch, frames, _, height, width = images.shape
        try:
            recorded = RecordedPass(self._network, images, points, plan, self._tape)
        except RuntimeError as cause:
            self.refusal = str(cause)
            logger.warning("passes over %d frames of %d×%d stay unrecorded: %s", frames, width, height, cause)
            return None
        logger.info("recorded the pass over %d frames of %d×%d", batch * frames, width, height)
        return recorded
