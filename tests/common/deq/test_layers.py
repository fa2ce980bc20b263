import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn.utils import parametrize

from common.deq.dropout import VariationalDropout
from common.deq.layers import SpectralNorm, WeightNorm, apply_norm, remove_norm, reset
from common.errors import UserError

LAYERS = {
    "linear": (lambda: nn.Linear(5, 4), (3, 5), 0),
    "conv1": (lambda: nn.Conv1d(3, 4, 3), (2, 3, 7), 0),
    "conv2": (lambda: nn.Conv2d(4, 6, 3, groups=2), (2, 4, 7, 7), 0),
    "conv3": (lambda: nn.Conv3d(2, 3, 2), (2, 2, 4, 4, 4), 0),
    "transposed1": (lambda: nn.ConvTranspose1d(3, 4, 3), (2, 3, 7), 1),
    "transposed2": (lambda: nn.ConvTranspose2d(3, 4, 3), (2, 3, 5, 5), 1),
    "transposed3": (lambda: nn.ConvTranspose3d(2, 3, 2), (2, 2, 3, 3, 3), 1),
}
KINDS = ("weight", "spectral")


def net(kind="weight", **options):
    torch.manual_seed(0)
    made = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 4))
    apply_norm(made, kind, **options)
    return made


def norm_of(layer):
    return layer.parametrizations.weight[0]


def g_and_v(layer):
    return layer.parametrizations.weight.original0, layer.parametrizations.weight.original1


def rows(w, dim):
    return w.movedim(dim, 0).flatten(1)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", LAYERS)
def test_the_function_stays_and_removal_is_exact(kind, name):
    make, shape, dim = LAYERS[name]
    layer = make()
    x, before = torch.randn(shape), copy.deepcopy(layer)
    assert apply_norm(layer, kind) == [""]
    g, _ = g_and_v(layer)
    assert g.shape[dim] == layer.weight.shape[dim] and g.numel() == g.shape[dim]
    torch.testing.assert_close(layer(x), before(x), rtol=1e-5, atol=1e-6)
    with torch.no_grad():
        for p in layer.parameters():
            p.add_(0.1 * torch.randn_like(p))
    reset(layer)
    used, out = layer.weight.detach().clone(), layer(x).detach()
    remove_norm(layer)
    assert type(layer) is type(before)
    assert isinstance(layer.weight, nn.Parameter)
    assert torch.equal(layer.weight, used) and torch.equal(layer(x), out)
    assert set(layer.state_dict()) == {"bias", "weight"}


@settings(deadline=None, max_examples=40)
@given(
    name=st.sampled_from(sorted(LAYERS)),
    clip=st.none() | st.floats(0.1, 2),
    learn=st.booleans(),
    target=st.floats(0.2, 3),
    seed=st.integers(0, 99),
)
def test_weight_norm_is_its_formula(name, clip, learn, target, seed):
    torch.manual_seed(seed)
    make, _, dim = LAYERS[name]
    layer = make()
    w = layer.weight.detach().clone()
    apply_norm(layer, "weight", clip=clip, learn_scale=learn, target=target)
    with torch.no_grad():
        if learn:
            g_and_v(layer)[0].mul_(1.5)
    norms = rows(w, dim).norm(dim=1)
    factor = (1.5 * norms if learn else target) / norms
    if clip is not None:
        factor = factor.clamp(max=clip)
    expected = (rows(w, dim) * factor[:, None]).reshape(w.movedim(dim, 0).shape).movedim(0, dim)
    torch.testing.assert_close(layer.weight, expected)


@pytest.mark.parametrize("name", LAYERS)
def test_spectral_norm_starts_at_the_true_norm_and_bounds_it(name):
    make, _, dim = LAYERS[name]
    layer = make()
    sigma = torch.linalg.matrix_norm(rows(layer.weight.detach(), dim), 2)
    apply_norm(layer, "spectral")
    torch.testing.assert_close(g_and_v(layer)[0].flatten(), sigma.expand(layer.weight.shape[dim]))
    remove_norm(layer)
    apply_norm(layer, "spectral", learn_scale=False, target=0.5)
    torch.testing.assert_close(torch.linalg.matrix_norm(rows(layer.weight, dim), 2), torch.tensor(0.5))


