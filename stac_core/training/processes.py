"""One process, or several started by `torchrun`: who we are, and how to agree."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import distributed

from stac_core.device import choose_device
from stac_core.settings import in_one_line


@dataclass(frozen=True)
class Processes:
    """This process among its peers."""

    rank: int
    count: int
    device: torch.device

    @property
    def leads(self) -> bool:
        """Writes files and shows progress."""
        return self.rank == 0

    def any(self, flag: bool) -> bool:
        """True in every process as soon as one of them says so."""
        if self.count == 1:
            return flag
        vote = torch.tensor(float(flag), device=self.device)
        distributed.all_reduce(vote, op=distributed.ReduceOp.MAX)
        return bool(vote.item())

    def as_leader(self, number: float) -> float:
        """The number that the process of rank 0 holds, in every process."""
        if self.count == 1:
            return number
        shared = torch.tensor(number, dtype=torch.float64, device=self.device)
        distributed.broadcast(shared, src=0)
        return float(shared.item())


@contextmanager
def join_processes(device: str) -> Iterator[Processes]:
    """Join the group that `torchrun` announces in the environment; alone without it.

    device: auto = the GPU where there is one; cuda = of several GPUs, each process its own. ValueError for
    one that is not there.
    """
    count, local = int(os.environ.get("WORLD_SIZE", "1")), int(os.environ.get("LOCAL_RANK", "0"))
    if device == "cuda" or (device == "auto" and torch.cuda.is_available()):
        device = f"cuda:{local}"
    chosen = _gpu(device) if device.startswith("cuda") else choose_device(device, "TrainingConfig.device")
    if count > 1:
        distributed.init_process_group("nccl" if chosen.type == "cuda" else "gloo")
    try:
        yield Processes(int(os.environ.get("RANK", "0")), count, chosen)
    finally:
        if count > 1:
            distributed.destroy_process_group()


def _gpu(name: str) -> torch.device:
    """The GPU of that name, chosen for all that this process computes."""
    try:
        torch.cuda.set_device(torch.device(name))
    except (RuntimeError, AttributeError) as error:  # the latter of a PyTorch without CUDA
        raise ValueError(
            f"TrainingConfig.device = {name!r} does not work here ({in_one_line(error)}); use auto or cpu"
        ) from error
    return torch.device(name)
