"""Stored codes: how far they are off, how small they are, that coding twice changes nothing."""

from __future__ import annotations

import pytest
import torch
from cache.worlds_of_tokens import Walk, parity, run, small_network
from hypothesis import given, settings
from hypothesis import strategies as st

from stac_core.kernels.quantization import Codec


@settings(max_examples=60, deadline=None)
@given(
    bits=st.sampled_from([8, 4]), dim=st.sampled_from([2, 16, 48, 64, 96, 128]), rows=st.integers(0, 20),
    centre=st.floats(-50, 50), spread=st.floats(0.05, 30), seed=st.integers(0, 999),
)  # fmt: skip
def test_codes_are_off_by_half_a_step_at_most(bits, dim, rows, centre, spread, seed):
    x = centre + spread * torch.randn(rows, dim, generator=torch.Generator().manual_seed(seed))
    codec = Codec(bits, dim, torch.float32)
    fields = codec.encode(x)
    assert [(f.shape[-1], f.dtype) for f in fields] == [(c.width, c.dtype) for c in codec.columns]
    back = codec.decode(fields)
    if not rows:
        return
    width = min(dim, 64)  # the last group takes what is left
    for start in range(0, dim, width):
        group, found = x[:, start : start + width], back[:, start : start + width]
        step = (group.amax(-1) - group.amin(-1)) / (2**bits - 1)
        # Offset and scale are float16: half a unit in the last place of each comes on top.
        rounding = 2**-10 * (group.abs().amax(-1) + step * 2**bits)
        assert ((group - found).abs().amax(-1) <= 0.51 * step + rounding).all()


@pytest.mark.parametrize("bits", [8, 4])
def test_constant_vectors_and_one_sided_groups_are_kept(bits):
    codec = Codec(bits, 64, torch.float32)
    x = torch.stack([torch.full((64,), 3.0), torch.zeros(64), torch.linspace(100, 101, 64)])
    back = codec.decode(codec.encode(x))
    torch.testing.assert_close(back, x, rtol=0, atol=0.6 / (2**bits - 1) + 1e-3)
    assert torch.equal(back[:2], x[:2])


@pytest.mark.parametrize("bits", [8, 4])
def test_coding_what_was_decoded_gives_the_same_numbers(bits):
    codec = Codec(bits, 64, torch.float32)
    once = codec.decode(codec.encode(torch.randn(500, 64, generator=torch.Generator().manual_seed(0))))
    twice = codec.decode(codec.encode(once))
    torch.testing.assert_close(twice, once, rtol=0, atol=2e-3)


@pytest.mark.parametrize(("bits", "bytes_per_token"), [(16, 256), (8, 136), (4, 72)])
def test_a_token_of_full_size_takes_what_was_planned(bits, bytes_per_token):
    """Per head of width 64: keys and values, with a scale and an offset in float16 for each."""
    codec = Codec(bits, 64, torch.bfloat16)
    k = torch.randn(1, 64).bfloat16()
    assert 2 * sum(field.nbytes for field in codec.encode(k)) == bytes_per_token


def test_coded_streams_stay_close_and_are_smaller():
    walk = Walk(small_network(dim=64), length=3.0)
    plain, expected = run(parity(), walk, 30)
    kinds = ("pinned", "window", "anchor", "retrieved", "buffer", "pivot")
    errors, sizes = [], [plain.stats().bytes]
    for bits in (8, 4):
        cache, out = run(parity(**{f"{kind}_bits": bits for kind in kinds}), walk, 30)
        errors.append(float((out - expected).norm() / expected.norm()))
        sizes.append(cache.stats().bytes)
    assert errors[0] < 0.02 and errors[1] < 0.2
    assert sizes[1] < 0.45 * sizes[0] and sizes[2] < 0.33 * sizes[0]  # against float32, which 16 means here
