"""Where a step's time goes: the parts of the GPU benchmark that a CPU can vouch for."""

import warnings

import pytest
import torch
from tiny import synthetic_frames, tiny_network

from stac_core.config import NETWORKS, CacheConfig, Config
from stac_core.evaluation.gpu.stages import STAGES, flop_by_stage, time_stages
from stac_core.evaluation.gpu.waits import host_waits
from stac_core.session import StreamSession

CPU = torch.device("cpu")
NOTICE = (
    "Synchronization debug mode is a prototype feature and does not yet detect all synchronizing operations"
)


def filled_session():
    session = StreamSession(tiny_network(), Config(cache=CacheConfig(mode="stac", chunk_size=2)))
    frames = synthetic_frames(16)
    for first in range(0, 14, 2):
        session.step(frames[first : first + 2])
    return session, frames[14:]  # of a step that retrieves


def test_every_stage_takes_part_and_the_clock_comes_off_again():
    session, images = filled_session()
    untouched = {name: set(vars(part)) for name, part in (("cache", session._cache), ("session", session))}
    spent = time_stages(session, images, CPU, 1)
    assert list(spent) == list(STAGES) and all(ms > 0 for ms in spent.values()), spent
    stats = session.stats()
    measured = stats.prepare_ms + stats.network_ms + stats.settle_ms
    assert measured <= sum(spent.values()) <= measured + 20
    assert untouched == {"cache": set(vars(session._cache)), "session": set(vars(session))}
    assert not any("forward" in vars(module) for module in session._network.modules())


def test_the_network_and_the_session_never_wait():
    """What waits is the cache's bookkeeping, after the forward pass."""
    session, images = filled_session()
    lines = [str(row["line"]) for row in host_waits(lambda: session.step(images), CPU)]
    assert lines and all(line.startswith(("cache/", "kernels/")) for line in lines), lines


def test_a_notice_about_looking_for_waits_is_no_wait(monkeypatch):
    """PyTorch gives it once per process, or with `torch.set_warn_always` each time."""
    modes = ["default"]

    def set_mode(mode):
        modes.append(mode)
        warnings.warn(NOTICE, stacklevel=1)

    def wait():
        if modes[-1] == "warn":
            warnings.warn("called a synchronizing CUDA operation", stacklevel=1)

    def work():
        wait()
        warnings.warn("something else", stacklevel=1)
        wait()

    monkeypatch.setattr(torch.cuda, "set_sync_debug_mode", set_mode)
    assert host_waits(work, torch.device("cuda")) == [{"line": "outside the package", "waits": 2}]
    assert modes == ["default", "warn", "default"]


def test_arithmetic_of_the_full_size_network():
    """TFLOP per frame at 518×392, as the backbone's table of costs has it."""
    counted = flop_by_stage(NETWORKS["stream3r"], 1, (392, 518))
    known = {
        "image encoder": 0.737,
        "frame blocks": 0.735,
        "global blocks": 0.629,
        "camera head": 0.0017,
        "dense heads": 0.226 * 0.95,  # the 1×1 convolutions before their resize save a twentieth
        "attention": 10
        * 0.1065
        * 4.5
        / 4,  # ten frames seen; scoring a quarter of the queries adds an eighth
    }
    assert set(counted) == set(known)
    for stage, tera in known.items():
        assert counted[stage] / 1e12 == pytest.approx(tera, rel=0.03), stage
