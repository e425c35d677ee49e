"""Rows are copied as they are, however they lie."""

import pytest
import torch

from stac_core.words import copy_rows

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.uint8, torch.int64)


def views(width: int, dtype: torch.dtype) -> list[torch.Tensor]:
    """Of one shape [3, 5, width], in memory that lies otherwise each time."""

    def numbers(*shape: int) -> torch.Tensor:
        return torch.randint(0, 255, shape, dtype=torch.uint8).to(dtype)

    return [
        numbers(3, 5, width),
        numbers(3, 9, width)[:, 2:7],
        numbers(5, 3, width).transpose(0, 1),
        numbers(3, 5, 2 * width + 1)[..., 1 : width + 1],
        numbers(3, width, 5).transpose(1, 2),
        numbers(1, 5, width).expand(3, -1, -1),
        numbers(3 * 5 * width + 1)[1:].view(3, 5, width),
    ]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("width", [1, 3, 4, 8, 10, 64])
def test_rows_arrive_whatever_lies_between_them(width, dtype):
    for source in views(width, dtype):
        for around in views(width, dtype)[:5]:
            expected = source.clone()
            copy_rows(around, source)
            assert torch.equal(around, expected)


def test_nothing_but_the_rows_is_written():
    whole = torch.full((3, 9, 64), 7, dtype=torch.bfloat16)
    copy_rows(whole[:, 2:7], torch.zeros(3, 5, 64, dtype=torch.bfloat16))
    assert (whole[:, :2] == 7).all() and (whole[:, 7:] == 7).all() and (whole[:, 2:7] == 0).all()


def test_rows_of_another_dtype_are_converted():
    target = torch.empty(2, 8, dtype=torch.bfloat16)
    copy_rows(target, torch.full((2, 8), 1.5))
    assert (target == 1.5).all()


def test_numbers_that_are_none_keep_their_bits():
    source = torch.tensor([[0x7FC1, 0x7F81, 0x8000, 0xFFFF] * 2], dtype=torch.uint16).view(torch.bfloat16)
    target = torch.empty_like(source)
    copy_rows(target, source)
    assert torch.equal(target.view(torch.int16), source.view(torch.int16))
