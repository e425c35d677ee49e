"""What Triton compiles while a stream runs: nothing, once its first chunks have been through."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest


@pytest.fixture(scope="module")
def launches() -> dict[str, list[list[str]]]:
    """The kernels of series of calls, as far as Triton tells them apart: all from one process, which takes
    longer to start than to tell."""
    script = Path(__file__).with_name("launches_triton.py")
    environment = {**os.environ, "PYTHONPATH": str(script.parents[2])}
    environment.pop("TRITON_INTERPRET", None)
    done = subprocess.run([sys.executable, script], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout)


@pytest.fixture
def passes(launches) -> list[list[str]]:
    """Of the attention of a stream whose chunks and memory vary."""
    return launches["passes"]


def test_after_the_chunks_of_a_warm_up_nothing_is_compiled(passes):
    """Three passes over four frames, whose keys are not split; then fewer frames, whose keys mostly are."""
    seen = set().union(*passes[:3])
    split = ["_combine_kernel" in " ".join(launched) for launched in passes[3:]]
    assert any(split) and not all(split)
    assert set().union(*passes[3:]) <= seen


def test_a_kernel_for_later_runs_once_only(passes):
    """Besides forward and mass, passes over segments seen before launch nothing that is not theirs."""
    assert [len(launched) for launched in passes[:3]] == [4, 4, 4]
    assert {len(launched) for launched in passes[3:]} == {2, 3}


def test_a_store_that_grows_compiles_nothing(launches):
    """From one page to 35, with other numbers of rows and tokens every time."""
    first, *later = launches["stores"]
    assert len(first) == len(set(first)) == 5
    assert all(launched == first for launched in later)


def test_anchors_that_grow_compile_nothing(launches):
    """Other numbers of anchors, leaving tokens and places every time, which lie elsewhere in the window.

    Rows of 128, 64 and 4 bytes are taken.
    """
    first, *later = launches["anchors"]
    assert len(first) == 8 and len(set(first)) == 2 + 3
    assert all(set(launched) <= set(first) for launched in later)


def test_frames_of_another_number_and_size_compile_nothing(launches):
    """After the probe: blocks whose batch is one frame or several, of any number of tokens."""
    probed, *later = launches["blocks"]
    assert len(set(probed)) == 3  # attention to heads within a product is not another one
    assert all(set(launched) <= set(probed) for launched in later)


def test_cameras_of_another_number_compile_nothing(launches):
    """After one, two, four and eight: four products, each for as many rows as the next power of two."""
    *powers, three, seven, five, six = launches["camera"]
    assert [len(set(launched)) for launched in powers] == [4] * 4
    assert three == powers[2] and seven == five == six == powers[3]


def test_dense_heads_over_other_images_compile_nothing(launches):
    """Four norms and 32 convolutions in eleven kinds, whatever the size, for one frame and for several."""
    first, *later = launches["heads"]
    assert len(first) == 4 + 32 and len(set(first)) == 11
    assert all(launched == first for launched in later)
