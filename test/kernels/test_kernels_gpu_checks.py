"""The checks of the GPU benchmark fail where they should: one value of a right result spoilt."""

from __future__ import annotations

import pytest
import torch

from stac_core.evaluation.gpu import gathering, merging
from stac_core.kernels import gather_torch, voxel_merge_torch

CPU = torch.device("cpu")
NAN = float("nan")  # as memory is that nobody wrote


def spoilt(part, value):
    """A copy with another last element."""
    part = part.clone()
    part.view(-1)[-1] = value
    return part


def failed(rows):
    return {row["what"] for row in rows if not row["passed"]}


@pytest.mark.parametrize("field", ["keys", "values", "bias"])
def test_gathers(field):
    def gather(*arguments):
        got = gather_torch.gather(*arguments)
        return got._replace(**{field: spoilt(getattr(got, field), NAN)})

    assert not failed(gathering.check("torch", gather_torch.gather, CPU))
    assert failed(gathering.check("torch", gather, CPU)) == {"gather"}


@pytest.mark.parametrize("field", ["pivot_keys", "pivot_values", "weight"])
def test_merges(field):
    def merge(*arguments):
        state, counts = voxel_merge_torch.voxel_merge(*arguments)
        part = getattr(state, field).clone()
        part[state.members > 0] = NAN
        return state._replace(**{field: part}), counts

    assert not failed(merging.check("torch", voxel_merge_torch.voxel_merge, CPU, 6))
    assert failed(merging.check("torch", merge, CPU, 6)) == {"merge"}
