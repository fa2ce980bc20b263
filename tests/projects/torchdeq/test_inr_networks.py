"""Implicit representations against numbers recorded from TorchDEQ's zoo, and against closed forms.

tests/fixtures/nets/inr_official.json was made by running the zoo's DEQINR in float64 at the commit it names; the same
formula (`noise`) gave both sides their weights and inputs. Forward: 100 plain iterations at most, absolute residual
1e-3; gradient: 3 undamped phantom steps.
"""

import json
import math
from pathlib import Path

import pytest
import torch

from common.deq.grads import Backprop, Unrolled
from common.deq.layer import DEQ
from common.deq.solvers import Picard
from common.errors import UserError
from projects.torchdeq.inr_networks import EquilibriumInr, FourierFeatureMLP, Siren

RECORD = json.loads((Path(__file__).parents[2] / "fixtures" / "nets" / "inr_official.json").read_text())
SIZES = RECORD["source"]


def noise(*shape: int, salt: int) -> torch.Tensor:
    """float64 numbers in [-1, 1) from integer arithmetic: the same on every machine."""
    k = torch.arange(math.prod(shape), dtype=torch.int64) + 1
    numbers = ((k * k % 65521 * 40503 + k * 7919 + salt * 30011) % 65521).double() / 65521 * 2 - 1
    return numbers.view(shape)


def layer(max_iter: int = 100, tol: float = 1e-3) -> DEQ:
    return DEQ(solver=Picard(max_iter=max_iter, tol=tol, stop="abs"), grad=Unrolled(steps=3, tau=1.0))


def official_net(filter: str, layers: int) -> EquilibriumInr:
    width = SIZES["width"]
    net = EquilibriumInr(
        in_features=SIZES["in_features"], out_features=SIZES["out_features"],
        width=width, layers=layers, filter=filter, deq=layer(),
    ).double()  # fmt: skip

    def fill(parameter, salt, gain, offset=0.0):
        with torch.no_grad():
            parameter.copy_(offset + gain * noise(*parameter.shape, salt=salt))

    fill(net.filter.map.weight, 1, 4.0)
    fill(net.filter.map.bias, 2, 3.0)
    if filter == "gabor":
        fill(net.filter.mu, 3, 1.0)
        fill(net.filter.gamma, 4, 0.5, 1.5)
    for number, linear in enumerate(net.cell.maps):
        weight = linear.parametrizations.weight
        fill(weight.original1, 10 + number, width**-0.5)
        fill(weight.original0, 20 + number, 0.2, 0.6)
        fill(linear.bias, 30 + number, 0.3)
    fill(net.head.weight, 5, 1.0)
    fill(net.head.bias, 6, 0.5)
    return net


@pytest.mark.parametrize("name", RECORD["cases"])
def test_outputs_and_gradients_are_the_zoos(name):
    case = RECORD["cases"][name]
    net = official_net(case["filter"], case["layers"])
    x = noise(SIZES["points"], SIZES["in_features"], salt=7)
    target = noise(SIZES["points"], SIZES["out_features"], salt=8)

    made = net.train().outputs(x)[-1]
    loss = (made - target).square().mean()
    loss.backward()
    # each of our points stops at the tolerance by itself, the zoo iterates all until the slowest has arrived
    assert torch.allclose(made.flatten(), torch.tensor(case["train"], dtype=torch.float64), atol=2e-4)
    assert loss.item() == pytest.approx(case["loss"], abs=1e-4)
    gradients = {
        "filter": net.filter.map.weight.grad[:2],
        "cell": net.cell.maps[0].parametrizations.weight.original1.grad[:2],
        "head": net.head.weight.grad[:1],
    }
    for part, gradient in gradients.items():
        expected = torch.tensor(case["gradients"][part], dtype=torch.float64)
        assert torch.allclose(gradient.flatten(), expected, atol=3e-4 * float(expected.abs().max())), part

    with torch.no_grad():
        made = net.eval()(x)
    assert torch.allclose(made.flatten(), torch.tensor(case["evaluation"], dtype=torch.float64), atol=2e-3)


@pytest.mark.parametrize("name", RECORD["cases"])
def test_cell_filters_and_head_are_the_zoos_to_the_last_digit(name):
    """The zoo's training output is so many applications of the cell to zero, and nothing else."""
    case = RECORD["cases"][name]
    net = official_net(case["filter"], case["layers"]).eval()
    x = noise(SIZES["points"], SIZES["in_features"], salt=7)
    expected = torch.tensor(case["train"], dtype=torch.float64)
    with torch.no_grad():
        u, z = net.filter(x), torch.zeros(SIZES["points"], SIZES["width"], dtype=torch.float64)
        gaps = []
        for _ in range(30):
            z = net.cell(z, *u)
            gaps.append((net.head(z).flatten() - expected).abs().max().item())
    assert min(gaps) < 1e-11, min(gaps)


@pytest.mark.parametrize("name", RECORD["counts"])
def test_parameter_counts_of_the_published_sizes(name):
    case = dict(RECORD["counts"][name])
    expected = case.pop("parameters")
    assert sum(p.numel() for p in EquilibriumInr(**case).parameters()) == expected


