"""Rows taken out of several tensors: bit for bit those that the tensors side by side have there."""

from __future__ import annotations

import pytest
import torch

from stac_core.evaluation.gpu.measure import poisoned_memory
from stac_core.kernels import take_torch, take_triton

BACKENDS = {"torch": take_torch.take, "triton": take_triton.take}
DTYPES = (torch.bfloat16, torch.float16, torch.float32, torch.uint8, torch.int64, torch.bool)


@pytest.fixture(params=BACKENDS)
def backend(request):
    return BACKENDS[request.param]


def random_rows(lanes, n, width, dtype, g):
    """Any bits, NaN among them."""
    count = lanes * n * width * dtype.itemsize
    bits = torch.randint(0, 2 if dtype == torch.bool else 256, (count,), dtype=torch.uint8, generator=g)
    return bits.view(dtype).view(lanes, n, width)


def view_of(long, n, where):
    """n rows in the midst of a longer buffer [lanes, N, w]."""
    return long[:, where : where + n]


def bits_of(x):
    return x.contiguous().view(-1).view(torch.uint8)


def agree(backend, parts, places):
    with poisoned_memory():
        got = backend(parts, places)
    lanes, m = places.shape
    expected = torch.cat(list(parts), 1)[torch.arange(lanes)[:, None], places]
    assert got.shape == (lanes, m, parts[0].shape[2]) and got.dtype == parts[0].dtype
    assert got.is_contiguous()
    assert torch.equal(bits_of(got), bits_of(expected))


def places_in(parts, m, g):
    return torch.randint(sum(part.shape[1] for part in parts), (parts[0].shape[0], m), generator=g)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("width", [1, 2, 10, 64, 128])
def test_rows_of_any_kind_and_width(backend, dtype, width):
    g = torch.Generator().manual_seed(width)
    whole = random_rows(3, 97, width, dtype, g)
    within = view_of(random_rows(3, 60, width, dtype, g), 21, 5)
    agree(backend, [whole], places_in([whole], 130, g))
    agree(backend, [whole, within], places_in([whole, within], 50, g))
    agree(backend, [within, whole, within[:, 3:4]], places_in([within, whole, within[:, 3:4]], 97, g))


@pytest.mark.parametrize(
    "lengths", [(1,), (0, 5), (5, 0), (3, 0, 2), (1, 1, 1, 1), (0, 0, 0, 4), (2, 9, 0, 1)]
)
def test_every_row_of_parts_of_any_length(backend, lengths):
    g = torch.Generator().manual_seed(0)
    parts = [random_rows(2, n, 12, torch.float16, g) for n in lengths]
    agree(backend, parts, torch.arange(sum(lengths)).expand(2, -1))
    agree(backend, parts, torch.arange(sum(lengths)).flip(0).repeat(2, 1))


def test_as_many_rows_as_in_a_stream(backend):
    g = torch.Generator().manual_seed(1)
    parts = [random_rows(1, n * 1041, 64, torch.bfloat16, g) for n in (2, 4)]
    agree(backend, parts, places_in(parts, 2 * 1041, g))


def test_rows_that_begin_anywhere(backend):
    """At every byte; between lanes and between rows there are gaps."""
    g = torch.Generator().manual_seed(2)
    long = random_rows(3, 41, 50, torch.uint8, g)
    for begin in range(17):
        part = long[:, 4:30:2, begin : begin + 32]
        agree(backend, [part, long[:, :7, :32]], places_in([part, long[:, :7]], 40, g))


def test_lanes_and_rows_in_any_order_of_memory(backend):
    g = torch.Generator().manual_seed(3)
    by_row = random_rows(20, 3, 64, torch.bfloat16, g).transpose(0, 1)
    shared = random_rows(1, 9, 64, torch.bfloat16, g).expand(3, -1, -1)
    agree(backend, [by_row, shared], places_in([by_row, shared], 33, g))
    places = places_in([by_row, shared], 66, g)
    agree(backend, [by_row, shared], places[:, ::2])
    agree(backend, [shared, by_row], places[:1].expand(3, -1))


def test_rows_wider_than_a_program_takes_several_of(backend):
    g = torch.Generator().manual_seed(4)
    parts = [random_rows(2, n, 2500, torch.float32, g) for n in (3, 2)]
    agree(backend, parts, places_in(parts, 4, g))


@pytest.mark.parametrize(
    "lanes, n, m, width", [(2, 5, 0, 4), (0, 5, 3, 4), (2, 0, 0, 4), (2, 5, 3, 0), (0, 0, 0, 0)]
)
def test_of_nothing_there_is_nothing(backend, lanes, n, m, width):
    got = backend([torch.zeros(lanes, n, width)] * 2, torch.zeros(lanes, m, dtype=torch.int64))
    assert got.shape == (lanes, m, width)


ROWS, PLACES = torch.zeros(2, 5, 4), torch.zeros(2, 3, dtype=torch.int64)


@pytest.mark.parametrize(
    "parts, places, words",
    [
        ([], PLACES, "parts: expected 1 to 4, got 0"),
        ([ROWS] * 5, PLACES, "parts: expected 1 to 4, got 5"),
        ([ROWS[0]], PLACES, r"parts\[0\]: expected \[lanes, n, w\], got shape \[5, 4\]"),
        ([ROWS, ROWS[0]], PLACES, r"parts\[1\]: expected shape \[2, 0, 4\], got \[5, 4\]"),
        ([ROWS, ROWS[..., :3]], PLACES, r"parts\[1\]: expected shape \[2, 5, 4\], got \[2, 5, 3\]"),
        ([ROWS, ROWS[:1]], PLACES, r"parts\[1\]: expected shape \[2, 5, 4\], got \[1, 5, 4\]"),
        ([ROWS, ROWS.half()], PLACES, r"parts\[1\]: expected torch.float32, got torch.float16"),
        ([ROWS, ROWS.to("meta")], PLACES, r"parts\[1\]: is on meta, parts\[0\] on cpu"),
        ([ROWS, ROWS[..., ::2], ROWS], PLACES, r"parts\[1\]: expected shape \[2, 5, 4\]"),
        ([ROWS.mT.contiguous().mT], PLACES, r"parts\[0\]: rows must be contiguous, got strides \(20, 1, 5\)"),
        ([ROWS], PLACES[0], r"places: expected shape \[2, 3\], got \[3\]"),
        ([ROWS], PLACES[:1], r"places: expected shape \[2, 3\], got \[1, 3\]"),
        ([ROWS], PLACES.int(), "places: expected torch.int64, got torch.int32"),
    ],
)
def test_bad_input_is_named(backend, parts, places, words):
    with pytest.raises(ValueError, match=words):
        backend(parts, places)


def test_more_lanes_than_a_grid_has_are_refused():
    rows, places = torch.zeros(1, 1, 4).expand(65536, -1, -1), torch.zeros(65536, 1, dtype=torch.int64)
    with pytest.raises(ValueError, match=r"parts\[0\]: 65536 lanes, at most 65535"):
        take_triton.take([rows], places)
