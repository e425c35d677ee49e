"""cuda_ext's kernels on the host: build once, call through ctypes."""

from __future__ import annotations

import ctypes
import math
import shutil
import subprocess
from pathlib import Path

import pytest
import torch

from stac_core.kernels import cuda_library
from stac_core.kernels.attend import MOST_SEGMENTS

REPOSITORY = Path(__file__).parents[2]
SOURCES = Path(__file__).parent / "emulator"


def cuda_include() -> Path | None:
    """CUDA's headers (they also compile on the host), found beside nvcc."""
    nvcc = shutil.which("nvcc")
    for root in [Path(nvcc).resolve().parents[1]] if nvcc else []:
        for include in (root / "include", Path("/usr/local/cuda/include")):
            if (include / "cuda_bf16.h").exists():
                return include
    return None


def can_build() -> bool:
    return cuda_include() is not None and shutil.which("g++") is not None


def build(name: str, folder: Path) -> ctypes.CDLL:
    include = cuda_include()
    library = folder / f"{name}.so"
    command = ["g++", "-std=c++17", "-O1", "-shared", "-fPIC", "-Wall", "-Werror", "-Wno-unknown-pragmas"]
    command += [
        f"-I{REPOSITORY / 'cuda_ext'}",
        f"-I{include}",
        str(SOURCES / f"{name}.cpp"),
        "-o",
        str(library),
    ]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return ctypes.CDLL(str(library))


