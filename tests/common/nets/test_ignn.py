"""IGNN: products with links, the projection onto the ball, equilibria, and equality with the authors' models."""

import json
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from common.deq.grads import Backprop, Implicit, Unrolled
from common.deq.layer import DEQ
from common.deq.layers import reset
from common.deq.regular import JacobianPenalty
from common.deq.solvers import NewtonKrylov, Picard
from common.errors import UserError
from common.nets.ignn import GraphCell, IgnnGraph, IgnnNode, IgnnSkip, ImplicitLayer, project_rows, propagate


def exact_deq(**options) -> DEQ:
    return DEQ(solver=Picard(max_iter=300, tol=1e-13), grad=Unrolled(steps=5, tau=0.5), **options)


def wave(shape: tuple[int, ...], phase: int) -> Tensor:
    """Numbers every machine agrees on, as the script behind the fixture makes them."""
    n = math.prod(shape)
    return torch.sin(torch.arange(1, n + 1, dtype=torch.float64) * (1 + phase / 7) + phase).reshape(shape)


def fill(parameters: list[Tensor]) -> None:
    with torch.no_grad():
        for phase, p in enumerate(parameters):
            p.copy_(wave(tuple(p.shape), phase) / math.sqrt(p.shape[-1]))


def links() -> Tensor:
    """A small undirected graph (9, 9)."""
    a = torch.zeros(9, 9, dtype=torch.float64)
    for i, j in [(i, (2 * i + 1) % 9) for i in range(9)] + [(0, 5), (3, 4)]:
        if i != j:
            a[i, j] = a[j, i] = 1
    return a


def normalised(a: Tensor) -> Tensor:
    a = a + torch.eye(len(a), dtype=a.dtype)
    scale = a.sum(1) ** -0.5
    return scale[:, None] * a * scale


def pair(a: Tensor, sparse: bool = True) -> tuple[Tensor, Tensor]:
    """(incoming, outgoing) of a dense A."""
    both = (a.T.contiguous(), a)
    return tuple(m.to_sparse_csr() for m in both) if sparse else both


# The product ----------------------------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore:Sparse CSR tensor support is in beta")
@pytest.mark.parametrize("layout", ["csr", "coo", "dense"])
def test_product_sums_over_incoming_links(layout):
    a = torch.tensor([[0.0, 2, 0], [0, 0, 3], [0, 0, 0]])  # 0 -> 1 -> 2
    x = torch.tensor([[1.0], [10], [100]])
    convert = {"csr": Tensor.to_sparse_csr, "coo": Tensor.to_sparse, "dense": lambda m: m}[layout]
    assert propagate(x, convert(a.T.contiguous()), convert(a)).tolist() == [[0], [2], [30]]


