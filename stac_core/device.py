"""Where a network runs, in which precision, and how long it takes there."""

from __future__ import annotations

import itertools
import time

import torch
from torch import Tensor

from stac_core.host_memory import available_bytes


def choose_device(name: str, setting: str = "model.device") -> torch.device:
    """auto = the GPU where there is one. ValueError for a device that this machine does not have.

    setting: that says so, for the message.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise ValueError(f"{setting} = {name!r} does not work here ({reason}); use auto or cpu") from error
    return device


def choose_dtype(name: str, device: torch.device) -> torch.dtype:
    """auto = bfloat16 where the GPU computes in it, float16 on older GPUs, float32 on the CPU.

    ValueError for float16 on the CPU, which has no fast arithmetic for it.
    """
    if name == "float16" and device.type == "cpu":
        raise ValueError("model.dtype = 'float16' needs a GPU; on the CPU use float32 or bfloat16")
    if name != "auto":
        dtype = getattr(torch, name)
        assert isinstance(dtype, torch.dtype)  # the choices of ModelConfig.dtype
        return dtype
    if device.type != "cuda":
        return torch.float32
    return torch.bfloat16 if computes_in_bfloat16(device) else torch.float16


def computes_in_bfloat16(device: torch.device) -> bool:
    """Whether it has instructions for that; without them a CPU takes fifty times as long as in float32."""
    if device.type == "cuda":
        return torch.cuda.get_device_capability(device) >= (8, 0)
    return "AVX512" in torch.backends.cpu.get_cpu_capability()


def free_bytes(device: torch.device) -> int | None:
    """Memory that nobody has taken there; None where the system does not say.

    Of a GPU, PyTorch first gives back what it only keeps for later use, as of streams that are gone.
    """
    if device.type == "cuda":
        torch.cuda.synchronize(device)  # other streams may still read what has been freed
        torch.cuda.empty_cache()
        return int(torch.cuda.mem_get_info(device)[0])
    return available_bytes()


def total_bytes(device: torch.device) -> int | None:
    """Memory that a GPU has; None on the CPU."""
    return torch.cuda.get_device_properties(device).total_memory if device.type == "cuda" else None


def host_buffer(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """A tensor of the host to be filled, sent and dropped; pinned already where `send` would pin a copy.

    What has been sent may still be under way: dropped, its memory is given to nobody before it has arrived
    (PyTorch sees to that), but it must not be written into again.
    """
    return torch.empty(shape, dtype=dtype, device="cpu", pin_memory=device.type == "cuda")


def send(tensor: Tensor, device: torch.device) -> Tensor:
    """A tensor of the host on the device, without waiting for what the device is at."""
    if device.type != "cuda":
        return tensor.to(device)
    return tensor.pin_memory().to(device, non_blocking=True)


class HostCopy:
    """A copy of a tensor on the host, begun now; a tensor that is there already stays itself."""

    def __init__(self, tensor: Tensor) -> None:
        self._copy, self._there = tensor, None
        if tensor.device.type == "cuda":
            self._copy = torch.empty_like(tensor, device="cpu", pin_memory=True)
            self._copy.copy_(tensor, non_blocking=True)
            self._there = torch.cuda.current_stream(tensor.device).record_event()

    def take(self) -> Tensor:
        """Waits for it, but not for what the device was asked for later."""
        if self._there is not None:
            self._there.synchronize()
        return self._copy


class Stopwatch:
    """Moments in the order in which the device reaches them; taking one never waits for the device."""

    def __init__(self, device: torch.device) -> None:
        self._device, self._on_gpu = device, device.type == "cuda"
        self._moments: list[float | torch.cuda.Event] = []
        self.mark()

    def mark(self) -> None:
        """Everything asked of the device so far lies before this moment."""
        if not self._on_gpu:
            self._moments.append(time.perf_counter())
            return
        event = torch.cuda.Event(enable_timing=True)
        event.record(torch.cuda.current_stream(self._device))  # that of another GPU may be the current one
        self._moments.append(event)

    @property
    def passed(self) -> bool:
        """Whether the device has passed the last moment."""
        return not self._on_gpu or self._moments[-1].query()  # type: ignore[union-attr]

    def milliseconds(self) -> list[float]:
        """Between neighbouring moments; waits until the device has passed the last one."""
        if self._on_gpu:
            self._moments[-1].synchronize()  # type: ignore[union-attr]
        return [_between(a, b) for a, b in itertools.pairwise(self._moments)]


def _between(a: float | torch.cuda.Event, b: float | torch.cuda.Event) -> float:
    if isinstance(a, torch.cuda.Event):
        return a.elapsed_time(b)  # type: ignore[arg-type]
    return 1e3 * (b - a)  # type: ignore[operator]
