"""A whole stream whose memory is coded, on compiled kernels: they are handed the codes, and attend alike."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from cache.worlds_of_tokens import KERNELS, Walk, parity, small_network

from stac_core.cache.stream_cache import StreamCache
from stac_core.kernels.attend import CodedSegment
from stac_core.kernels.judge import judge_attend
from stac_core.kernels.select import select_kernels

WALK = Walk(small_network(layers=1), patches=6, pace=0.1)
FEW = {"voxel_size": 2.0, "voxel_buf_cap": 3}  # voxels, soon full
CODED = {
    "pinned_bits": 8, "window_bits": 8, "anchor_bits": 8, "retrieved_bits": 4, "pivot_bits": 4,
    "buffer_bits": 8,
}  # fmt: skip


def stream(kernels, dtype: torch.dtype, **settings) -> torch.Tensor:
    """Attention outputs of ten frames, in chunks of two."""
    cache = StreamCache(parity(**FEW, **settings), WALK.network, kernels)
    out = []
    for first in range(0, 10, 2):
        q, k, v, places = WALK.frames(first, 2)
        cache.begin(2, WALK.tokens)
        for layer, (a, b, c) in enumerate(zip(q.to(dtype), k.to(dtype), v.to(dtype), strict=True)):
            out.append(cache.attend(layer, a[None], b[None], c[None])[0])
        cache.settle(places)
    assert cache.retrieved is not None and cache.retrieved.tokens
    return torch.stack(out)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_kernels_are_handed_codes_and_keep_the_twice_rule(dtype):
    triton, verdicts, coded = select_kernels("triton", "cpu"), [], []

    def attend(q, segments, mass=False, subsample=1.0):
        got = triton.attend(q, segments, mass, subsample)
        verdicts.extend(judge_attend(q, segments, subsample, got))  # against what the codes decode to
        coded.append(sum(isinstance(s, CodedSegment) for s in segments))
        return got

    stream(replace(triton, attend=attend), dtype, **CODED)
    assert all(v.passed for v in verdicts), [v for v in verdicts if not v.passed]
    assert max(coded) >= 4  # pinned, anchors, window, retrieved


@pytest.mark.parametrize("settings", [CODED, {}], ids=["coded", "exact"])
def test_backends_remember_alike(settings):
    compiled = stream(select_kernels("triton", "cpu"), torch.float32, **settings)
    torch.testing.assert_close(compiled, stream(KERNELS, torch.float32, **settings), atol=1e-5, rtol=1e-5)
