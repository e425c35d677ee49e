"""The full-size network with random weights in `stac` mode: frames per second, memory, one step's profile."""

from __future__ import annotations

import re
import statistics
import time
from collections.abc import Callable
from functools import partial
from itertools import zip_longest
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from stac_core.cache.stream_cache import StreamCache
from stac_core.config import NETWORKS, CacheConfig, Config, ImageConfig, KernelConfig, SubmapConfig
from stac_core.device import choose_dtype
from stac_core.evaluation.gpu.measure import Ceilings
from stac_core.evaluation.gpu.stages import MASS_SHARE, flop_by_stage, time_stages
from stac_core.evaluation.gpu.waits import host_waits
from stac_core.network.causal_vggt import CausalVGGT
from stac_core.network.execution import (
    COMPILED,
    EAGER,
    RECORDED,
    choose_execution,
    prepare,
    stop_recording,
    undo,
)
from stac_core.network.initial_weights import initialise
from stac_core.network.recorded import RecordedForward
from stac_core.session import StreamSession

MERGED_CHUNKS = (4,) * 6 + (1,) * 9 + (2, 4, 4)
LATE = 30_000_000  # cycles of a GPU, more than a small pass takes
STEPS = 16  # timed together, of a stream that goes on: some retrieve and some do not
ROUNDS = 3
NAME_LENGTH = 110  # of a kernel; PyTorch's own tell apart late
CATEGORIES = {  # first match wins; names as PyTorch's profiler shows them
    "fused by the compiler": r"^triton_[a-z]+_fused|cpp_fused",
    "attention": r"flash|fmha|attend_forward|_forward_kernel|_combine_kernel|_attend_within_kernel|"
    "scaled_dot_product|attention",
    "key mass": r"attend_mass|_mass_kernel",
    "voxel merge": r"voxel_merge|_merge_kernel",
    "convolution": r"conv|cudnn|wgrad|dgrad|implicit|winograd",
    "linear layers": r"gemm|gemv|_few_rows_kernel|cutlass|cublas|nvjet|addmm|\bmm\b|bmm|linear",
    "norms": r"norm|_to_heads_kernel",
    "copies and gathers": r"memcpy|copy|cat|index|gather|scatter|sort|memset|fill|_(highest|take)_kernel",
    "element-wise": r"elementwise|add|mul|gelu|vectorized|reduce|triton",
}


def executions(setting: str, device: torch.device) -> list[str]:
    """As it is set first, which is what users get; then with less and less help, plainly last."""
    by_help = [RECORDED, COMPILED, EAGER]
    return by_help[by_help.index(choose_execution(setting, device)) :]


def random_network(name: str, device: torch.device) -> CausalVGGT:
    """Random weights, made where they stay: every operation of the trained network, geometry is noise."""
    with torch.device(device):
        network = CausalVGGT(NETWORKS[name])
    network = initialise(network, seed=0, drawn_on=device).set_precision(choose_dtype("auto", device))
    return network.to(device).eval().requires_grad_(False)


def stream(network: CausalVGGT, chunk: int, width: int, backend: str) -> StreamSession:
    """`stac` as a mapper runs it, with a quarter of the queries scored.

    Confidences of random weights stay near their minimum; without a limit all tokens reach the voxels.
    """
    cache = CacheConfig(mode="stac", chunk_size=chunk, subsample=MASS_SHARE, voxel_conf=0.0, edge_test=0.0)
    config = Config(image=ImageConfig(size=width), cache=cache, kernels=KernelConfig(backend=backend))
    return StreamSession(network, config)


