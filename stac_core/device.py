"""Where a network runs and in which precision."""

from __future__ import annotations

import torch


def choose_device(name: str) -> torch.device:
    """auto = the GPU where there is one. ValueError for a device that this machine does not have."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise ValueError(f"model.device = {name!r} does not work here ({reason}); use auto or cpu") from error
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
    native = torch.cuda.get_device_capability(device) >= (8, 0)
    return torch.bfloat16 if native else torch.float16


def free_bytes(device: torch.device) -> int:
    """Memory that may still be allocated there."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    with open("/proc/meminfo") as file:
        kibibytes = dict(line.split(":") for line in file)["MemAvailable"].split()[0]
    return 1024 * int(kibibytes)
