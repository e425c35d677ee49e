"""Attention over segments listed on the device: as over segments given one by one."""

from __future__ import annotations

import pytest
import torch

from stac_core.kernels import attend_listed_triton, attend_triton
from stac_core.kernels.attend import Segment
from stac_core.kernels.attend_listed import FIELDS, ListedSegment, Listing, room_to_count, write_list

LAYERS, HEADS = 3, 2
CAPACITY = 300


def buffers(dim, lengths, biased, seed=0):
    """Segments of all layers in buffers longer than they are."""
    g = torch.Generator().manual_seed(seed)
    for length, bias in zip(lengths, biased, strict=True):
        if length is None:
            yield None
            continue
        keys, values = torch.randn(2, LAYERS * HEADS, CAPACITY, dim, generator=g).bfloat16()
        yield ListedSegment(
            keys, values, length, torch.randn(LAYERS * HEADS, CAPACITY, generator=g) if bias else None
        )


def of_layer(segment, layer):
    lanes = slice(layer * HEADS, (layer + 1) * HEADS)
    bias = None if segment.bias is None else segment.bias[lanes, : segment.length]
    return Segment(segment.keys[lanes, : segment.length], segment.values[lanes, : segment.length], bias)


@pytest.mark.parametrize("dim", [40, 64])
@pytest.mark.parametrize(
    ("lengths", "grows", "biased"),
    [
        ((70, 97, 200, 33), 2, (False, False, False, True)),
        ((None, 97, 33), 1, (False, False, True)),
        ((97,), 0, (False,)),
        ((5, 130), 1, (False, False)),
    ],
)
@pytest.mark.parametrize("subsample", [None, 1.0, 0.25])
def test_listed_segments_are_attended_to(dim, lengths, grows, biased, subsample):
    queries = 150 if subsample == 0.25 else 65
    new = min(queries, lengths[grows])
    segments = list(buffers(dim, lengths, biased))
    listed = torch.from_numpy(write_list(segments, LAYERS))
    listing = Listing(biased, grows, subsample, 400)
    g, lanes, masses = torch.Generator().manual_seed(5), None, []
    if subsample is not None:
        lanes = room_to_count(LAYERS * HEADS, torch.empty(HEADS, queries, dim).bfloat16(), subsample)
    for layer in range(LAYERS):
        qkv = torch.randn(queries, 3, HEADS, dim, generator=g).bfloat16()
        q, k, v = qkv.permute(1, 2, 0, 3)
        k, v = k[:, :new], v[:, :new]
        counted = lanes and lanes.of(slice(layer * HEADS, (layer + 1) * HEADS))
        out = attend_listed_triton.attend(q, k, v, listed[layer], listing, counted)
        stored = [of_layer(segment, layer) for segment in segments if segment is not None]
        grown = of_layer(segments[grows], layer)
        assert torch.equal(grown.keys[:, -new:], k)
        assert torch.equal(grown.values[:, -new:], v)
        expected = attend_triton.attend(q, stored, subsample is not None, subsample or 1.0)
        torch.testing.assert_close(out, expected.out, rtol=0, atol=0)
        assert out.transpose(0, 1).is_contiguous()  # in the order of its use
        if lanes:
            masses.append(torch.cat(expected.key_mass, 1))
    if lanes:
        columns, mass = torch.cat(masses), torch.full((LAYERS * HEADS, 400), torch.nan)
        attend_listed_triton.sum_mass(lanes, listed[0], listing, mass)
        torch.testing.assert_close(mass[:, : columns.shape[1]], columns, rtol=0, atol=0)
        assert mass[:, columns.shape[1] :].isnan().all()


def test_an_empty_list_keeps_nothing_and_answers_zero():
    """As when the kernels are compiled before they are recorded."""
    listed, listing = torch.zeros(4, FIELDS, dtype=torch.int64), Listing((False,) * 3 + (True,), 2, 1.0, 400)
    q, k, v = torch.randn(3, HEADS, 30, 64).bfloat16()
    counted, mass = room_to_count(HEADS, q, 1.0), torch.zeros(HEADS, 400)
    out = attend_listed_triton.attend(q, k, v, listed, listing, counted)
    attend_listed_triton.sum_mass(counted, listed, listing, mass)
    assert not out.any() and not mass.any()


@pytest.mark.parametrize(
    "spoil", [lambda x: x[:, ::2], lambda x: x[..., :62], lambda x: x.flatten()[1:513].view(2, 4, 64)]
)
def test_buffers_that_no_kernel_could_read_are_refused(spoil):
    buffer = spoil(torch.zeros(2, 4, 65))
    with pytest.raises(ValueError, match="dense"):
        write_list([ListedSegment(buffer, buffer, 1)], 1)


@pytest.mark.parametrize(
    "bias, words",
    [
        (torch.zeros(2, 4, 2)[..., 0], r"bias .*strides \(8, 2\)"),
        (torch.zeros(2, 4).double(), "bias .*torch.float64"),
        (torch.zeros(2, 2), r"bias .*\[2, 2\]"),
    ],
)
def test_bias_that_no_kernel_could_read_is_refused(bias, words):
    buffer = torch.zeros(2, 4, 64)
    with pytest.raises(ValueError, match=words):
        write_list([ListedSegment(buffer, buffer, 3, bias)], 1)
