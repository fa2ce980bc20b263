"""The phantom gradient's own mathematics, the direction table against it, and what its experiments train."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from common.deq.grads import Backprop, Implicit, Neumann, OneStep, Unrolled
from common.deq.layer import DEQ
from common.deq.solvers import Anderson, Picard
from common.errors import UserError
from projects.phantom_grad.directions import Directions, TanhDEQ
from projects.phantom_grad.method import ascent_condition, exact_direction, phantom_matrix


def contraction(size: int, seed: int, norm: float) -> torch.Tensor:
    a = torch.randn(size, size, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    return a * norm / torch.linalg.matrix_norm(a, 2)


# ---------------------------------------------------------------------------------------------------------------------
# Matrices


@given(seed=st.integers(0, 10_000), k=st.integers(1, 12), tau=st.sampled_from([0.3, 0.5, 0.7, 1.0]))
@settings(max_examples=30, deadline=None)
def test_phantom_matrix_is_the_neumann_series_and_both_rules_compute_it(seed, k, tau):
    a = contraction(5, seed, 0.8)
    damped = tau * a + (1 - tau) * torch.eye(5, dtype=torch.float64)
    series = tau * sum(torch.linalg.matrix_power(damped, t) for t in range(k))
    matrix = phantom_matrix(a, k, tau)
    torch.testing.assert_close(matrix, series, rtol=1e-10, atol=1e-10)

    b = torch.zeros(5, dtype=torch.float64, requires_grad=True)
    z = torch.linalg.solve(torch.eye(5, dtype=torch.float64) - a, b.detach()).expand(1, 5)
    g = torch.randn(1, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(seed + 1))
    for rule in (Unrolled(steps=k, tau=tau), Neumann(steps=k, tau=tau)):
        (grad,) = torch.autograd.grad((rule.attach(lambda z: z @ a.T + b, z, None)[-1] * g).sum(), b)
        torch.testing.assert_close(grad, (g @ matrix)[0], rtol=1e-9, atol=1e-11)


def test_phantom_matrix_tends_to_the_inverse_for_every_damping():
    a = contraction(6, 0, 0.7)
    inverse = torch.linalg.inv(torch.eye(6, dtype=torch.float64) - a)
    errors = {tau: torch.linalg.matrix_norm(phantom_matrix(a, 400, tau) - inverse, 2) for tau in (0.3, 0.9)}
    assert max(errors.values()) < 1e-9
    g = torch.randn(3, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(exact_direction(a.expand(3, 6, 6), g), g @ inverse)


def test_cosine_grows_with_k_on_a_contraction_and_is_positive_for_symmetric_maps():
    a = contraction(16, 3, 0.5)
    g = torch.randn(64, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    exact = exact_direction(a.expand(64, 16, 16), g)
    cosines = [torch.cosine_similarity(g @ phantom_matrix(a, k, 1.0), exact).mean().item() for k in range(1, 8)]
    assert cosines == sorted(cosines) and cosines[-1] > 0.9999
    symmetric = a @ a.T  # positive semi-definite, norm < 1
    exact = exact_direction(symmetric.expand(64, 16, 16), g)
    for k in (1, 2, 3, 7):
        assert ((g @ phantom_matrix(symmetric, k, 0.5)) * exact).sum(1).min() > 0


@given(seed=st.integers(0, 10_000), norm=st.floats(0.05, 0.95), k=st.integers(1, 10))
@settings(max_examples=60, deadline=None)
def test_where_the_ascent_condition_holds_no_gradient_turns_around(seed, norm, k):
    a = contraction(4, seed, norm)
    generator = torch.Generator().manual_seed(seed + 1)
    p = torch.randn(4, 9, dtype=torch.float64, generator=generator)
    stand_in = phantom_matrix(a, k, 0.5) @ p
    left, right = ascent_condition(a, p, stand_in)
    exact = torch.linalg.solve(torch.eye(4, dtype=torch.float64) - a, p)
    torch.testing.assert_close(left, torch.linalg.matrix_norm((torch.eye(4).double() - a) @ (stand_in - exact), 2))
    product = stand_in @ exact.T  # g (A X^T) g^T is the inner product for g
    worst = torch.linalg.eigvalsh((product + product.T) / 2).min()
    if left <= right:
        assert worst >= -1e-9


def test_the_ascent_condition_is_met_by_more_steps():
    a = contraction(4, 5, 0.6)
    p = torch.randn(4, 40, dtype=torch.float64, generator=torch.Generator().manual_seed(6))
    met = [bool(torch.less_equal(*ascent_condition(a, p, phantom_matrix(a, k, 1.0) @ p))) for k in (1, 20)]
    assert met == [False, True]


# ---------------------------------------------------------------------------------------------------------------------
# The direction table


def directions(**rules) -> Directions:
    torch.manual_seed(0)
    net = TanhDEQ(deq=DEQ(solver=Anderson(max_iter=40, tol=1e-5), grad=Unrolled()), inputs=9, width=12, num_classes=4)
    return Directions(net=net, rules=rules, optimizer=torch.optim.Adam, schedule=None, correction=None)


def batch(n: int = 8) -> dict:
    generator = torch.Generator().manual_seed(1)
    return {"image": torch.randn(n, 1, 3, 3, generator=generator), "label": torch.arange(n) % 4}


def test_the_exact_gradient_of_the_table_is_the_exact_gradient():
    """Against full backpropagation through a solve to convergence, which shares nothing with the dense solve."""
    module = directions(
        implicit=Implicit(solver=Picard(max_iter=2000, tol=1e-13)), one=OneStep(), many=Neumann(steps=500, tau=1.0)
    )
    rows = module.compare(batch())
    for name in ("implicit", "many"):
        cosine, error, scale = rows[name]
        assert cosine == pytest.approx(1, abs=1e-10) and error < 1e-9 and scale == pytest.approx(1, abs=1e-9)
    assert rows["one"][0] < 0.999 and rows["one"][1] > 0.01

    net = module.net.double()
    images, label = batch()["image"].double(), batch()["label"]
    u = net.inputs(images.flatten(1))
    z = Backprop(steps=400).run(net.cell, torch.zeros_like(u), (u,), solver=Picard()).z
    (full,) = torch.autograd.grad(torch.nn.functional.cross_entropy(net.head(z), label), net.cell.weight)
    z = OneStep().attach(net.cell, z.detach(), (u.detach(),))[-1]
    (one,) = torch.autograd.grad(torch.nn.functional.cross_entropy(net.head(z), label), net.cell.weight)
    assert rows["one"][1] == pytest.approx(float((one - full).norm() / full.norm()), rel=1e-6)


def test_directions_refuses_rules_that_need_the_solve():
    with pytest.raises(UserError, match=r"project\.rules\.full needs the solve"):
        directions(full=Backprop())


def test_directions_trains_and_reports_every_rule():
    module = directions(one=OneStep(), five=Unrolled())
    loss = module.train().training_step(batch(), 0)
    loss.backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in module.net.parameters())
    module.eval()
    with torch.no_grad():
        found = module.evaluation_step(batch())
    assert {"top1", "loss", "one_cosine", "one_error", "one_scale", "five_cosine"} <= found.keys()
    assert found["five_cosine"][0] > found["one_cosine"][0]


def test_gradient_rules_of_the_sheet_on_a_wide_tanh_layer():
    """phantom_grad.md, small-scale claim 3: the order and rough size of the cosines on D = 512."""
    generator = torch.Generator().manual_seed(0)
    w = torch.randn(512, 512, generator=generator, dtype=torch.float64)
    w = (w * 0.9 / torch.linalg.matrix_norm(w, 2)).requires_grad_()
    x = torch.randn(8, 512, generator=generator, dtype=torch.float64)
    f = lambda z: torch.tanh(z @ w.T + x)
    z = torch.zeros(8, 512, dtype=torch.float64)
    with torch.no_grad():
        for _ in range(200):
            z = f(z)
    c = torch.randn(8, 512, generator=generator, dtype=torch.float64)
    grads = {}
    for name, rule in {
        "1": OneStep(),
        "5h": Unrolled(),
        "5": Unrolled(tau=1.0),
        "exact": Neumann(steps=200, tau=1.0),
    }.items():
        (grads[name],) = torch.autograd.grad((rule.attach(f, z, None)[-1] * c).sum(), w)
    cosine = {n: torch.cosine_similarity(g.flatten(), grads["exact"].flatten(), dim=0).item() for n, g in grads.items()}
    assert 0.9 < cosine["1"] < cosine["5h"] < cosine["5"] < 1 and cosine["5"] > 0.999
