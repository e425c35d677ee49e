"""A GPU that is none: tensors that say they are on `cuda`, keep their numbers on the host, and refuse as a
real one would to be mixed with tensors of the host. For tests that tell host from device without a device.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
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
        return OnGpu(self.held[_each(_held, index)])

    def __setitem__(self, index, value):
        if isinstance(value, Tensor) and any(isinstance(i, Tensor) for i in _leaves(index)):
            _refuse_strangers("indexed assignment", [value])
        self.held[_each(_held, index)] = _held(value)

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

    def __torch_dispatch__(self, function, types, arguments=(), named=None):
        return _run(function, arguments, named or {})


def _run(function: Any, arguments: tuple[Any, ...], named: dict[str, Any]) -> Any:
    """One operation, on the host; its result is on the device on which a GPU would have left it."""
    if function is aten._fused_sdp_choice.default:
        return 0  # plain attention: the fused ones of the host are other operations than those of a GPU
    tensors = [x for x in _leaves((*arguments, *named.values())) if isinstance(x, Tensor)]
    result_on_gpu = any(isinstance(x, OnGpu) for x in tensors)
    if function in INDEXING and isinstance(arguments[0], OnGpu):  # may be indexed from the host
        _refuse_strangers(function, [x for x in arguments[2:] if isinstance(x, Tensor)])
    elif result_on_gpu and function not in MOVES:
        _refuse_strangers(function, tensors)
    if function is aten.copy_.default:
        result_on_gpu = isinstance(arguments[0], OnGpu)
    if (device := named.get("device")) is not None:
        result_on_gpu = torch.device(device).type == "cuda"
        named = {**named, "device": "cpu", **({"pin_memory": False} if "pin_memory" in named else {})}
    result = function(*_each(_held, arguments), **{name: _each(_held, x) for name, x in named.items()})
    if not result_on_gpu:
        return result
    known = {id(x.held): x for x in tensors if isinstance(x, OnGpu)}  # what was changed in place
    return _each(lambda x: known.get(id(x), OnGpu(x)) if isinstance(x, Tensor) else x, result)


def _refuse_strangers(function: Any, tensors: list[Tensor]) -> None:
    """Numbers alone, of shape [], may come from the host."""
    strangers = [tuple(x.shape) for x in tensors if x.ndim and not isinstance(x, OnGpu)]
    if strangers:
        raise RuntimeError(f"{function}: tensors of the host, of shapes {strangers}, beside some of the GPU")


def _each(change: Callable[[Any], Any], x: Any) -> Any:
    """As `tree_map` of PyTorch, in a fraction of the time: operations take and give but lists and tuples."""
    if isinstance(x, (list, tuple)):
        return type(x)([_each(change, item) for item in x])
    return change(x)


def _leaves(x: Any) -> Iterator[Any]:
    if isinstance(x, (list, tuple)):
        for item in x:
            yield from _leaves(item)
    else:
        yield x


def _held(x: Any) -> Any:
    return x.held if isinstance(x, OnGpu) else x


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
