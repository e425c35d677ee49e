"""A GPU that is none: tensors that say they are on `cuda`, keep their numbers on the host, and refuse as a
real one would to be mixed with tensors of the host. For tests that tell host from device without a device.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

GPU = torch.device("cuda", 0)
aten = torch.ops.aten
MOVES = (aten.copy_.default, aten._to_copy.default)
INDEXING = (aten.index.Tensor, aten.index_put.default, aten.index_put_.default, aten._index_put_impl_.default)


class OnGpu(Tensor):
    """A tensor of the pretended GPU; `held` has its numbers.

    PyTorch without CUDA cannot enter that device, which some methods written by hand try: these are given
    here anew.
    """

    held: Tensor
    __torch_function__ = torch._C._disabled_torch_function_impl

    @staticmethod
    def __new__(cls, held: Tensor) -> OnGpu:
        layout = {"strides": held.stride(), "storage_offset": held.storage_offset()}
        made = Tensor._make_wrapper_subclass(cls, held.shape, dtype=held.dtype, device=GPU, **layout)
        made.held = held
        return made

    @classmethod
    def __torch_dispatch__(cls, function, types, arguments=(), named=None):
        return _run(function, arguments, named or {})

    def __getitem__(self, index):
        with torch._C._DisableTorchDispatch():
            return OnGpu(self.held[_held(index, {}, [])])

    def __setitem__(self, index, value):
        known, strangers = {}, []
        by = _held(index, known, strangers)
        if (known or strangers) and isinstance(value, Tensor) and not isinstance(value, OnGpu):
            _refuse("indexed assignment", [value])
        with torch._C._DisableTorchDispatch():
            self.held[by] = _held(value, {}, [])

    def __invert__(self):
        return torch.bitwise_not(self)

    def copy_(self, source, non_blocking=False):
        return aten.copy_.default(self, source)

    def contiguous(self):
        return OnGpu(self.held.contiguous())

    def nonzero(self):
        return OnGpu(self.held.nonzero())

    def tolist(self):
        return self.held.tolist()

    def __int__(self):
        return int(self.held)

    __index__ = __int__

    def __float__(self):
        return float(self.held)


class _Factories(TorchDispatchMode):
    """Catches what makes tensors, and what has none of the GPU among its arguments."""

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # to guard each operation from the compiler takes as long as the operation

    def __torch_dispatch__(self, function, types, arguments=(), named=None):
        return _run(function, arguments, named or {})


def _run(function: Any, arguments: tuple[Any, ...], named: dict[str, Any]) -> Any:
    """One operation, on the host; its result is on the device on which a GPU would have left it."""
    if function is aten._fused_sdp_choice.default:
        return 0  # plain attention: the fused ones of the host are other operations than those of a GPU
    known: dict[int, OnGpu] = {}
    strangers: list[Tensor] = []
    given = [_held(x, known, strangers) for x in arguments]
    given_by_name = {name: _held(x, known, strangers) for name, x in named.items()}
    result_on_gpu = bool(known)
    if function in INDEXING and isinstance(arguments[0], OnGpu):  # may be indexed from the host
        strangers = [x for x in arguments[2:] if isinstance(x, Tensor) and not isinstance(x, OnGpu)]
        _refuse(function, strangers)
    elif result_on_gpu and strangers and function not in MOVES:
        _refuse(function, strangers)
    if function is aten.copy_.default:
        result_on_gpu = isinstance(arguments[0], OnGpu)
    if (device := named.get("device")) is not None:
        result_on_gpu = torch.device(device).type == "cuda"
        given_by_name["device"] = "cpu"
        if "pin_memory" in named:
            given_by_name["pin_memory"] = False
    result = function(*given, **given_by_name)
    return _to_gpu(result, known) if result_on_gpu else result


def _refuse(function: Any, strangers: list[Tensor]) -> None:
    """Numbers alone, of shape [], may come from the host."""
    shapes = [tuple(x.shape) for x in strangers if x.ndim]
    if shapes:
        raise RuntimeError(f"{function}: tensors of the host, of shapes {shapes}, beside some of the GPU")


def _held(x: Any, known: dict[int, OnGpu], strangers: list[Tensor]) -> Any:
    """What an operation takes, on the host; `known` gets what of it is on the GPU, `strangers` what is not.

    `tree_map` of PyTorch would take many times as long: operations take and give but lists and tuples.
    """
    if isinstance(x, OnGpu):
        known[id(x.held)] = x
        return x.held
    if isinstance(x, Tensor):
        strangers.append(x)
    elif isinstance(x, list | tuple):
        return type(x)([_held(item, known, strangers) for item in x])
    return x


def _to_gpu(x: Any, known: dict[int, OnGpu]) -> Any:
    """What an operation gives; what it has changed in place is known."""
    if isinstance(x, Tensor):
        return known[id(x)] if id(x) in known else OnGpu(x)
    return type(x)([_to_gpu(item, known) for item in x]) if isinstance(x, list | tuple) else x


class _Event:
    """A moment that has passed."""

    def __init__(self, enable_timing: bool = False) -> None:
        pass

    def record(self, stream: object = None) -> None:
        pass

    def synchronize(self) -> None:
        pass

    def query(self) -> bool:
        return True

    def elapsed_time(self, later: _Event) -> float:
        return 1.0


class _Stream:
    def record_event(self) -> _Event:
        return _Event()


class _Generator(torch.Generator):
    def __new__(cls, device: object = None) -> _Generator:
        return super().__new__(cls)


@contextmanager
def pretended_gpu(patch: pytest.MonkeyPatch) -> Iterator[None]:
    """Within, `cuda` is the pretended GPU. Inference mode, which wants real tensors, only turns
    gradients off."""
    to, inference = Tensor.to, torch.inference_mode

    def to_gpu_too(tensor: Tensor, *arguments: Any, **named: Any) -> Tensor:
        wanted = [x for x in (*arguments, named.get("device")) if isinstance(x, str | torch.device)]
        if any(torch.device(x).type == "cuda" for x in wanted):
            return tensor if isinstance(tensor, OnGpu) else OnGpu(tensor.clone())
        return to(tensor, *arguments, **named)

    patch.setattr(torch.cuda, "_lazy_init", lambda: None)
    patch.setattr(torch.cuda, "Event", _Event)
    patch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(total_memory=8 << 30))
    patch.setattr(torch.cuda, "synchronize", lambda device=None: None)
    patch.setattr(torch.cuda, "mem_get_info", lambda device: (8 << 30, 8 << 30))
    patch.setattr(torch.cuda, "current_stream", lambda device=None: _Stream())
    patch.setattr(torch, "Generator", _Generator)
    patch.setattr(Tensor, "pin_memory", lambda tensor: tensor)
    patch.setattr(Tensor, "to", to_gpu_too)
    patch.setattr(inference, "__enter__", lambda mode: torch._C._set_grad_enabled(False))
    patch.setattr(inference, "__exit__", lambda mode, *error: None)
    torch._C._set_only_lift_cpu_tensors(True)  # a tensor made from a list is made on the host, then moved
    try:
        with _Factories(), torch.no_grad():
            yield
    finally:
        torch._C._set_only_lift_cpu_tensors(False)


def move(network: nn.Module) -> None:
    """All weights onto the pretended GPU; within `pretended_gpu`."""
    for module in network.modules():
        for held in (module._parameters, module._buffers):
            held.update({name: OnGpu(value.detach()) for name, value in held.items() if value is not None})