@pytest.mark.parametrize("filter", ["siren", "fourier", "gabor", "relu"])
def test_every_filter_makes_a_solvable_map(filter):
    torch.manual_seed(0)
    net = EquilibriumInr(in_features=2, out_features=3, width=32, filter=filter, scale=16.0, deq=layer(200, 1e-4))
    x = 2 * torch.rand(64, 2) - 1
    out = net.train().outputs(x)
    assert len(out) == 1 and out[0].shape == (64, 3)
    out[0].square().mean().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in net.parameters())
    net.eval()
    with torch.no_grad():
        z = net.states(x)[-1]
        assert (net.cell(z, *net.filter(x)) - z).norm(dim=1).max() < 1e-3
        assert torch.allclose(net(x), net.head(z))


def test_a_point_does_not_depend_on_the_others():
    torch.manual_seed(0)
    net = EquilibriumInr(in_features=2, out_features=1, width=16, scale=8.0, deq=layer()).double().eval()
    x = 2 * torch.rand(40, 2, dtype=torch.float64) - 1
    with torch.no_grad():
        whole = net(x)
        parts = torch.cat([net(part) for part in x.split(7)])
    assert torch.allclose(whole, parts, rtol=0, atol=1e-12)
    assert len(net.deq.solution.steps.unique()) > 1, "points stop on their own"


def test_a_solve_from_the_solution_ends_at_once():
    torch.manual_seed(0)
    net = EquilibriumInr(in_features=2, out_features=1, width=16, scale=8.0, deq=layer()).eval()
    x = 2 * torch.rand(20, 2) - 1
    with torch.no_grad():
        z = net.states(x)[-1]
        again = net.states(x, z)[-1]
    assert net.deq.solution.evaluations.max() == 1
    assert (again - z).abs().max() < 1e-3


def test_without_a_layer_it_is_one_application_of_the_cell():
    torch.manual_seed(0)
    net = EquilibriumInr(in_features=2, out_features=1, width=16, layers=2, scale=8.0, deq=None)
    x = 2 * torch.rand(9, 2) - 1
    u0, u1, u2 = net.filter(x)
    first, second = net.cell.maps
    assert torch.allclose(net(x), net.head(torch.sin(second(torch.sin(first(torch.sin(u0)) + u1)) + u2)))
    once = DEQ(solver=Picard(max_iter=1, stop="never"), grad=Backprop())
    explicit = EquilibriumInr(in_features=2, out_features=1, width=16, layers=2, scale=8.0, deq=once)
    explicit.load_state_dict(net.state_dict())
    assert torch.allclose(explicit.train()(x), net(x)) and torch.allclose(explicit.eval()(x), net(x))


def test_scale_is_the_frequency_of_the_filters():
    for filter in ("siren", "fourier"):
        torch.manual_seed(0)
        low = EquilibriumInr(in_features=1, out_features=1, width=64, filter=filter, scale=1.0)
        torch.manual_seed(0)
        high = EquilibriumInr(in_features=1, out_features=1, width=64, filter=filter, scale=50.0)
        assert torch.allclose(high.filter.map.weight, 50 * low.filter.map.weight)
        assert low.filter.map.weight.abs().max() <= 1 / math.sqrt(2)  # scale / sqrt(filters), times U(-1, 1)


def test_siren_is_the_recurrence_of_its_paper():
    torch.manual_seed(0)
    net = Siren(in_features=2, out_features=3, width=16, layers=3, first=60.0, omega=30.0)
    x = 2 * torch.rand(5, 2) - 1
    h = x
    for number, linear in enumerate(net.maps[:-1]):
        h = torch.sin((60.0 if number == 0 else 30.0) * (h @ linear.weight.T + linear.bias))
    assert torch.allclose(net(x), h @ net.maps[-1].weight.T + net.maps[-1].bias, atol=1e-5)
    assert len(net.maps) == 4 and net.maps[1].weight.abs().max() <= math.sqrt(6 / 16) / 30


def test_fourier_features_mlp_sees_sines_and_cosines_of_fixed_frequencies():
    torch.manual_seed(0)
    net = FourierFeatureMLP(in_features=3, out_features=2, width=16, layers=2, features=8, scale=4.0)
    x = torch.rand(5, 3)
    phase = 2 * math.pi * x @ net.features.frequencies
    assert torch.allclose(net.features(x), torch.cat([phase.sin(), phase.cos()], 1), atol=1e-5)
    assert net(x).shape == (5, 2)
    assert not any(p is net.features.frequencies for p in net.parameters())


def test_bad_words_and_sizes_are_one_sentence():
    with pytest.raises(UserError, match=r"project\.net\.filter must be one of .* got 'sirens'\. Closest: siren"):
        EquilibriumInr(in_features=2, out_features=1, filter="sirens")
    with pytest.raises(UserError, match=r"project\.net\.width must be a whole number >= 1, got 0"):
        Siren(in_features=2, out_features=1, width=0)
    with pytest.raises(UserError, match=r"kind must be one of weight, spectral, none"):
        EquilibriumInr(in_features=2, out_features=1, norm="wieght")
