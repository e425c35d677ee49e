"""cuda_ext's kernels on the host: build once, call through ctypes."""

from __future__ import annotations

import ctypes
import math
import shutil
import subprocess
from pathlib import Path

import torch

from stac_core.kernels.attend import Attended, Segment, check_attend, sample_queries
from stac_core.kernels.voxel_merge import MergeCounts, MergeRules, RowState, RowTokens
from stac_core.kernels.voxel_merge_rows import group_by_row

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


class Tokens(ctypes.Structure):
    _fields_ = [("data", ctypes.c_void_p), ("row_stride", ctypes.c_int64), ("token_stride", ctypes.c_int64)]


class ForwardArguments(ctypes.Structure):
    _fields_ = [
        *((name, Tokens) for name in ("q", "k", "v", "bias")),
        *((name, ctypes.c_void_p) for name in ("before_out", "before_lse", "out")),
        ("out_is_float", ctypes.c_bool),
        ("lse", ctypes.c_void_p),
        *((name, ctypes.c_int) for name in ("rows", "queries", "keys")),
        ("scale", ctypes.c_float),
    ]


class MassArguments(ctypes.Structure):
    _fields_ = [
        *((name, Tokens) for name in ("q", "k", "bias", "lse")),
        ("mass", ctypes.c_void_p),
        *((name, ctypes.c_int) for name in ("rows", "queries", "keys")),
        *((name, ctypes.c_float) for name in ("scale", "factor")),
    ]


class EmulatedAttend:
    """The contract of `attend.py`, every thread of every block a fiber of this process."""

    def __init__(self, library: ctypes.CDLL) -> None:
        self.library = library
        self.seed = 0
        library.attend_forward.restype = library.attend_mass.restype = ctypes.c_char_p

    def __call__(self, q, segments: list[Segment], mass: bool = False, subsample: float = 1.0) -> Attended:
        check_attend(q, segments, subsample)
        carried = None
        filled = [s for s in segments if s.length]
        for i, segment in enumerate(filled):
            carried = self._forward(q, segment, carried, last=i == len(filled) - 1)
        out, lse = carried
        key_mass = None
        if mass:
            rows, stride, scale = sample_queries(q.shape[1], subsample)
            sampled = slice(0, rows * stride, stride)
            key_mass = [self._mass(q[:, sampled], s, lse[:, sampled], scale) for s in segments]
        return Attended(out, lse, key_mass)

    def _forward(self, q, segment, carried, last):
        out = torch.full(q.shape, math.nan, dtype=q.dtype if last else torch.float32)
        lse = torch.full(q.shape[:2], math.nan)
        before_out, before_lse = (x.data_ptr() for x in carried) if carried else (None, None)
        arguments = ForwardArguments(
            tokens(q), tokens(segment.keys), tokens(segment.values), tokens(segment.bias),
            before_out, before_lse, out.data_ptr(), not last, lse.data_ptr(),
            *q.shape[:2], segment.length, q.shape[-1] ** -0.5,
        )  # fmt: skip
        self._run(self.library.attend_forward, arguments, q)
        return out, lse

    def _mass(self, q, segment, lse, factor):
        mass = torch.full((q.shape[0], segment.length), math.nan)
        arguments = MassArguments(
            tokens(q), tokens(segment.keys), tokens(segment.bias), tokens(lse), mass.data_ptr(),
            *q.shape[:2], segment.length, q.shape[-1] ** -0.5, factor,
        )  # fmt: skip
        self._run(self.library.attend_mass, arguments, q)
        return mass

    def _run(self, function, arguments, q):
        self.seed += 1
        half = ctypes.c_bool(q.dtype == torch.float16)
        error = function(ctypes.byref(arguments), half, q.shape[-1], self.seed)
        assert error is None, error.decode()


def tokens(x: torch.Tensor | None) -> Tokens:
    return Tokens(None, 0, 0) if x is None else Tokens(x.data_ptr(), x.stride(0), x.stride(1))


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
    """The contract of `voxel_merge.py`, every lane of every warp a fiber of this process."""

    def __init__(self, library: ctypes.CDLL) -> None:
        self.library = library
        self.seed = 0
        library.voxel_merge.restype = ctypes.c_char_p

    def __call__(self, state: RowState, tokens: RowTokens, rules: MergeRules):
        state, tokens, order, start = group_by_row(state, tokens)
        after = RowState(*(torch.full_like(part, math.nan) for part in state))
        score_left = torch.full_like(tokens.score, math.nan)
        rows, pivots, dim = state.pivot_keys.shape
        counts = torch.full((rows, 5), -(2**20), dtype=torch.int32)
        tensors = (*state, *after, order, start, tokens.keys, tokens.values, tokens.score, score_left, counts)
        arguments = MergeArguments(
            *(x.data_ptr() for x in tensors), rows, pivots, state.buffer_score.shape[1], dim,
            rules.threshold, rules.gate, rules.inertia or math.inf,
        )  # fmt: skip
        self.seed += 1
        error = self.library.voxel_merge(ctypes.byref(arguments), self.seed)
        assert error is None, error.decode()
        return after, MergeCounts(*counts.sum(0).tolist())
