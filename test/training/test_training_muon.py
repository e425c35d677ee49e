"""Muon: orthogonal steps, those of PyTorch's own, and none where a gradient is not finite."""

import pytest
import torch

from stac_core.training.muon import Muon, orthogonal_factor

SHAPES = ((24, 8), (8, 24), (24, 8), (16, 16))


def parameters(seed: int = 0) -> list[torch.nn.Parameter]:
    random = torch.Generator().manual_seed(seed)
    return [torch.nn.Parameter(torch.randn(shape, generator=random)) for shape in SHAPES]


def give_gradients(of: list[torch.nn.Parameter], seed: int) -> None:
    random = torch.Generator().manual_seed(seed)
    for parameter in of:
        parameter.grad = torch.randn(parameter.shape, generator=random)


@pytest.mark.parametrize("shape", SHAPES)
def test_all_directions_of_a_matrix_come_out_about_equally_long(shape):
    matrices = torch.randn(5, *shape, generator=torch.Generator().manual_seed(3))
    u, s, vh = torch.linalg.svd(matrices, full_matrices=False)
    matrices = u @ torch.diag_embed(torch.linspace(1, 0.1, s.shape[1]).expand_as(s)) @ vh
    lengths = u.mT @ orthogonal_factor(matrices) @ vh.mT  # of every direction, on the diagonal
    diagonal = lengths.diagonal(dim1=1, dim2=2)
    assert diagonal.min() > 0.6 and diagonal.max() < 1.3
    assert (lengths - torch.diag_embed(diagonal)).abs().max() < 0.05


@pytest.mark.skipif(not hasattr(torch.optim, "Muon"), reason="this PyTorch has no Muon of its own")
def test_steps_are_those_of_pytorch():
    ours, judge = parameters(), parameters()
    muon = Muon([{"params": ours, "weight_decay": 0.1}], lr=0.02)
    reference = torch.optim.Muon(judge, lr=0.02, weight_decay=0.1, adjust_lr_fn="match_rms_adamw")
    before = [p.detach().clone() for p in ours]
    for step in range(4):
        give_gradients(ours, step)
        give_gradients(judge, step)
        muon.step()
        reference.step()
    for a, b, start in zip(ours, judge, before, strict=True):
        assert (a - b).norm() < 0.02 * (b - start).norm()  # the other one iterates in bfloat16


def test_a_parameter_without_a_gradient_stays():
    ours = parameters()
    give_gradients(ours, 0)
    ours[0].grad = None
    before = [p.detach().clone() for p in ours]
    Muon([{"params": ours, "weight_decay": 0.1}], lr=0.02).step()
    assert [torch.equal(a, b) for a, b in zip(ours, before, strict=True)] == [True, False, False, False]


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_a_gradient_that_is_not_finite_changes_nothing(bad):
    ours, judge = parameters(), parameters()
    guarded, reference = (Muon([{"params": p, "weight_decay": 0.1}], lr=0.02) for p in (ours, judge))
    for step in range(3):
        give_gradients(ours, step)
        if step == 1:
            ours[2].grad[0, 0] = bad
        guarded.found_inf = torch.tensor(float(step == 1))
        guarded.step()
        if step != 1:
            give_gradients(judge, step)
            reference.step()
    for a, b in zip(ours, judge, strict=True):
        assert torch.equal(a, b)
