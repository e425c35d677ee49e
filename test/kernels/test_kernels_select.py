"""The choice of kernels: automatic, explicit, refused."""

from __future__ import annotations

import logging
from importlib.machinery import EXTENSION_SUFFIXES

import pytest
import torch

from stac_core.kernels import (
    attend_triton,
    attend_within_triton,
    cuda_library,
    few_rows_triton,
    gelu_triton,
    highest_torch,
    highest_triton,
    select,
    slots_torch,
    slots_triton,
    take_torch,
    take_triton,
    to_heads_triton,
)
from stac_core.kernels.attend import Segment


@pytest.fixture(autouse=True)
def forget_choices():
    select._select.cache_clear()


def test_auto_on_cpu_is_torch_and_says_so_once(caplog):
    caplog.set_level(logging.INFO)
    first, second = select.select_kernels("auto", "cpu"), select.select_kernels("auto", torch.device("cpu"))
    assert first is second and first.backend == "torch"
    assert [r.getMessage() for r in caplog.records] == [f"kernels: torch ({first.reason})"]
    assert "'cpu'" in first.reason


def test_the_choice_attends():
    x = torch.randn(2, 5, 16)
    assert select.select_kernels("torch", "cpu").attend(x, [Segment(x, x)]).out.shape == (2, 5, 16)


def test_moving_rows_is_of_the_chosen_backend_or_of_torch(monkeypatch):
    monkeypatch.setattr(attend_triton, "require", lambda device_type: None)
    own, other = select.select_kernels("triton", "cuda"), select.select_kernels("torch", "cpu")
    for kernels, modules in (
        (own, (slots_triton, highest_triton, take_triton)),
        (other, (slots_torch, highest_torch, take_torch)),
    ):
        slots, highest, take = modules
        assert (kernels.slots, kernels.highest, kernels.take) == (slots, highest.highest, take.take)


def test_blocks_have_kernels_of_triton_or_none(monkeypatch):
    monkeypatch.setattr(attend_triton, "require", lambda device_type: None)
    blocks = select.select_kernels("triton", "cuda").blocks
    assert blocks == select.BlockKernels(
        to_heads_triton.to_heads,
        attend_within_triton.attend_within,
        gelu_triton.gelu_,
        few_rows_triton.few_rows,
    )
    assert select.select_kernels("torch", "cuda").blocks is None


def test_an_explicit_choice_that_cannot_load_says_how_to_build_it():
    with pytest.raises(
        RuntimeError, match=r"(?s)'cuda' cannot run: .+; build it with .*pip install ./cuda_ext"
    ):
        select.select_kernels("cuda", "cpu")


def test_an_unknown_name_is_refused():
    with pytest.raises(ValueError, match="'metal': choose one of 'auto', 'torch', 'triton', 'cuda'"):
        select.select_kernels("metal", "cpu")


def test_a_library_that_does_not_load_says_why(monkeypatch, tmp_path):
    (tmp_path / f"stac_cuda{EXTENSION_SUFFIXES[0]}").write_text("of another machine")
    monkeypatch.syspath_prepend(tmp_path)
    cuda_library.load.cache_clear()
    with pytest.raises(
        RuntimeError, match=r"(?s)'cuda' cannot run: .*(invalid ELF|too short).*; build it with .*pip install"
    ):
        select.select_kernels("cuda", "cpu")


def test_auto_on_a_gpu_says_once_what_it_took_and_what_was_refused(monkeypatch, caplog):
    def refuse(device_type: str) -> None:
        raise RuntimeError("too old for this GPU")

    monkeypatch.setattr(attend_triton, "require", refuse)
    caplog.set_level(logging.INFO)
    chosen = select.select_kernels("auto", "cuda")
    assert select.select_kernels("auto", "cuda") is chosen
    assert [r.getMessage() for r in caplog.records] == [f"kernels: {chosen.backend} ({chosen.reason})"]
    assert "triton: too old for this GPU" in chosen.reason
    if chosen.backend == "torch":
        assert "cuda: " in chosen.reason