def test_clip_true_takes_clip_value_and_bounds_only_large_weights():
    small, large = nn.Linear(4, 4), nn.Linear(4, 4)
    with torch.no_grad():
        small.weight.mul_(0.1)
        large.weight.mul_(10)
    before = small.weight.detach().clone()
    for layer in (small, large):
        apply_norm(layer, "spectral", clip=True, learn_scale=False, target=0.9)
    torch.testing.assert_close(small.weight.detach(), before)
    torch.testing.assert_close(torch.linalg.matrix_norm(large.weight, 2).detach(), torch.tensor(0.9))
    half = nn.Linear(4, 4)
    before = half.weight.detach().clone()
    apply_norm(half, clip=True, clip_value=0.5)
    torch.testing.assert_close(half.weight.detach(), before / 2)
    off = nn.Linear(4, 4)
    apply_norm(off, clip=False)
    assert norm_of(off).clip is None


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("clip", [None, 0.7])
@pytest.mark.parametrize("held", [False, True])
def test_gradients_against_finite_differences(kind, clip, held):
    layer = nn.Linear(3, 4).double()
    apply_norm(layer, kind, clip=clip, power_iterations=30)
    norm = norm_of(layer)
    g, v = (p.detach().clone() for p in g_and_v(layer))
    g = (g * torch.linspace(0.4, 1.2, 4, dtype=torch.float64)[:, None]).requires_grad_()

    def weight(g, v):
        if held:
            norm.reset(g, v)
        return norm(g, v)

    assert torch.autograd.gradcheck(weight, (g, v.requires_grad_()))
    assert torch.autograd.gradgradcheck(weight, (g, v)) if kind == "weight" else True


@pytest.mark.parametrize("kind", KINDS)
def test_one_computation_serves_the_solve_and_the_gradient_steps(kind, monkeypatch):
    cell = net(kind)
    calls = []
    cls = type(norm_of(cell[0]))
    compute = cls.compute
    monkeypatch.setattr(cls, "compute", lambda self, *a: calls.append(1) or compute(self, *a))
    z = torch.randn(5, 4)
    reset(cell)
    assert len(calls) == 2
    with torch.no_grad():
        for _ in range(4):
            z = cell(z)
        assert not cell[0].weight.requires_grad
    for _ in range(3):
        z = cell(z)
    assert cell[0].weight is cell[0].weight and len(calls) == 2
    z.square().sum().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in cell.parameters())


@pytest.mark.parametrize("kind", KINDS)
def test_held_weights_give_the_gradients_of_fresh_ones(kind):
    z = torch.randn(5, 4)

    def gradients(hold):
        cell = net(kind, power_iterations=20)
        if hold:
            reset(cell)
        cell(cell(cell(z))).square().sum().backward()
        return [p.grad for p in cell.parameters()]

    for a, b in zip(gradients(True), gradients(False), strict=True):
        torch.testing.assert_close(a, b, rtol=2e-4, atol=1e-6)


def test_without_reset_every_access_is_fresh():
    cell = net()
    assert cell[0].weight is not cell[0].weight
    before = cell[0].weight.detach().clone()
    with torch.no_grad():
        g_and_v(cell[0])[0].data.mul_(2)  # a write that leaves no trace
    torch.testing.assert_close(cell[0].weight.detach(), 2 * before)


def fresh(layer):
    g, v = (p.detach() for p in g_and_v(layer))
    return g * v / torch.linalg.vector_norm(v, dim=1, keepdim=True)


def step(cell):
    optimizer = torch.optim.SGD(cell.parameters(), lr=0.5)
    for p in cell.parameters():
        p.grad = torch.ones_like(p)
    optimizer.step()


def adam(cell):
    optimizer = torch.optim.AdamW(cell.parameters(), lr=0.5, foreach=True)
    for p in cell.parameters():
        p.grad = torch.ones_like(p)
    optimizer.step()


def load(cell):
    cell.load_state_dict({k: v + 1 for k, v in cell.state_dict().items()})


def load_assign(cell):
    cell.load_state_dict({k: v + 1 for k, v in cell.state_dict().items()}, assign=True)


def exchange(cell):
    for p in cell.parameters():
        p.data = p.data + 1


def in_place(cell):
    with torch.no_grad():
        for p in cell.parameters():
            p.add_(1)


def swap_as_lightning_does(cell):
    cell.eval()
    for p in cell.parameters():
        p.data.copy_(p.data + 1)


