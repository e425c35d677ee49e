"""Times are taken on the device that they are asked for."""

from types import SimpleNamespace

import pytest
import torch

from stac_core.device import Stopwatch, computes_in_bfloat16, free_bytes, host_buffer


def test_times_on_the_host_are_those_of_the_clock(monkeypatch):
    seconds = iter([10.0, 10.5, 10.75])
    monkeypatch.setattr("stac_core.device.time", SimpleNamespace(perf_counter=lambda: next(seconds)))
    watch = Stopwatch(torch.device("cpu"))
    watch.mark()
    watch.mark()
    assert watch.milliseconds() == [500, 250]


def test_moments_are_taken_on_the_watch_s_own_gpu(monkeypatch):
    """Not on the current one. This machine need not have a GPU: only the choice of the stream is tested."""
    recorded = []

    class Event:
        def __init__(self, enable_timing: bool) -> None:
            assert enable_timing

        def record(self, stream: object = "of the current device") -> None:
            recorded.append(stream)

    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: f"of {device}")
    watch = Stopwatch(torch.device("cuda:1"))
    watch.mark()
    assert recorded == ["of cuda:1", "of cuda:1"]


def test_what_a_gpu_is_sent_is_pinned_from_the_start(monkeypatch):
    asked = []
    monkeypatch.setattr(torch, "empty", lambda shape, **how: asked.append((shape, how)))
    for name in ("cpu", "cuda"):
        host_buffer((2, 3), torch.uint8, torch.device(name))
    (_, on_cpu), (_, on_gpu) = asked
    assert not on_cpu["pin_memory"] and on_gpu["pin_memory"]
    assert on_cpu["device"] == on_gpu["device"] == "cpu"


@pytest.mark.parametrize(
    ("capability", "expected"), [("AVX512", True), ("AVX2", False), ("DEFAULT", False), ("SVE256", False)]
)
def test_a_cpu_computes_in_bfloat16_where_it_has_instructions_for_it(monkeypatch, capability, expected):
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: capability)
    assert computes_in_bfloat16(torch.device("cpu")) == expected


@pytest.mark.parametrize(("capability", "expected"), [((7, 5), False), ((8, 0), True), ((9, 0), True)])
def test_so_does_a_gpu_since_ampere(monkeypatch, capability, expected):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    assert computes_in_bfloat16(torch.device("cuda")) == expected


def test_what_pytorch_only_keeps_for_later_is_free(monkeypatch):
    """Else a stream that follows another one in a process would be given less, or refused."""
    gpu = {"free": 2_000, "kept": 5_000, "busy": True}

    def empty_cache():
        assert not gpu["busy"]
        gpu["free"], gpu["kept"] = gpu["free"] + gpu["kept"], 0

    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: gpu.update(busy=False))
    monkeypatch.setattr(torch.cuda, "empty_cache", empty_cache)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (gpu["free"], 8_000))
    assert free_bytes(torch.device("cuda")) == 7_000
