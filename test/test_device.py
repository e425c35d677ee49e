"""Times are taken on the device that they are asked for."""

import time

import torch

from stac_core.device import Stopwatch


def test_times_on_the_host_are_those_of_the_clock():
    watch = Stopwatch(torch.device("cpu"))
    time.sleep(0.02)
    watch.mark()
    watch.mark()
    first, second = watch.milliseconds()
    assert first >= 20 > second >= 0


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