def assign(cell):
    cell[0].weight = torch.randn(6, 4)


@pytest.mark.parametrize("graph", [True, False])
@pytest.mark.parametrize(
    "event",
    [step, adam, load, load_assign, exchange, in_place, swap_as_lightning_does, assign],
    ids=lambda e: e.__name__,
)
def test_never_stale(event, graph):
    cell = net()
    with torch.set_grad_enabled(graph):
        reset(cell)
    old = cell[0].weight.detach().clone()
    event(cell)
    assert not torch.allclose(old, fresh(cell[0]))
    torch.testing.assert_close(cell[0].weight.detach(), fresh(cell[0]))
    with torch.no_grad():
        torch.testing.assert_close(cell[0].weight, fresh(cell[0]))


def test_training_with_resets_reaches_what_training_without_them_does():
    x = torch.randn(8, 4)

    def train(hold):
        cell = net()
        optimizer = torch.optim.Adam(cell.parameters(), lr=0.05)
        for _ in range(5):
            if hold:
                reset(cell)
            optimizer.zero_grad()
            (cell(cell(x)) - x).square().mean().backward()
            optimizer.step()
        return cell(x).detach()

    torch.testing.assert_close(train(True), train(False))


def test_a_second_backward_pass_without_reset_works():
    cell = net()
    reset(cell)
    z = torch.randn(3, 4)
    for _ in range(2):
        cell(z).sum().backward()


def test_reset_without_gradients_then_a_gradient_step():
    cell = net()
    with torch.no_grad():
        reset(cell)
    cell(torch.randn(2, 4)).sum().backward()
    assert g_and_v(cell[0])[0].grad.abs().sum() > 0
    with torch.inference_mode():
        reset(cell)
        cell(torch.randn(2, 4))
    cell(torch.randn(2, 4)).sum().backward()


def test_assignment_initialises_again():
    for kind in KINDS:
        cell = net(kind)
        new = torch.randn(6, 4)
        reset(cell)
        cell[0].weight = new
        torch.testing.assert_close(cell[0].weight.detach(), new)
        new.zero_()  # the parameters keep their own copy
        assert cell[0].weight.abs().sum() > 0
        cell[0].weight = nn.init.orthogonal_(torch.empty(6, 4))
        reset(cell)
        torch.testing.assert_close(cell[0].weight.T @ cell[0].weight, torch.eye(4), atol=1e-5, rtol=0)


def test_in_place_writes_to_a_held_weight_are_refused():
    cell = net()
    reset(cell)
    with torch.no_grad():
        nn.init.normal_(cell[0].weight)
        with pytest.raises(UserError, match=r"layer.weight = new_value"):
            cell(torch.randn(2, 4))


@pytest.mark.parametrize("kind", KINDS)
def test_zero_layers_stay_zero_and_learn(kind):
    layer = nn.Linear(3, 3)
    with torch.no_grad():
        layer.weight.zero_()
    apply_norm(layer, kind)
    reset(layer)
    assert torch.equal(layer.weight, torch.zeros(3, 3))
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.1)
    x = torch.randn(16, 3)
    for _ in range(3):
        reset(layer)
        optimizer.zero_grad()
        (layer(x) - x.sum(1, keepdim=True)).square().mean().backward()
        optimizer.step()
    assert torch.isfinite(layer.weight).all() and layer.weight.abs().sum() > 0.1


def test_spectral_norm_follows_the_weights_and_is_still_in_evaluation():
    layer = nn.Linear(8, 8)
    apply_norm(layer, "spectral", learn_scale=False, target=1.0)
    raw = layer.parametrizations.weight.original
    for _ in range(40):
        with torch.no_grad():
            raw.add_(0.02 * torch.randn_like(raw))
        reset(layer)
    top = torch.linalg.matrix_norm(layer.weight.detach(), 2)
    torch.testing.assert_close(top, torch.tensor(1.0), rtol=0.05, atol=0)
    layer.eval()
    state = copy.deepcopy(layer.state_dict())
    reset(layer)
    first = layer.weight.detach().clone()
    reset(layer)
    assert torch.equal(layer.weight, first)
    assert all(torch.equal(a, b) for a, b in zip(state.values(), layer.state_dict().values(), strict=True))


