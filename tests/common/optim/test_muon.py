import json
from pathlib import Path

import pytest
import torch
from torch import nn

from common.errors import UserError
from common.optim.groups import matrix_groups
from common.optim.muon import Muon, orthogonalise, scale_of

# written by optax.contrib.muon, see its "comment"; kernels there are (in, out), ours (out, in)
OPTAX = json.loads((Path(__file__).parents[2] / "fixtures" / "optim" / "muon.json").read_text())


def ours(values) -> torch.Tensor:
    value = torch.tensor(values)
    return value.T.contiguous() if value.dim() == 2 else value


def test_three_steps_equal_those_of_optax():
    params = {name: nn.Parameter(ours(value)) for name, value in OPTAX["start"].items()}
    optimizer = Muon(params.values(), lr=0.05, betas=(0.9, 0.95))
    for gradients in OPTAX["gradients"]:
        for name, p in params.items():
            p.grad = ours(gradients[name])
        optimizer.step()
    assert {p.dim() for p in params.values()} == {1, 2, 3}
    for name, p in params.items():
        torch.testing.assert_close(p.detach(), ours(OPTAX["end"][name]), rtol=0, atol=2e-6)


@pytest.mark.parametrize("shape", [(8, 24), (24, 8), (3, 5, 40)])
def test_singular_values_become_about_one_and_vectors_stay(shape):
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    found = orthogonalise(x, dtype=torch.float64)
    values = torch.linalg.svdvals(found)
    assert values.min() > 0.65 and values.max() < 1.2
    u, _, v = torch.linalg.svd(x, full_matrices=False)
    inside = u.mT @ found @ v.mT  # diagonal if the singular vectors are those of x
    assert (inside - torch.diag_embed(inside.diagonal(dim1=-2, dim2=-1))).abs().max() < 1e-9
    torch.testing.assert_close(orthogonalise(7 * x.mT, dtype=torch.float64), found.mT)  # no size, no orientation
    assert torch.equal(orthogonalise(torch.zeros(4, 3)), torch.zeros(4, 3))


def test_without_debiasing_it_is_torchs_muon():
    generator = torch.Generator().manual_seed(1)
    start = torch.randn(6, 16, generator=generator)
    gradients = torch.randn(4, 6, 16, generator=generator)
    ends = []
    for make in (
        lambda p: Muon([p], lr=0.05, debias=False, precision="bfloat16", weight_decay=0.1),
        lambda p: torch.optim.Muon([p], lr=0.05, weight_decay=0.1),
    ):
        p = nn.Parameter(start.clone())
        optimizer = make(p)
        for g in gradients:
            p.grad = g.clone()
            optimizer.step()
        ends.append(p.detach())
    moved = (ends[1] - start).abs().mean()
    assert (ends[0] - ends[1]).abs().mean() < 0.02 * moved  # two ways of rounding to bfloat16


def test_without_nesterov_the_rest_follows_torchs_adamw():
    start = torch.randn(5, generator=torch.Generator().manual_seed(2))
    one, two = nn.Parameter(start.clone()), nn.Parameter(start.clone())
    mine = Muon([one], lr=0.01, nesterov=False, betas=(0.8, 0.9), weight_decay=0.1)
    theirs = torch.optim.AdamW([two], lr=0.01, betas=(0.8, 0.9), weight_decay=0.1)
    for k in range(5):
        one.grad, two.grad = torch.full((5,), k - 1.5), torch.full((5,), k - 1.5)
        mine.step()
        theirs.step()
    torch.testing.assert_close(one.detach(), two.detach(), rtol=1e-6, atol=1e-7)


def test_scales():
    assert scale_of((8, 2), "shape") == 2 and scale_of((2, 8), "shape") == 1
    assert scale_of((2, 100), "rms") == pytest.approx(2) and scale_of((9, 1), "none") == 1


class Tokens(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(4, 3)
        self.filter = nn.Conv2d(1, 2, 2)
        self.table = nn.Embedding(5, 4)
        self.tokens = nn.Parameter(torch.zeros(2, 4))
        self.frozen = nn.Linear(2, 2).requires_grad_(False)


def test_only_linear_layers_hold_matrices():
    net = Tokens()
    matrices, others = matrix_groups(net)
    assert matrices["matrix"] and [id(p) for p in matrices["params"]] == [id(net.linear.weight)]
    assert not others["matrix"] and len(others["params"]) == 5
    optimizer = Muon(matrix_groups(net))
    assert [len(group["params"]) for group in optimizer.param_groups] == [1, 5]
    torch.optim.Adam(matrix_groups(net))  # others ignore the mark
    said_nothing = Muon(p for p in net.parameters() if p.requires_grad)
    assert [group["matrix"] for group in said_nothing.param_groups] == [True, False]
    assert len(said_nothing.param_groups[0]["params"]) == 3  # table and tokens as well


def steps(net, optimizer, first: int, last: int):
    for k in range(first, last):
        x = torch.randn(8, 4, generator=torch.Generator().manual_seed(k))
        optimizer.zero_grad()
        loss = net.linear(x + net.table.weight.mean(0) + net.tokens.sum(0)).square().mean()
        loss.backward()
        optimizer.step()


def test_a_restart_continues_bit_for_bit():
    def fresh():
        torch.manual_seed(0)
        net = Tokens()
        return net, Muon(matrix_groups(net), lr=0.02)

    straight, optimizer = fresh()
    steps(straight, optimizer, 0, 6)
    net, optimizer = fresh()
    steps(net, optimizer, 0, 3)
    kept = {"net": {k: v.clone() for k, v in net.state_dict().items()}, "optimizer": optimizer.state_dict()}
    again, optimizer = fresh()
    again.load_state_dict(kept["net"])
    optimizer.load_state_dict(kept["optimizer"])
    steps(again, optimizer, 3, 6)
    for name, value in straight.state_dict().items():
        assert torch.equal(value, again.state_dict()[name]), name


def test_a_schedule_moves_both_kinds_and_parameters_without_gradient_stay():
    net = Tokens()
    optimizer = Muon(matrix_groups(net), lr=0.02)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.0 if step else 1.0)
    start = net.filter.weight.clone()
    steps(net, optimizer, 0, 1)
    schedule.step()
    before = {k: v.clone() for k, v in net.state_dict().items()}
    steps(net, optimizer, 1, 2)
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())
    assert torch.equal(net.filter.weight, start)


@pytest.mark.parametrize(
    "shape, options, message",
    [
        ((2, 2), {"lr": -1}, "optimizer.lr must be >= 0"),
        ((2, 2), {"momentum": 1.0}, r"optimizer.momentum must be >= 0 and < 1"),
        ((2, 2), {"scale": "shap"}, "optimizer.scale must be one of shape, rms, none, got 'shap'. Closest: shape"),
        ((2, 2), {"precision": "half"}, "optimizer.precision must be one of float32, bfloat16"),
        ((2, 2), {"steps": 0}, "optimizer.steps must be a whole number >= 1"),
        ((2, 1, 2, 2), {}, r"two axes, got shape \(2, 1, 2, 2\)"),  # filters are no matrices
    ],
)
def test_bad_options_are_named(shape, options, message):
    with pytest.raises(UserError, match=message):
        Muon([{"params": [nn.Parameter(torch.zeros(shape))], "matrix": True}], **options)