class NetworkBench:
    """One network, run in one way after the other."""

    def __init__(
        self, model: str, shape: tuple[int, int], backend: str, ceilings: Ceilings, device: torch.device
    ) -> None:
        """shape = height and width of the frames."""
        self._network = random_network(model, device)
        self._model, self._shape, self._backend = model, shape, backend
        self._ceilings, self._device = ceilings, device
        self._on_gpu = device.type == "cuda"
        self._execution = EAGER
        self._streams: dict[tuple[str, int], tuple[StreamSession, list[np.ndarray]]] = {}

    def about(self) -> dict[str, Any]:
        parameters = sum(parameter.numel() for parameter in self._network.parameters())
        return {
            "model": self._model,
            "parameters": parameters,
            "dtype": str(choose_dtype("auto", self._device)),
        }

    def prepare(self, execution: str) -> list[dict[str, Any]]:
        """Run in this way from now on; RuntimeError with the cause where that cannot be."""
        started = time.perf_counter()
        self._streams.clear()  # their memories make room
        if self._execution == RECORDED and execution == COMPILED:
            stop_recording(self._network)
        else:
            undo(self._network)
            prepare(self._network, execution, KernelConfig(backend=self._backend))
        self._execution = execution
        return [{"execution": execution, "seconds": time.perf_counter() - started}]

    def measure(self, chunk: int) -> list[dict[str, Any]]:
        """A step after the memory has filled: median of several rounds, each the mean of many steps."""
        session, images = self._filled(chunk)
        if self._on_gpu:
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats(self._device)
        times = [self._steps(session, images, STEPS if self._on_gpu else 1) for _ in range(ROUNDS)]
        seconds = statistics.median(map(statistics.mean, times)) if self._on_gpu else float("nan")
        flop = sum(flop_by_stage(self._network.config, chunk, self._shape).values())
        cache = session.stats().cache
        forward = self._network.forward
        peaks = [torch.cuda.max_memory_allocated, torch.cuda.max_memory_reserved] if self._on_gpu else []
        peak, reserved = [peak(self._device) / 2**30 for peak in peaks] or (float("nan"),) * 2
        return [
            {
                "execution": self._execution,
                "backend": session._kernels.backend,
                "chunk": chunk,
                "step_ms": seconds * 1e3,
                "frames_per_s": chunk / seconds,
                "slowest_ms": max(map(max, times)) * 1e3 if self._on_gpu else float("nan"),
                "gflop": flop / 1e9,
                "of_roofline": flop / seconds / self._ceilings.matmul_flop_per_s,
                "peak_gib": peak,
                "reserved_gib": reserved,
                "live_mib": cache.live_bytes / 2**20,
                "voxel_mib": cache.voxel_bytes / 2**20,
                "note": forward.refusal if isinstance(forward, RecordedForward) else "",
            }
        ]

    def stages(self, chunk: int) -> list[dict[str, Any]]:
        """Where one step's time goes, by stage. Nothing may be recorded: a replay has no stages."""
        session, images = self._filled(chunk)
        spent = time_stages(session, images, self._device, 5 if self._on_gpu else 1)
        flop, total = flop_by_stage(self._network.config, chunk, self._shape), sum(spent.values())
        rows: list[dict[str, Any]] = []
        for stage, ms in {**spent, "whole step": total}.items():
            work = sum(flop.values()) if stage == "whole step" else flop.get(stage, float("nan"))
            rate = work / ms * 1e3 / self._ceilings.matmul_flop_per_s if ms else float("nan")
            rows.append(
                {"stage": stage, "ms": ms, "share": ms / total, "gflop": work / 1e9, "of_roofline": rate}
            )
        return rows

    def kernels(self, chunk: int) -> list[dict[str, Any]]:
        """One step as it runs, by kind of kernel, and what is left of its wall time without any kernel.

        Each kind with the name of the kernel that took longest, and that one's time.
        On a CPU the operations take the place of kernels.
        """
        session, images = self._filled(chunk)
        activities = [ProfilerActivity.CPU] + ([ProfilerActivity.CUDA] if self._on_gpu else [])
        with profile(activities=activities) as recorded:
            wall_ms = 1e3 * self._step(session, images)
        spent: dict[str, list[tuple[float, int, str]]] = {}
        for event in recorded.key_averages():
            ms = (event.self_device_time_total if self._on_gpu else event.self_cpu_time_total) / 1e3
            if ms and (not self._on_gpu or event.device_type != torch.autograd.DeviceType.CPU):
                spent.setdefault(_category(event.key), []).append((ms, event.count, event.key))
        busy_ms = sum(ms for found in spent.values() for ms, _, _ in found)
        spent["none: the device waits"] = [(max(0.0, wall_ms - busy_ms), 0, "")]
        rows = []
        for kind, found in spent.items():
            (times, counts, _), (longest_ms, _, longest) = zip(*found, strict=True), max(found)
            ms, about = sum(times), f"{longest_ms:.2f} ms: {longest[:NAME_LENGTH]}" if longest else ""
            share = ms / max(wall_ms, busy_ms)
            rows.append({"kernels": kind, "count": sum(counts), "ms": ms, "share": share, "longest": about})
        return sorted(rows, key=lambda row: (row["count"] == 0, -row["ms"]))  # waiting last

    def waits(self, chunk: int) -> list[dict[str, Any]]:
        """The lines at which the host waits for the device within one step."""
        session, images = self._filled(chunk)
        return host_waits(lambda: session.step(images), self._device)

    def _filled(self, chunk: int) -> tuple[StreamSession, list[np.ndarray]]:
        """A stream in which evictions, merging and retrieval all take part, and images of its next step."""
        key = self._execution, chunk
        if key not in self._streams:
            session = stream(self._network, chunk, self._shape[1], self._backend)
            images = _images(chunk, self._shape)
            for _ in range(4 + 16 // chunk):
                session.step(images)
            self._streams = {key: (session, images)}  # one at a time: the memories are large
        return self._streams[key]

    def _steps(self, session: StreamSession, images: list[np.ndarray], count: int) -> list[float]:
        """Seconds from one step to the next in a stream that goes on, the device's last one included.

        The host may be ahead of the device: one such time says little, their mean is that of the device.
        """
        self._step(session, images)
        ends = [time.perf_counter()]
        for _ in range(count):
            session.step(images, upcoming=images)
            ends.append(time.perf_counter())
        if self._on_gpu:
            torch.cuda.synchronize(self._device)
        ends[-1] = time.perf_counter()
        return list(np.diff(ends))

    def _step(self, session: StreamSession, images: list[np.ndarray]) -> float:
        """Seconds until the device has done one step."""
        started = time.perf_counter()
        session.step(images, upcoming=images)
        if self._on_gpu:
            torch.cuda.synchronize(self._device)
        return time.perf_counter() - started


def check(device: torch.device, setting: str) -> list[dict[str, Any]]:
    """A stream of the embedded network's shape, run as the setting says, against operation by operation.

    The twice-rule: at most twice the error of the plain network in this dtype, against float32.
    """
    dtype = choose_dtype("auto", device)
    dtype = torch.bfloat16 if dtype == torch.float32 else dtype
    results: dict[str, Tensor] = {}
    for name, precision in {"float32": torch.float32, "eager": dtype, "as set": dtype}.items():
        network = initialise(CausalVGGT(NETWORKS["embedded"]), seed=0).set_precision(precision)
        network = network.to(device).eval().requires_grad_(False)
        execution = prepare(network, setting) if name == "as set" else "eager"
        results[name] = _poses_and_depth(network, "auto" if name == "as set" else "torch")
    errors = {
        name: float((result - results["float32"]).square().mean().sqrt()) for name, result in results.items()
    }
    allowed = 2 * errors["eager"]
    row = {"backend": execution, "case": "stream in chunks of 4 4 1 4 1 2", "what": "poses and depth"}
    rows = [{**row, "error": errors["as set"], "allowed": allowed, "passed": errors["as set"] <= allowed}]
    return [*rows, *({"backend": execution, **row} for row in _check_merging(network))]


def _check_merging(network: CausalVGGT) -> list[dict[str, Any]]:
    """Whether a stream that merges beside its passes says what one says that merges between them.

    Also where the device comes late to one of both: a mistake in their order may need that to be seen.
    """
    _poses_depth_and_voxels(network)  # records its passes; until then other kernels answer
    between, again = (_poses_depth_and_voxels(network, catch_up=lambda _: None) for _ in range(2))
    beside = {
        "as they come": _poses_depth_and_voxels(network),
        "merging late": _poses_depth_and_voxels(network, catch_up=_late(StreamCache.catch_up)),
        "passes late": _poses_depth_and_voxels(network, begin=_late(StreamCache.begin)),
    }
    allowed = float((again - between).abs().max())
    rows = []
    for when, said in beside.items():
        error = float((said - between).abs().max())
        case = f"stream in chunks of {' '.join(map(str, MERGED_CHUNKS))}, merged beside or between, {when}"
        what = "poses, depth and voxels"
        row = {"case": case, "what": what, "error": error, "allowed": allowed, "passed": error <= allowed}
        rows.append(row)
    return rows


def _late(work: Callable[..., None]) -> Callable[..., None]:
    """The same, once the device has been busy for a while on the stream on which it is called."""

    def late(*arguments: Any) -> None:
        if torch.cuda.is_available():
            torch.cuda._sleep(LATE)
        work(*arguments)

    return late


def _poses_depth_and_voxels(network: CausalVGGT, **replaced: Callable[..., None]) -> Tensor:
    """Of a stream whose voxels fill, merge and are retrieved. replaced: methods of its memory."""
    cache = CacheConfig(mode="stac", voxel_conf=0.0, edge_test=0.0, window_size=4, hh_size=1, voxel_size=0.1)
    session = StreamSession(network, Config(cache=cache, submap=SubmapConfig(reach=0.0)))
    for name, method in replaced.items():
        setattr(session._cache, name, partial(method, session._cache))
    images, parts = iter(_images(sum(MERGED_CHUNKS), (98, 126))), []
    chunks = [[next(images) for _ in range(count)] for count in MERGED_CHUNKS]
    for chunk, following in zip_longest(chunks, chunks[1:]):
        prediction = session.step(chunk, upcoming=following)
        parts += [prediction.pose_encoding.flatten(), prediction.depth.flatten()]
    stats = session.stats(members=True).cache
    numbers = (stats.voxels, stats.pivot_slots, stats.inserted, stats.merged, stats.buffered)
    return torch.cat([*parts, torch.tensor(numbers, device=parts[0].device)])


def _poses_and_depth(network: CausalVGGT, backend: str) -> Tensor:
    """Of a stream with shorter chunks in between, so that recordings of several sizes take turns."""
    config = Config(cache=CacheConfig(mode="window_kv"), kernels=KernelConfig(backend=backend))
    session, images = StreamSession(network, config), iter(_images(16, (98, 126)))
    parts = []
    for count in (4, 4, 1, 4, 1, 2):
        prediction = session.step([next(images) for _ in range(count)])
        parts += [prediction.pose_encoding.flatten(), prediction.depth.flatten()]
    return torch.cat(parts)


def _category(name: str) -> str:
    for category, pattern in CATEGORIES.items():
        if re.search(pattern, name, re.IGNORECASE):
            return category
    return "other"


def _images(chunk: int, shape: tuple[int, int]) -> list[np.ndarray]:
    random = np.random.default_rng(0)
    return [random.integers(0, 256, (*shape, 3), dtype=np.uint8) for _ in range(chunk)]
