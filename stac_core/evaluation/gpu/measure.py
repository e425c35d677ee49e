"""Time device work, and measure the two ceilings it is held against."""

from __future__ import annotations

import datetime
import platform
import statistics
import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import triton

REPEATS, WARM_UP = 30, 3
FEWEST, SECONDS = 5, 0.5  # slow work is repeated less often
PAUSE = 4_000_000  # cycles of the device, about 2 ms


@dataclass(frozen=True)
class Ceilings:
    """What this device reached in a copy and in a matrix product; the roofline of everything else."""

    copy_bytes_per_s: float  # bytes read plus bytes written
    matmul_flop_per_s: float  # bfloat16, random operands


UNKNOWN = Ceilings(float("nan"), float("nan"))


def median_ms(
    work: Callable[[], object], device: torch.device, repeats: int = REPEATS, alone: bool = False
) -> float:
    """Median time of one call by CUDA events; NaN on a CPU, whose times would say nothing about a GPU.

    At most `repeats` times, fewer where one call is slow. Of short work most is the device's waiting for the
    host to launch; `alone`: the device pauses first, so that the host is ahead and only its own time counts.
    """
    if device.type != "cuda":
        work()
        return float("nan")
    for _ in range(WARM_UP):
        work()
    times: list[float] = []
    while len(times) < repeats and (len(times) < FEWEST or sum(times) < 1e3 * SECONDS):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        if alone:
            torch.cuda._sleep(PAUSE)
        begin.record()
        work()
        end.record()
        end.synchronize()
        times.append(begin.elapsed_time(end))
    return statistics.median(times)


def measure_ceilings(device: torch.device, megabytes: int = 4096, size: int = 8192) -> Ceilings:
    """A copy much larger than the caches, and a large square product."""
    return Ceilings(_copy_rate(device, megabytes), _product_rate(device, size))


def _copy_rate(device: torch.device, megabytes: int) -> float:
    source = torch.randn(megabytes * 2**18, device=device)
    target = torch.empty_like(source)
    return 2 * source.nbytes / median_ms(lambda: target.copy_(source), device) * 1e3


def _product_rate(device: torch.device, size: int) -> float:
    a, b = torch.randn(2, size, size, device=device, dtype=torch.bfloat16)
    out = torch.empty_like(a)
    return 2 * size**3 / median_ms(lambda: torch.mm(a, b, out=out), device) * 1e3


@contextmanager
def poisoned_memory() -> Iterator[None]:
    """Inside, every new tensor starts as NaN: an element that nobody writes cannot look right."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True  # type: ignore[attr-defined]
    try:
        if not bool(torch.empty(8).isnan().all()):
            raise RuntimeError(f"PyTorch {torch.__version__} does not fill new tensors with NaN")
        yield
    finally:
        torch.use_deterministic_algorithms(False)


def describe(device: torch.device) -> dict[str, str]:
    """What the figures were measured on."""
    about = {
        "date": datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%d %H:%M UTC"),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "cuda": str(torch.version.cuda),
        "triton": triton.__version__,
        "device": platform.processor() or platform.machine(),
        "driver": "none",
    }
    if device.type == "cuda":
        about["device"] = torch.cuda.get_device_name(device)
        query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
        about["driver"] = subprocess.run(query, capture_output=True, text=True).stdout.strip().splitlines()[0]
    return about