def test_product_has_right_derivatives_of_both_orders_and_both_modes():
    a = torch.rand(4, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    incoming, outgoing = pair(a)
    x = torch.randn(4, 3, dtype=torch.float64, requires_grad=True)
    f = lambda x: propagate(x, incoming, outgoing).tanh()
    assert torch.autograd.gradcheck(f, x, check_forward_ad=True)
    assert torch.autograd.gradgradcheck(f, x)
    tangent = torch.func.jvp(lambda x: propagate(x, incoming, outgoing), (x.detach(),), (torch.ones(4, 3).double(),))[1]
    torch.testing.assert_close(tangent, a.T @ torch.ones(4, 3).double())


def test_product_in_half_precision_multiplies_in_that_of_the_links():
    incoming, outgoing = pair(normalised(links()).float())
    x = torch.randn(9, 4).bfloat16()
    out = propagate(x, incoming, outgoing)
    assert out.dtype == torch.bfloat16
    torch.testing.assert_close(out, (outgoing.to_dense().T @ x.float()).bfloat16())


# The projection -------------------------------------------------------------------------------------------------------

matrices = st.tuples(st.integers(1, 6), st.integers(1, 8), st.floats(0.01, 5), st.integers(0, 10_000))


def draw(rows: int, columns: int, seed: int) -> Tensor:
    return torch.randn(rows, columns, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


@settings(max_examples=60, deadline=None)
@given(matrices)
def test_projection_lands_in_the_ball_stays_there_and_is_nearest(case):
    rows, columns, bound, seed = case
    weight = draw(rows, columns, seed)
    found = project_rows(weight, bound)
    sums = found.abs().sum(1)
    assert (sums <= bound * (1 + 1e-12)).all()
    torch.testing.assert_close(project_rows(found, bound * (1 + 1e-12)), found, rtol=0, atol=0)
    inside = weight.abs().sum(1) <= bound
    assert torch.equal(found[inside], weight[inside])
    torch.testing.assert_close(sums[~inside], torch.full_like(sums[~inside], bound))
    # <W - P, Y - P> <= 0 for every Y in the ball characterises the nearest point; its corners suffice
    corners = torch.cat([torch.eye(columns), -torch.eye(columns)]).double() * bound
    gap = (weight - found) @ (corners.T) - ((weight - found) * found).sum(1, keepdim=True)
    assert (gap <= 1e-10).all()


def test_projection_with_ties_zeros_and_a_single_survivor():
    weight = torch.tensor([[1.0, -1, 1, -1], [0, 0, 0, 0], [5, 0.1, 0, 0], [0, 2, 0, 0]])
    torch.testing.assert_close(
        project_rows(weight, 1.0), torch.tensor([[0.25, -0.25, 0.25, -0.25], [0, 0, 0, 0], [1, 0, 0, 0], [0, 1, 0, 0]])
    )
    assert torch.equal(project_rows(weight, torch.tensor(1.0)), project_rows(weight, 1.0))


def test_projection_is_differentiable_through_its_threshold():
    weight = draw(5, 7, 3).requires_grad_()
    assert torch.autograd.gradcheck(lambda w: project_rows(w, 1.5), weight)
    jacobian = torch.autograd.functional.jacobian(lambda w: project_rows(w[None], 0.5)[0], draw(1, 6, 1)[0])
    torch.testing.assert_close(jacobian @ jacobian, jacobian)  # that of a projection


def layer(projection: str, norm: str = "none", kappa: float | None = 0.5) -> ImplicitLayer:
    torch.manual_seed(0)
    return ImplicitLayer(3, 6, kappa=kappa, self_term=True, norm=norm, clip=None, projection=projection).double()


def test_projection_of_the_parameter_moves_it_in_training_only():
    part, radius = layer("parameter"), torch.tensor(2.0)
    before = part.w.weight.detach().clone()
    used = part.eval().weight(radius)
    assert torch.equal(part.w.weight, before)
    torch.testing.assert_close(used, project_rows(before, 0.25))
    assert (before.abs().sum(1) > 0.25).all()
    assert part.train().weight(radius) is part.w.weight
    torch.testing.assert_close(part.w.weight.detach(), project_rows(before, 0.25))


def test_straight_and_exact_projections_differ_in_the_gradient_alone():
    radius, probe = torch.tensor(2.0), draw(6, 6, 5)
    grads, values = {}, {}
    for projection in ("straight", "exact"):
        part = layer(projection)
        values[projection] = part.weight(radius)
        (values[projection] * probe).sum().backward()
        grads[projection] = part.w.weight.grad
    torch.testing.assert_close(values["straight"], values["exact"])
    torch.testing.assert_close(grads["straight"], probe)
    rows = torch.autograd.functional.jvp(lambda w: project_rows(w, 0.25), part.w.weight.detach(), probe)[1]
    torch.testing.assert_close(grads["exact"], rows)  # the Jacobian of a projection is symmetric


def test_auto_projects_the_parameter_without_norm_and_passes_straight_with_one():
    assert layer("auto").projection == "parameter"
    assert layer("auto", norm="spectral").projection == "straight"
    part = layer("auto", kappa=None)
    assert part.weight(torch.tensor(1.0)) is part.w.weight


# The equilibrium ------------------------------------------------------------------------------------------------------


@settings(max_examples=15, deadline=None)
@given(st.integers(0, 10_000), st.floats(0.05, 0.98), st.booleans())
def test_the_projected_map_contracts_whatever_the_weights(seed, kappa, raw):
    a = links()
    a[8, 2] = a[2, 8] = 1  # connected, so that the Perron vector is positive
    a = a if raw else normalised(a)
    radius = torch.linalg.eigvals(a).abs().max()
    part = layer("exact", kappa=kappa)
    with torch.no_grad():
        part.w.weight.copy_(100 * draw(6, 6, seed))
    weight = part.weight(radius).detach()
    b = draw(9, 6, seed + 1)[None]
    step = lambda z: GraphCell()(z, b, weight, *pair(a))
    one, other = draw(9, 6, seed + 2)[None], draw(9, 6, seed + 3)[None]
    # contraction by kappa in the norm max_j sum_i |z_ij| p_i with p the Perron vector of A, for symmetric A
    perron = torch.linalg.eigh(a).eigenvectors[:, -1].abs()[:, None]
    size = lambda z: (z[0].abs() / perron).max()
    assert size(step(one) - step(other)) <= kappa * size(one - other) * (1 + 1e-9)


def node_net(**options) -> IgnnNode:
    torch.manual_seed(1)
    return IgnnNode(4, 3, options.pop("deq", exact_deq()), hidden=5, dropout=0.0, **options).double()


def inputs(a: Tensor, sparse: bool = True, radius: float = 1.0) -> tuple:
    owner = torch.zeros(len(a), dtype=torch.int64)
    return wave((len(a), 4), 3), *pair(a, sparse), torch.tensor(radius, dtype=torch.float64), owner


def test_the_state_is_a_fixed_point_and_the_solver_sees_one_sample():
    net, a = node_net(), normalised(links())
    x, incoming, outgoing, radius, _ = inputs(a)
    (z,) = net.eval().equilibria(0, x, incoming, outgoing, radius)
    weight = net.layers[0].weight(radius)
    b = net.layers[0].inject(x, incoming, outgoing)[0]
    torch.testing.assert_close(z, (a.T @ z @ weight.T + b).relu(), rtol=0, atol=1e-11)
    assert net.deq.solution.steps.shape == (1,) and bool(net.deq.solution.converged.all())
    torch.testing.assert_close(b, a.T @ x @ net.layers[0].omega_1.weight.T + x @ net.layers[0].omega_2.weight.T)


def test_implicit_gradient_equals_finite_differences():
    solver = Picard(max_iter=500, tol=1e-14)
    # autograd would refuse "parameter", which writes W between gradcheck's forwards
    net = node_net(deq=DEQ(solver=solver, grad=Implicit(solver=solver)), projection="exact").train()
    x, *rest = inputs(normalised(links()))
    assert torch.autograd.gradcheck(lambda x: net(x, *rest), x.requires_grad_(), atol=1e-6, check_undefined_grad=False)


def test_newton_krylov_finds_the_same_state():
    a = normalised(links())
    plain = node_net().eval()(*inputs(a))
    newton = node_net(deq=DEQ(solver=NewtonKrylov(max_iter=20, tol=1e-12))).eval()(*inputs(a))
    torch.testing.assert_close(newton, plain, rtol=1e-8, atol=1e-9)


@pytest.mark.parametrize("kind", [IgnnSkip, IgnnNode, IgnnGraph])
def test_dense_and_sparse_links_give_the_same(kind):
    torch.manual_seed(0)
    net = kind(4, 3, exact_deq(), hidden=3).double().eval()
    a = normalised(links())
    torch.testing.assert_close(net(*inputs(a)), net(*inputs(a, sparse=False)))


def test_graphs_side_by_side_do_not_disturb_each_other():
    torch.manual_seed(0)
    net = IgnnGraph(4, 3, exact_deq(), hidden=5).double().eval()
    a, small = normalised(links()), normalised(links()[:5, :5])
    x, y = wave((9, 4), 3), wave((5, 4), 2)
    radius, owner = torch.tensor(1.0).double(), torch.tensor([0] * 9 + [1] * 5)
    joint = net(torch.cat([x, y]), *pair(torch.block_diag(a, small)), radius, owner, 2)
    alone = [net(v, *pair(m), radius, torch.zeros(len(v), dtype=torch.int64), 1) for v, m in ((x, a), (y, small))]
    torch.testing.assert_close(joint, torch.cat(alone))


def test_renaming_nodes_renames_the_answers():
    net, a = node_net().eval(), normalised(links())
    order = torch.randperm(9)
    x, _, _, radius, owner = inputs(a)
    torch.testing.assert_close(
        net(x[order], *pair(a[order][:, order].contiguous()), radius, owner), net(*inputs(a))[order]
    )


def test_a_finite_number_of_hops_cannot_see_further():
    """Chain of 6: with two applications the logits of node 4 ignore node 0, at the equilibrium they do not."""
    a = torch.diag(torch.ones(5), 1).double()
    moved = wave((6, 4), 3)
    moved[0] += 1
    hops = DEQ(solver=Picard(max_iter=2, stop="never"), grad=Backprop())
    for deq, sees in ((hops, False), (exact_deq(), True)):
        net = node_net(deq=deq, normalise=False, kappa=None).train()
        x, *rest = inputs(a)
        with torch.no_grad():
            net.layers[0].w.weight.copy_(0.9 * torch.eye(5))
            for omega in (net.layers[0].omega_1, net.layers[0].omega_2):
                omega.weight.abs_()
        change = (net(x.abs(), *rest) - net(moved.abs(), *rest)).abs().sum(1)
        assert change[1] > 0 and (change[4] > 1e-6) == sees
        change = (net.eval()(x.abs(), *rest) - net(moved.abs(), *rest)).abs().sum(1)
        assert change[1] > 0 and (change[4] > 1e-6) == sees


def test_states_and_penalties_of_several_layers():
    torch.manual_seed(0)
    deq = DEQ(solver=Picard(max_iter=12, tol=1e-6), grad=Unrolled(steps=1), states=3, penalty=JacobianPenalty())
    net = IgnnSkip(4, 3, deq, hidden=2, norm="none", clip=None).double().train()
    outputs = net.outputs(*inputs(links(), radius=4.0))
    assert [o.shape for o in outputs] == [(9, 3)] * 3
    parts = [other.penalty_value.item() for other in net.deqs]
    assert len(parts) == 4 and min(parts) > 0 and net.deq.penalty_value.item() > sum(parts)
    assert all(other.solution is not None for other in (*net.deqs, net.deq))
    net.eval()
    assert len(net.outputs(*inputs(links(), radius=4.0))) == 1 and net.deq.penalty_value is None


def test_every_parameter_gets_a_gradient():
    for kind, options in ((IgnnSkip, {}), (IgnnSkip, {"norm": "none", "clip": None}), (IgnnNode, {}), (IgnnGraph, {})):
        torch.manual_seed(0)
        net = kind(4, 3, exact_deq(), hidden=4, **options).double().train()
        reset(net)
        net(*inputs(normalised(links()))).square().sum().backward()
        assert [name for name, p in net.named_parameters() if p.grad is None] == []


# Against the authors' code --------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def official(repo):
    return json.loads((repo / "tests/fixtures/nets/ignn_official.json").read_text())


def compare(logits: Tensor, net, recorded: dict, key: str = "logits") -> None:
    torch.testing.assert_close(logits, torch.tensor(recorded[key], dtype=torch.float64), rtol=1e-5, atol=1e-7)
    (logits * wave(tuple(logits.shape), 1)).sum().backward()
    expected = torch.tensor(recorded["w_grad"], dtype=torch.float64)
    torch.testing.assert_close(net.layers[0].w.weight.grad, expected, rtol=1e-5, atol=1e-5)


def weights(net) -> list[Tensor]:
    return [p for part in net.layers for p in part.parameters()]


def test_official_ppi_model(official):
    net = IgnnSkip(4, 3, exact_deq(), hidden=2, norm="none", clip=None).double().train()
    fill([*weights(net), *net.skips.parameters()])
    a, recorded = links(), official["skip"]
    compare(net(*inputs(a, radius=recorded["radius"])), net, recorded)


def test_official_chains_model(official):
    net = IgnnNode(4, 3, exact_deq(), hidden=5, dropout=0.0, start="input").double().train()
    fill([*weights(net), net.head.weight])
    directed = normalised(torch.triu(links()))
    compare(net(*inputs(directed, radius=official["node"]["radius"])), net, official["node"])


def test_official_graph_model(official):
    net = IgnnGraph(4, 3, exact_deq(), hidden=5, dropout=0.0).double().train()
    fill([*weights(net), *net.hidden.parameters(), *net.head.parameters()])
    a = links()
    a[:4, 4:] = a[4:, :4] = 0
    x, incoming, outgoing, radius, _ = inputs(normalised(a))
    logits = net(x, incoming, outgoing, radius, torch.tensor([0] * 4 + [1] * 5), 2)
    compare(logits.log_softmax(1), net, official["graph"], "log_probabilities")


def test_official_sizes():
    """Parameters of the official models less what enters nothing there: biases, and Omega_2 of the graph model."""
    count = lambda net: sum(p.numel() for p in net.parameters())
    assert count(IgnnSkip(50, 121, exact_deq())) == 4_664_206 - (1024 + 512 + 512 + 256 + 121)
    assert count(IgnnNode(100, 2, exact_deq())) == 3_504 - 16
    assert count(IgnnGraph(35, 2, exact_deq())) == 37_634 - 3 * 64 - 64 * (35 + 64 + 64)
    assert count(IgnnGraph(3, 2, exact_deq())) == 33_538 - 3 * 64 - 64 * (3 + 64 + 64)


# Refusals -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "make, sentence",
    [
        (lambda: IgnnNode(4, 3, exact_deq(), kappa=1.0), r"project\.net\.kappa must be > 0 and < 1, got 1\.0"),
        (lambda: IgnnNode(4, 3, exact_deq(), norm="wieght"), r"project\.net\.norm must be one of .*Closest: weight"),
        (lambda: IgnnNode(4, 3, exact_deq(), start="ones"), r"project\.net\.start must be one of input, zeros"),
        (lambda: IgnnNode(4, 3, exact_deq(), projection="hard"), r"project\.net\.projection must be one of"),
        (lambda: IgnnSkip(4, 3, exact_deq(), projection="parameter"), r"Set project\.net\.projection=straight"),
        (lambda: IgnnSkip(4, 3, exact_deq(), hidden=0), r"project\.net\.hidden must be a whole number >= 1"),
        (lambda: IgnnGraph(4, 3, exact_deq(), depth=0), r"project\.net\.depth must be a whole number >= 1"),
        (
            lambda: node_net()(torch.zeros(9, 7).double(), *inputs(links())[1:]),
            r"project\.net\.in_features is 4, but the data has 7 .*in_features=7",
        ),
    ],
)
def test_refusals(make, sentence):
    with pytest.raises(UserError, match=sentence):
        make()


@pytest.mark.parametrize(("clip", "gain"), [(1.0, 1.0), (None, None)])
def test_a_limited_spectral_norm_starts_from_gains_of_one(clip, gain):
    """As in the zoo's run on PPI: no weight has a norm above 1, whatever its uniform start; without limit f stays."""
    torch.manual_seed(0)
    made = ImplicitLayer(5, 16, kappa=0.9, self_term=True, norm="spectral", clip=clip, projection="auto")
    for linear in (made.w, made.omega_1, made.omega_2):
        size = torch.linalg.matrix_norm(linear.weight, 2).item()
        gains = linear.parametrizations.weight.original0
        raw = torch.linalg.matrix_norm(linear.parametrizations.weight.original1, 2).item()
        assert size == pytest.approx(raw if gain is None else min(raw, gain), rel=1e-4)
        assert gain is None or (gains == gain).all()
    assert torch.linalg.matrix_norm(made.w.parametrizations.weight.original1, 2) > 1.01  # the limit acts on it
