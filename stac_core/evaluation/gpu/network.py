"""The full-size network with random weights in `stac` mode: frames per second, memory, one step's profile."""

from __future__ import annotations

import re
import statistics
import time

import numpy as np
import torch
from torch.profiler import ProfilerActivity, profile

from stac_core.config import NETWORKS, CacheConfig, Config, ImageConfig, KernelConfig
from stac_core.device import choose_dtype
from stac_core.evaluation.gpu.measure import Ceilings
from stac_core.network.causal_vggt import CausalVGGT
from stac_core.network.initial_weights import initialise
from stac_core.session import StreamSession

CATEGORIES = {  # first match wins; names as PyTorch's profiler shows them
    "attention": r"flash|fmha|attend_forward|_forward_kernel|scaled_dot_product|attention",
    "key mass": r"attend_mass|_mass_kernel",
    "voxel merge": r"voxel_merge|_merge_kernel",
    "convolution": r"conv|cudnn|wgrad|dgrad|implicit|winograd",
    "linear layers": r"gemm|gemv|cutlass|cublas|nvjet|addmm|\bmm\b|bmm|linear",
    "norms": r"norm",
    "copies and gathers": r"memcpy|copy|cat|index|gather|scatter|sort|memset|fill",
    "element-wise": r"elementwise|add|mul|gelu|vectorized|reduce|triton",
}


def build_network(name: str, device: torch.device) -> CausalVGGT:
    """Random weights: every operation of the trained network, geometry is noise."""
    network = initialise(CausalVGGT(NETWORKS[name]), seed=0)
    return network.set_precision(choose_dtype("auto", device)).to(device).eval().requires_grad_(False)


def stream(network: CausalVGGT, chunk: int, width: int, backend: str) -> StreamSession:
    """`stac` as a mapper runs it, with a quarter of the queries scored.

    Confidences of random weights stay near their minimum; without a limit all tokens reach the voxels.
    """
    cache = CacheConfig(mode="stac", chunk_size=chunk, subsample=0.25, voxel_conf=0.0, edge_test=0.0)
    config = Config(image=ImageConfig(size=width), cache=cache, kernels=KernelConfig(backend=backend))
    return StreamSession(network, config)


def measure(
    network: CausalVGGT, chunk: int, shape: tuple[int, int], backend: str, steps: int, ceilings: Ceilings
) -> dict[str, object]:
    """Median step after the memory has filled; shape = height and width of the frames."""
    device = next(network.parameters()).device
    session = stream(network, chunk, shape[1], backend)
    images = _images(chunk, shape)
    warm_up = _warm_up(device, chunk)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    times = []
    for step in range(warm_up + steps):
        started = time.perf_counter()
        session.step(images)  # ends with the device idle
        if step >= warm_up:
            times.append(time.perf_counter() - started)
    seconds = statistics.median(times) if device.type == "cuda" else float("nan")
    flop = flop_per_frame(network, chunk, shape)
    return {
        "backend": backend,
        "chunk": chunk,
        "step_ms": seconds * 1e3,
        "frames_per_s": chunk / seconds,
        "of_roofline": flop * chunk / seconds / ceilings.matmul_flop_per_s,
        "peak_gib": torch.cuda.max_memory_allocated(device) / 2**30
        if device.type == "cuda"
        else float("nan"),
        "live_mib": session.stats().cache.live_bytes / 2**20,
        "voxel_mib": session.stats().cache.voxel_bytes / 2**20,
    }


def flop_per_frame(network: CausalVGGT, chunk: int, shape: tuple[int, int]) -> float:
    """Arithmetic of one frame: linear layers of the patch encoder and the aggregator, attention within
    frames and across the 9 kept frames, the chunk and the retrieved two; a quarter of a mass pass."""
    config = network.config
    tokens = config.special_tokens + (shape[0] // config.patch_size) * (shape[1] // config.patch_size)
    weights = sum(
        p.numel() for name, p in network.aggregator.named_parameters() if p.ndim == 2 and "token" not in name
    )
    linear = 2 * weights * tokens
    within = (config.encoder_blocks + config.layers) * 4 * tokens**2 * config.width
    context = 1 + 2 + 4 + chunk + 2
    across = config.layers * (4 + 2 * 0.25) * context * tokens**2 * config.width
    return linear + within + across


def profile_step(
    network: CausalVGGT, chunk: int, shape: tuple[int, int], backend: str
) -> list[dict[str, object]]:
    """Where one step's time goes, by kind of work; on a CPU the shares are those of the CPU."""
    device = next(network.parameters()).device
    session = stream(network, chunk, shape[1], backend)
    images = _images(chunk, shape)
    for _ in range(_warm_up(device, chunk)):
        session.step(images)
    on_gpu = device.type == "cuda"
    activities = [ProfilerActivity.CPU] + ([ProfilerActivity.CUDA] if on_gpu else [])
    with profile(activities=activities) as recorded:
        session.step(images)
    spent: dict[str, float] = {}
    for event in recorded.key_averages():
        ms = (event.self_device_time_total if on_gpu else event.self_cpu_time_total) / 1e3
        if ms and (not on_gpu or event.device_type != torch.autograd.DeviceType.CPU):
            spent[_category(event.key)] = spent.get(_category(event.key), 0.0) + ms
    total = sum(spent.values())
    order = sorted(spent.items(), key=lambda item: -item[1])
    return [{"work": name, "ms": ms, "share": ms / total} for name, ms in order]


def _warm_up(device: torch.device, chunk: int) -> int:
    """Steps until evictions, merging and retrieval all take part; a rehearsal needs the first ones only."""
    return 4 + 16 // chunk if device.type == "cuda" else 1


def _category(name: str) -> str:
    for category, pattern in CATEGORIES.items():
        if re.search(pattern, name, re.IGNORECASE):
            return category
    return "other"


def _images(chunk: int, shape: tuple[int, int]) -> list[np.ndarray]:
    random = np.random.default_rng(0)
    return [random.integers(0, 256, (*shape, 3), dtype=np.uint8) for _ in range(chunk)]