def stand_in(operators: object, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the Python of the CUDA backend run on a CPU as it is, down to its operators."""
    monkeypatch.setattr(torch.ops, "stac", operators, raising=False)
    monkeypatch.setattr(cuda_library, "REACHABLE", ("cpu",))


class Tokens(ctypes.Structure):
    _fields_ = [("data", ctypes.c_void_p), ("row_stride", ctypes.c_int64), ("token_stride", ctypes.c_int64)]


class Stored(ctypes.Structure):
    _fields_ = [
        ("tokens", Tokens),
        ("grid", Tokens),
        ("factor", ctypes.c_void_p),
        ("factor_row_stride", ctypes.c_int64),
    ]


class Segment(ctypes.Structure):
    _fields_ = [
        ("keys", Stored), ("values", Stored), ("bias", Tokens),
        ("length", ctypes.c_int), ("bits", ctypes.c_int),
    ]  # fmt: skip


class ForwardArguments(ctypes.Structure):
    _fields_ = [
        ("q", Tokens), ("segments", Segment * MOST_SEGMENTS), ("count", ctypes.c_int),
        ("out", ctypes.c_void_p), ("lse", ctypes.c_void_p),
        ("rows", ctypes.c_int), ("queries", ctypes.c_int), ("scale", ctypes.c_float),
    ]  # fmt: skip


class MassArguments(ctypes.Structure):
    _fields_ = [
        ("q", Tokens), ("segments", Segment * MOST_SEGMENTS), ("count", ctypes.c_int),
        ("lse", Tokens), ("mass", ctypes.c_void_p),
        *((name, ctypes.c_int) for name in ("rows", "queries", "columns")),
        *((name, ctypes.c_float) for name in ("scale", "factor")),
    ]  # fmt: skip


class EmulatedAttend:
    """Stands in for `torch.ops.stac`, every thread of every block a fiber of this process."""

    def __init__(self, library: ctypes.CDLL) -> None:
        self.library = library
        self.seed = 0
        library.attend_forward.restype = library.attend_mass.restype = ctypes.c_char_p

    def attend_forward(self, q, keys, key_grids, factors, values, value_grids, biases, bits):
        out, lse = torch.full(q.shape, math.nan, dtype=q.dtype), torch.full(q.shape[:2], math.nan)
        table = segment_table(keys, key_grids, factors, values, value_grids, biases, bits)
        arguments = ForwardArguments(
            tokens(q), table, len(keys), out.data_ptr(), lse.data_ptr(), *q.shape[:2], q.shape[-1] ** -0.5
        )
        self._run(self.library.attend_forward, arguments, q)
        return out, lse

    def attend_mass(self, q, keys, key_grids, factors, biases, bits, lse, factor):
        columns = torch.full((q.shape[0], sum(x.shape[1] for x in keys)), math.nan)
        nothing = [None] * len(keys)
        table = segment_table(keys, key_grids, factors, nothing, nothing, biases, bits)
        arguments = MassArguments(
            tokens(q), table, len(keys), tokens(lse), columns.data_ptr(),
            *q.shape[:2], columns.shape[1], q.shape[-1] ** -0.5, factor,
        )  # fmt: skip
        self._run(self.library.attend_mass, arguments, q)
        return columns

    def _run(self, function, arguments, q):
        self.seed += 1
        half = ctypes.c_bool(q.dtype == torch.float16)
        error = function(ctypes.byref(arguments), half, q.shape[-1], self.seed)
        assert error is None, error.decode()


def segment_table(keys, key_grids, factors, values, value_grids, biases, bits):
    table = (Segment * MOST_SEGMENTS)()
    columns = zip(keys, key_grids, factors, values, value_grids, biases, bits, strict=True)
    for i, (k, k_grid, factor, v, v_grid, bias, b) in enumerate(columns):
        table[i] = Segment(stored(k, k_grid, factor), stored(v, v_grid, None), tokens(bias), k.shape[1], b)
    return table


def tokens(x: torch.Tensor | None) -> Tokens:
    return Tokens(None, 0, 0) if x is None else Tokens(x.data_ptr(), x.stride(0), x.stride(1))


def stored(x: torch.Tensor | None, grid: torch.Tensor | None, factor: torch.Tensor | None) -> Stored:
    scaled = (None, 0) if factor is None else (factor.data_ptr(), factor.stride(0))
    return Stored(tokens(x), tokens(grid), *scaled)


class MergeArguments(ctypes.Structure):
    _fields_ = [
        *((f"{part}_{i}", ctypes.c_void_p) for part in ("before", "after") for i in range(8)),
        *(
            (n, ctypes.c_void_p)
            for n in ("order", "start", "keys", "values", "score", "score_left", "counts")
        ),
        *((name, ctypes.c_int) for name in ("rows", "pivots", "buffer", "dim")),
        *((name, ctypes.c_float) for name in ("threshold", "gate", "heaviest")),
    ]


class EmulatedMerge:
    """Stands in for `torch.ops.stac`, every lane of every warp a fiber of this process."""

    def __init__(self, library: ctypes.CDLL) -> None:
        self.library = library
        self.seed = 0
        library.voxel_merge.restype = ctypes.c_char_p

    def voxel_merge(self, state, order, start, keys, values, score, threshold, gate, heaviest):
        after = [torch.full_like(part, math.nan) for part in state]
        rows, pivots, dim = state[0].shape
        counts = torch.full((rows, 5), -(2**20), dtype=torch.int32)
        score_left = torch.full_like(score, math.nan)
        tensors = (*state, *after, order, start, keys, values, score, score_left, counts)
        arguments = MergeArguments(
            *(x.data_ptr() for x in tensors), rows, pivots, state[7].shape[1], dim, threshold, gate, heaviest
        )
        self.seed += 1
        error = self.library.voxel_merge(ctypes.byref(arguments), self.seed)
        assert error is None, error.decode()
        return [*after, counts]


MOST_PAGES = 32


class PageArgument(ctypes.Structure):
    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("keys", "key_grid", "values", "value_grid")),
        ("first", ctypes.c_int64),
    ]


class GatherArguments(ctypes.Structure):
    _fields_ = [
        ("pages", PageArgument * MOST_PAGES), ("count", ctypes.c_int), ("stop", ctypes.c_int64),
        ("bits", ctypes.c_int),
        *((name, ctypes.c_void_p) for name in ("slots", "members", "before", "wanted", "total", "factor")),
        *((name, ctypes.c_void_p) for name in ("keys", "values", "bias")),
        *((name, ctypes.c_int) for name in ("lanes", "candidates", "budget", "dim")),
        ("pad", ctypes.c_bool),
    ]  # fmt: skip


class EmulatedGather:
    """Stands in for `torch.ops.stac`, every thread a fiber of this process."""

    def __init__(self, library: ctypes.CDLL) -> None:
        self.library = library
        self.seed = 0
        library.gather.restype = ctypes.c_char_p

    def gather(
        self, keys, values, bias, page_keys, key_grids, page_values, value_grids, first, bits,
        slots, members, before, wanted, total, factor, pad,
    ):  # fmt: skip
        pages = (PageArgument * MOST_PAGES)()
        pages[0].first = stop = first
        for i, part in enumerate(zip(page_keys, key_grids, page_values, value_grids, strict=True)):
            pages[i] = PageArgument(*(None if x is None else x.data_ptr() for x in part), stop)
            stop += len(page_keys[i])
        tensors = (slots, members, before, wanted, total, factor, keys, values, bias)
        arguments = GatherArguments(
            pages, len(page_keys), stop, bits, *(None if x is None else x.data_ptr() for x in tensors),
            keys.shape[0], slots.shape[1], keys.shape[1], keys.shape[2], pad,
        )  # fmt: skip
        self.seed += 1
        kind = [torch.float16, torch.bfloat16, torch.float32].index(keys.dtype)
        error = self.library.gather(ctypes.byref(arguments), kind, self.seed)
        assert error is None, error.decode()