def test_an_earlier_graph_survives_the_next_reset():
    cell = net("spectral")
    z = torch.randn(2, 4)
    reset(cell)
    first = cell(z).sum()
    reset(cell)
    second = cell(z).sum()
    (first + second).backward()


def test_which_layers_are_taken():
    class Own(nn.Linear):
        pass

    cell = nn.ModuleDict(
        {
            "a": nn.Linear(2, 2),
            "fuse": nn.ModuleDict({"b": nn.Conv1d(2, 2, 1), "c": nn.ConvTranspose2d(2, 2, 1)}),
            "own": Own(2, 2),
            "norm": nn.BatchNorm1d(2),
            "embed": nn.Embedding(3, 2),
            "attention": nn.MultiheadAttention(2, 1),
        }
    )
    assert apply_norm(copy.deepcopy(cell)) == ["a", "fuse.b", "fuse.c"]
    assert apply_norm(copy.deepcopy(cell), skip="b") == ["a", "fuse.c"]
    assert apply_norm(copy.deepcopy(cell), skip_prefix=("fuse",)) == ["a"]
    assert apply_norm(cell, "none") == [] and not parametrize.is_parametrized(cell["a"])
    names = apply_norm(cell, "spectral", skip=["a", "c"])
    assert names == ["fuse.b"] and isinstance(norm_of(cell["fuse"]["b"]), SpectralNorm)
    apply_norm(cell, skip=("fuse",))
    assert isinstance(norm_of(cell["a"]), WeightNorm)
    remove_norm(cell)
    assert not any(parametrize.is_parametrized(m) for m in cell.modules())


def test_norms_of_others_are_left_alone():
    layer = nn.utils.parametrizations.weight_norm(nn.Linear(2, 2))
    remove_norm(layer)
    reset(layer)
    assert parametrize.is_parametrized(layer, "weight")


def test_constant_scale_keeps_the_parameter_object():
    layer = nn.Linear(4, 3)
    weight = layer.weight
    apply_norm(layer, learn_scale=False, target=2.0)
    assert layer.parametrizations.weight.original is weight
    reset(layer)
    torch.testing.assert_close(layer.weight.norm(dim=1), torch.full((3,), 2.0))
    remove_norm(layer)
    assert layer.weight is weight and torch.allclose(weight.norm(dim=1), torch.tensor(2.0))


def test_reset_also_reaches_dropout():
    cell = nn.Sequential(nn.Linear(50, 50), VariationalDropout(0.5))
    apply_norm(cell)
    x = torch.randn(2, 50)
    first = cell(x)
    assert torch.equal(first, cell(x))
    reset(cell)
    assert not torch.equal(first, cell(x))


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda: apply_norm(nn.Linear(2, 2), "wieght"), "Closest: weight"),
        (lambda: apply_norm(nn.ReLU()), "no layer to normalise in ReLU"),
        (lambda: apply_norm(net(), "spectral"), "layer '0' is parametrised already"),
        (lambda: apply_norm(nn.Linear(2, 2), clip=-1.0), "clip must be"),
        (lambda: apply_norm(nn.Linear(2, 2), target=0.0), "target must be"),
        (lambda: apply_norm(nn.Linear(2, 2), "spectral", power_iterations=0), "power_iterations must be"),
    ],
)
def test_bad_input(call, message):
    with pytest.raises(UserError, match=message):
        call()


def test_a_refused_call_changes_nothing():
    cell = nn.ModuleDict({"a": nn.Linear(2, 2), "b": nn.Linear(2, 2)})
    apply_norm(cell, skip="a")
    with pytest.raises(UserError):
        apply_norm(cell)
    assert not parametrize.is_parametrized(cell["a"])


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("write", [lambda w: nn.init.zeros_(w), lambda w: w.data.fill_(0.5)])
def test_writing_into_the_result_is_refused_before_the_first_reset(kind, write):
    """nn.init after apply_norm would be lost; assigning stores it."""
    made = net(kind)
    write(made[0].weight)
    with pytest.raises(UserError, match="written in place"):
        reset(made)
    value = torch.full((6, 4), 0.5)
    made[0].weight = value
    reset(made)
    torch.testing.assert_close(made[0].weight, value)
    twin = copy.deepcopy(net(kind))
    nn.init.zeros_(twin[2].weight)
    with pytest.raises(UserError, match="written in place"):
        twin(torch.zeros(1, 4))
