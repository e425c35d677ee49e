"""Whole streams where host and device are kept apart as on a GPU: nothing mixes them, nothing is left behind.

What a GPU computes is not seen here: the numbers are those of the host.
"""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from pretended_gpu import OnGpu, move, pretended_gpu
from tiny import synthetic_frames, tiny_network
from walks import LAP, bundled, frames_of, images_of

from stac_core import Config, StreamSession, warm_up
from stac_core.config import CacheConfig, ImageConfig, KernelConfig, SubmapConfig, TrackingConfig
from stac_core.device import HostCopy

LENS = np.array([[60.0, 0, 32], [0, 60, 24], [0, 0, 1]])
SMALL = {"window_size": 2, "chunk_size": 2, "hh_size": 1, "retrieval_size": 1, "edge_test": 0.0}
STREAMS = {
    "stac": {},
    "16 bits": {"buffer_bits": 16, "pivot_bits": 16},
    "all coded": {"window_bits": 8, "anchor_bits": 8, "pinned_bits": 8, "retrieved_bits": 8},
    "by query": {"retrieve_by": "query"},
    "by distance": {"retrieve_by": "near", "prefetch": True},
    "points": {"positions": "points", "first_confidence": 0.5, "lost_confidence": 0.5},
    "rounded by chance": {"pivot_rounding": "stochastic", "pivot_bits": 4, "eviction": "random"},
    "spilled": {"memory_budget": 1, "host_budget": 10**7},
    "forgotten": {"memory_budget": 1, "when_full": "forget"},
    "posed again": {"repose_frames": 6},
    "in submaps": {"reach": 1e-6},
    "tracked": {"reach": 1e-6, "landmarks": 40},
    "tracked points": {"landmarks": 40, "positions": "points"},
    "xstream": {"mode": "xstream"},
    "window": {"mode": "window_kv"},
}


def budgeted(network, settings: dict) -> dict:
    """With a budget that leaves the voxels 100 000 bytes, where one is asked for."""
    if "memory_budget" not in settings:
        return settings
    try:
        session_of(network, settings).step(synthetic_frames(1, 48, 64))
    except ValueError as error:
        return {**settings, "memory_budget": int(str(error).rsplit(" ", 1)[-1]) + 100_000}
    raise AssertionError("a budget of one byte was taken")


def session_of(network, settings: dict) -> StreamSession:
    submap = SubmapConfig(settings.get("reach", 0.0))
    tracking = TrackingConfig(settings.get("landmarks", 0))
    settings = {name: value for name, value in settings.items() if name not in ("reach", "landmarks")}
    config = Config(
        cache=CacheConfig(**{"mode": "stac", **SMALL, **settings}),
        kernels=KernelConfig(backend="torch"),
        image=ImageConfig(size=70),
        submap=submap,
        tracking=tracking,
    )
    return StreamSession(network, config)


@pytest.mark.parametrize("settings", STREAMS.values(), ids=STREAMS)
def test_a_stream_keeps_host_and_device_apart(settings, tmp_path, monkeypatch):
    network, frames = tiny_network(), synthetic_frames(12, 48, 64)
    settings = budgeted(network, settings)
    with pretended_gpu(monkeypatch):
        network = copy.deepcopy(network)
        move(network)
        session = session_of(network, settings)
        for first in range(0, 6, 2):
            session.step(frames[first : first + 2], LENS)
        session.save(tmp_path / "stream")
        session.load(tmp_path / "stream")
        for first in range(6, 12, 2):
            prediction = session.step(frames[first : first + 2], LENS)
        if session.config.cache.repose_frames:
            session.repose(move_voxels=True)
            session.step(frames[:1])
        told = prediction.to_host()
        stats = session.stats()
    assert isinstance(prediction.depth, OnGpu) and not isinstance(told.depth, OnGpu)
    assert bool(told.depth.isfinite().all())
    assert stats.cache.frames_seen == (13 if "repose_frames" in settings else 12)
    assert stats.submaps == (6 if "reach" in settings else 1)
    assert bool(stats.landmarks) == ("landmarks" in settings)
    if "host_budget" in settings:
        assert stats.cache.spilled_voxels > 0


def test_what_is_said_leaves_the_device_before_the_memory_takes_it_in(monkeypatch):
    network, frames, order = tiny_network(), synthetic_frames(10, 48, 64), []

    class NotedCopy(HostCopy):
        def __init__(self, tensor):
            order.append("sent")
            super().__init__(tensor)

    with pretended_gpu(monkeypatch):
        move(network)
        session = session_of(network, {})
        for first in range(0, 8, 2):
            session.step(frames[first : first + 2])
        settle = session._settle
        monkeypatch.setattr(session, "_settle", lambda said: (order.append("settled"), settle(said)))
        monkeypatch.setattr("stac_core.prediction.HostCopy", NotedCopy)
        told = session.step(frames[8:], to_host=True)
    assert order == ["sent"] * 5 + ["settled"]
    assert not isinstance(told.depth, OnGpu) and bool(told.depth.isfinite().all())


def test_figures_of_a_stream_are_told_without_waiting_for_the_end_of_a_step(monkeypatch):
    """Times are those of the step before, as long as the device is at the last one."""
    network, frames = tiny_network(), synthetic_frames(10, 48, 64)
    with pretended_gpu(monkeypatch):
        move(network)
        session = session_of(network, {})
        for first in range(0, 10, 2):
            session.step(frames[first : first + 2])
        before, last = session._watches
        waited = []
        for watch in (before, last):
            event = watch._moments[-1]
            monkeypatch.setattr(event, "query", lambda watch=watch: watch is before)
            monkeypatch.setattr(event, "synchronize", lambda watch=watch: waited.append(watch))
        stats = session.stats()
    assert waited == [before] and stats.cache.frames_seen == 10 and stats.settle_ms > 0


def test_a_loop_is_closed_on_the_device(tmp_path, monkeypatch):
    frames = frames_of(LAP)
    images, lens = images_of(frames), frames[0].intrinsics
    with pretended_gpu(monkeypatch):
        network = copy.deepcopy(bundled())
        move(network)
        session = StreamSession(network, Config(kernels=KernelConfig(backend="torch")))
        said = [session.step(images[first : first + 4], lens).to_host() for first in range(0, 36, 4)]
        session.save(tmp_path / "stream")
        session.load(tmp_path / "stream")
        assert session.relocalize(images[38:39], lens)
        said.append(session.step(images[38:39], lens).to_host())
        loops = session.stats().loops
    assert loops == sum(p.moved is not None for p in said) > 0
    assert not said[-1].continues and said[-1].before is None
    assert bool(said[-1].pose_variance.isfinite().all())


def test_a_session_warms_up_on_the_device(monkeypatch):
    network = tiny_network()
    with pretended_gpu(monkeypatch):
        network = copy.deepcopy(network)
        move(network)
        warm_up(network, session_of(network, {}).config)


def test_the_pretended_gpu_refuses_what_a_gpu_refuses(monkeypatch):
    with pretended_gpu(monkeypatch):
        there, here = torch.zeros(3, device="cuda"), torch.arange(3)
        assert there.device.type == "cuda" and (there + 1).device.type == "cuda"
        assert there[here].device.type == "cuda"  # an index may come from the host
        for mixed in (
            lambda: there + here,
            lambda: torch.stack([there, here.float()]),
            lambda: here[there > 0],
        ):
            with pytest.raises(RuntimeError, match="beside some of the GPU"):
                mixed()
        there[0] = 2.0
        assert there.cpu().tolist() == [2.0, 0.0, 0.0]
