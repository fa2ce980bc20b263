"""Every gradient rule against the closed forms of the phantom gradient (2111.05177), in double, at fixed points."""

import math
import shutil
import warnings

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.checkpoint import checkpoint

from common.deq.grads import Backprop, Implicit, Neumann, OneStep, Shine, Unrolled
from common.deq.solve import NotConverged, solve
from common.deq.solvers import Anderson, Broyden, NewtonKrylov, Picard
from common.errors import UserError

D64 = torch.float64
FORWARD = Broyden(max_iter=200, tol=1e-13)
BACKWARD = Picard(max_iter=400, tol=1e-14)
EXACT = {
    "hook": lambda: Implicit(solver=BACKWARD),
    "function": lambda: Implicit(solver=BACKWARD, recompute=True),
    "anderson": lambda: Implicit(solver=Anderson(max_iter=200, tol=1e-13)),
    "broyden": lambda: Implicit(solver=Broyden(max_iter=200, tol=1e-13)),
    "neumann": lambda: Neumann(steps=300, tau=1.0),
    "unrolled": lambda: Unrolled(steps=300, tau=1.0),
    "shine": lambda: Shine(refine=300),
}
RULES = {
    "onestep": OneStep,
    "onestep_recompute": lambda: OneStep(recompute=True),
    "unrolled": lambda: Unrolled(steps=3, tau=0.6),
    "unrolled_recompute": lambda: Unrolled(steps=3, tau=0.6, recompute=True),
    "neumann": lambda: Neumann(steps=3, tau=0.6),
    "hook": lambda: Implicit(),
    "function": lambda: Implicit(recompute=True),
    "shine": lambda: Shine(refine=1),
    "backprop": lambda: Backprop(steps=4, tau=0.8),
    "backprop_recompute": lambda: Backprop(steps=4, recompute=True),
}
EVERY = pytest.mark.parametrize("name", RULES)


def cell(z, x, w, u):
    return torch.tanh(z @ w.T + x @ u.T)


def problem(width=5, batch=3, norm=0.8, seed=0, inputs=4, dtype=D64):
    generator = torch.Generator().manual_seed(seed)
    draw = lambda *shape: torch.randn(*shape, generator=generator, dtype=D64)
    w = draw(width, width)
    w = (w * norm / torch.linalg.matrix_norm(w, 2)).to(dtype).requires_grad_()
    u = (0.7 * draw(width, inputs)).to(dtype).requires_grad_()
    return w, u, draw(batch, inputs).to(dtype).requires_grad_()


def attached(rule, w, u, x, solver=FORWARD, fn=cell, **options):
    z0 = torch.zeros(len(x), w.shape[0], dtype=w.dtype)
    return solve(lambda z, x: fn(z, x, w, u), z0, (x,), solver=solver, grad=rule, **options).z


def loss_of(z):
    """Not linear in z, so that the incoming gradient depends on it."""
    return (z.square() * torch.linspace(-1, 2, z[0].numel(), dtype=z.dtype).reshape(z.shape[1:])).sum() + z.prod(
        1
    ).sum()


def grads_of(rule, w, u, x, **options):
    return torch.autograd.grad(loss_of(attached(rule, w, u, x, **options)), (w, u, x))


def parts(w, u, x):
    """z* (B, D); J (B, D, D); g = dL/dz* (B, D); and v -> v P for the parameters and inputs."""
    z = attached(None, w, u, x).detach()
    own = lambda v, x: cell(v[None], x[None], w, u)[0]
    jacobian = torch.vmap(torch.func.jacrev(own))(z, x.detach()).detach()
    leaf = z.clone().requires_grad_()
    (g,) = torch.autograd.grad(loss_of(leaf), leaf)
    return z, jacobian, g, lambda v: torch.autograd.grad(cell(z, x, w, u), (w, u, x), v)


def rowwise(v, matrices):
    return (v.unsqueeze(1) @ matrices).squeeze(1)


def close(got, expected, rtol=1e-8):
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=rtol, atol=rtol * float(b.abs().max()))


# The exact rules


@pytest.mark.parametrize("name", EXACT)
def test_exact_rules_against_a_dense_solve(name):
    w, u, x = problem()
    _, jacobian, g, through = parts(w, u, x)
    dense = torch.linalg.solve(torch.eye(5, dtype=D64) - jacobian.mT, g.unsqueeze(2)).squeeze(2)
    close(grads_of(EXACT[name](), w, u, x), through(dense))


@pytest.mark.parametrize("name", EXACT)
def test_exact_rules_against_finite_differences(name):
    w, u, x = problem(width=3, batch=2, inputs=2)
    assert torch.autograd.gradcheck(lambda *p: attached(EXACT[name](), *p), (w, u, x), rtol=1e-4, atol=1e-7)


def test_backprop_against_finite_differences():
    w, u, x = problem(width=3, batch=2, inputs=2)
    for rule in (Backprop(steps=4, tau=0.7), Backprop(steps=60), Backprop(steps=3, recompute=True)):
        assert torch.autograd.gradcheck(lambda *p, rule=rule: attached(rule, *p), (w, u, x))
        z0 = torch.randn(2, 3, dtype=D64, requires_grad=True)
        run = lambda z0, rule=rule: solve(lambda z, x: cell(z, x, w, u), z0, (x,), solver=FORWARD, grad=rule).z
        assert torch.autograd.gradcheck(run, (z0,))
    close(grads_of(Backprop(steps=300), w, u, x), grads_of(EXACT["hook"](), w, u, x))


def test_single_precision_at_the_given_tolerance():
    """Linear map: the inverse-matrix gradient to 1e-6 relative, float32, tol 1e-7."""
    w, u, x = problem(width=16, norm=0.6, dtype=torch.float32)
    linear = lambda z, x, w, u: z @ w.T + x @ u.T
    solver = Picard(max_iter=200, tol=1e-7)
    z = attached(Implicit(solver=solver), w, u, x, solver=solver, fn=linear)
    got = torch.autograd.grad(z.square().sum(), (w, u, x))
    wide = [t.detach().double().requires_grad_() for t in (w, u, x)]
    exact = torch.linalg.solve(torch.eye(16, dtype=D64) - wide[0], wide[1] @ wide[2].T).T
    expected = torch.autograd.grad(exact.square().sum(), wide)
    for a, b in zip(got, expected, strict=True):
        assert (a - b).norm() <= 1e-6 * b.norm()


# The phantom rules


@settings(deadline=None, max_examples=30)
@given(steps=st.integers(1, 12), tau=st.floats(0.05, 1), seed=st.integers(0, 50), norm=st.floats(0.1, 1.5))
def test_phantom_rules_against_their_closed_form(steps, tau, seed, norm):
    """A = tau (I + B + ... + B^{k-1}) P, B = tau J + (1 - tau) I; UPG = NPG at the fixed point."""
    w, u, x = problem(seed=seed, norm=norm)
    _, jacobian, g, through = parts(w, u, x)
    damped = tau * jacobian + (1 - tau) * torch.eye(5, dtype=D64)
    total = tau * sum(rowwise(g, torch.linalg.matrix_power(damped, t)) for t in range(steps))
    expected = through(total)
    close(grads_of(Neumann(steps=steps, tau=tau), w, u, x), expected)
    close(grads_of(Unrolled(steps=steps, tau=tau), w, u, x), expected, rtol=1e-7)
    close(grads_of(Unrolled(steps=steps, tau=tau, recompute=True), w, u, x), expected, rtol=1e-7)


def test_one_step_is_the_phantom_of_one_undamped_step():
    w, u, x = problem()
    one = grads_of(OneStep(), w, u, x)
    close(one, grads_of(Neumann(steps=1, tau=1.0), w, u, x), rtol=1e-12)
    close(one, grads_of(Unrolled(steps=1, tau=1.0), w, u, x), rtol=1e-12)
    close([0.3 * g for g in one], grads_of(Neumann(steps=1, tau=0.3), w, u, x), rtol=1e-8)
    _, _, g, through = parts(w, u, x)
    close(one, through(g))


def test_the_limit_does_not_depend_on_the_damping():
    w, u, x = problem(norm=0.6)
    exact = grads_of(EXACT["hook"](), w, u, x)
    for tau in (0.3, 0.9):
        close(grads_of(Neumann(steps=200, tau=tau), w, u, x), exact, rtol=1e-7)
        close(grads_of(Unrolled(steps=200, tau=tau), w, u, x), exact, rtol=1e-7)


def test_away_from_the_fixed_point_unrolled_is_ordinary_unrolling():
    w, u, x = problem()
    start = torch.randn(3, 5, dtype=D64)
    solver = Picard(max_iter=0)
    z = solve(lambda z, x: cell(z, x, w, u), start, (x,), solver=solver, grad=Unrolled(steps=4, tau=0.7)).z
    by_hand = start
    for _ in range(4):
        by_hand = 0.7 * cell(by_hand, x, w, u) + 0.3 * by_hand
    torch.testing.assert_close(z, by_hand)
    close(torch.autograd.grad(loss_of(z), (w, u, x)), torch.autograd.grad(loss_of(by_hand), (w, u, x)), rtol=1e-12)


def cosine(a, b):
    a, b = (torch.cat([t.flatten() for t in grads]) for grads in (a, b))
    return float(a @ b / (a.norm() * b.norm()))


@pytest.mark.parametrize("seed", range(4))
def test_the_direction_gets_better_with_every_step_on_a_contraction(seed):
    w, u, x = problem(width=16, batch=4, norm=0.8, seed=seed)
    exact = grads_of(EXACT["hook"](), w, u, x)
    for tau in (0.5, 1.0):
        quality = [cosine(grads_of(Neumann(steps=k, tau=tau), w, u, x), exact) for k in (1, 2, 3, 5, 8, 13, 40)]
        assert quality == sorted(quality) and quality[-1] > 0.99999, quality
        assert quality[0] > 0.5


@pytest.mark.parametrize("seed", range(4))
def test_positive_symmetric_jacobians_always_give_an_ascent_direction(seed):
    """Linear map with J symmetric positive, norm < 1: (I - J)^-1 and every truncation of it are positive."""
    generator = torch.Generator().manual_seed(seed)
    q = torch.linalg.qr(torch.randn(6, 6, dtype=D64, generator=generator))[0]
    j = q @ torch.diag(torch.rand(6, dtype=D64, generator=generator) * 0.98) @ q.T
    b = torch.randn(2, 6, dtype=D64, generator=generator, requires_grad=True)
    goal = torch.randn(2, 6, dtype=D64, generator=generator)
    run = lambda rule: torch.autograd.grad(
        (solve(lambda z, b: z @ j.T + b, torch.zeros(2, 6, dtype=D64), (b,), solver=FORWARD, grad=rule).z * goal).sum(),
        b,
    )
    exact = run(Implicit(solver=Broyden(max_iter=100, tol=1e-12)))
    for steps in (1, 2, 3, 5, 10, 30):
        for tau in (0.1, 0.5, 1.0):
            assert cosine(run(Neumann(steps=steps, tau=tau)), exact) > 0


def test_the_condition_for_ascent():
    """||(I - J) A - P|| <= sigma_min^2 / sigma_max of P: inner product not negative, for every incoming gradient."""
    held, theta = 0, torch.zeros(9, dtype=D64, requires_grad=True)
    for seed in range(40):
        generator = torch.Generator().manual_seed(seed)
        draw = lambda *shape, g=generator: torch.randn(*shape, dtype=D64, generator=g)
        j = draw(4, 4)
        j = j * float(torch.rand((), generator=generator)) * 0.95 / torch.linalg.matrix_norm(j, 2)
        p = draw(4, 9) + 2 * torch.eye(4, 9, dtype=D64)
        eye = torch.eye(4, dtype=D64)
        for steps in (1, 3, 8):
            tau = 0.8
            damped = tau * j + (1 - tau) * eye
            a = tau * sum(torch.linalg.matrix_power(damped, t) for t in range(steps)) @ p
            sigma = torch.linalg.svdvals(p)
            if torch.linalg.matrix_norm((eye - j) @ a - p, 2) > sigma[-1] ** 2 / sigma[0]:
                continue
            held += 1
            g = draw(1, 4)
            z = solve(
                lambda z, p=p, j=j: z @ j.T + theta @ p.T, torch.zeros(1, 4, dtype=D64), solver=FORWARD,
                grad=Neumann(steps=steps, tau=tau),
            ).z  # fmt: skip
            (phantom,) = torch.autograd.grad((z * g).sum(), theta)
            torch.testing.assert_close(phantom, (g @ a)[0])
            assert phantom @ (g @ torch.linalg.solve(eye - j, p))[0] >= 0
    assert held > 20


# What every rule keeps


@EVERY
def test_the_value_is_a_refined_solution(name):
    w, u, x = problem()
    z = attached(None, w, u, x)
    rule = RULES[name]()
    torch.testing.assert_close(attached(rule, w, u, x), z, rtol=1e-9, atol=0.3 if rule.replaces_solver else 1e-9)


@EVERY
def test_the_initial_state_gets_no_gradient_but_from_backprop(name):
    w, u, x = problem()
    z0 = torch.randn(3, 5, dtype=D64, requires_grad=True)
    rule = RULES[name]()
    z = solve(lambda z, x: cell(z, x, w, u), z0, (x,), solver=FORWARD, grad=rule).z
    (gradient,) = torch.autograd.grad(loss_of(z), z0, allow_unused=True)
    assert (gradient is not None and gradient.abs().max() > 1e-6) if rule.replaces_solver else gradient is None


@EVERY
def test_structures_and_half_precision_leaves(name):
    w, u, x = problem()
    solver = Broyden(max_iter=60, tol=5e-3)

    def split(z):
        return {"a": z[:, :2].float(), "b": (z[:, 2], z[:, 3:].half())}

    def join(z):
        return torch.cat([z["a"].double(), z["b"][0][:, None], z["b"][1].double()], 1)

    start = split(torch.zeros(3, 5, dtype=D64))
    found = solve(lambda z, x: split(cell(join(z), x, w, u)), start, (x,), solver=solver, grad=RULES[name]()).z
    assert (found["a"].dtype, found["b"][0].dtype, found["b"][1].dtype) == (torch.float32, D64, torch.float16)
    got = torch.autograd.grad(loss_of(join(found)), (w, u, x))
    flat = torch.autograd.grad(loss_of(attached(RULES[name](), w, u, x, solver=solver)), (w, u, x))
    assert all(g.isfinite().all() for g in got) and cosine(got, flat) > 0.99


@EVERY
@pytest.mark.parametrize("shape", [(0, 5), (1, 5), (3, 1)])
def test_empty_and_small_batches(name, shape):
    w, u, x = problem(width=shape[1], batch=shape[0])
    z = attached(RULES[name](), w, u, x)
    assert z.shape == shape and z.requires_grad
    gradients = torch.autograd.grad(z.square().sum(), (w, u, x))
    assert all(g.isfinite().all() for g in gradients) and gradients[2].shape == x.shape


@EVERY
def test_a_scalar_state(name):
    w = torch.tensor(0.5, dtype=D64, requires_grad=True)
    z = solve(lambda z: torch.cos(w * z), torch.zeros((), dtype=D64), solver=FORWARD, grad=RULES[name]()).z
    assert z.shape == () and torch.autograd.grad(z, w)[0].isfinite()


@EVERY
def test_two_calls_in_one_graph_add_up(name):
    w, u, x = problem()
    rule = RULES[name]()
    both = loss_of(attached(rule, w, u, x)) + 2 * loss_of(attached(rule, w, u, x + 1))
    joint = torch.autograd.grad(both, (w, u))
    one = torch.autograd.grad(loss_of(attached(rule, w, u, x)), (w, u))
    two = torch.autograd.grad(2 * loss_of(attached(rule, w, u, x + 1)), (w, u))
    close(joint, [a + b for a, b in zip(one, two, strict=True)], rtol=1e-10)
    stacked = loss_of(attached(rule, w, u, attached(rule, w, u, x) @ torch.ones(5, 4, dtype=D64) / 5))
    assert all(g.isfinite().all() for g in torch.autograd.grad(stacked, (w, u, x)))


@EVERY
def test_the_graph_can_be_walked_twice_when_kept(name):
    w, u, x = problem()
    loss = loss_of(attached(RULES[name](), w, u, x))
    first = torch.autograd.grad(loss, (w, u, x), retain_graph=True)
    close(torch.autograd.grad(loss, (w, u, x)), first, rtol=1e-12)


@EVERY
def test_what_does_not_need_a_gradient_gets_none(name):
    w, u, x = problem()
    frozen = w.detach()
    z = attached(RULES[name](), frozen, u, x.detach())
    z.sum().backward()
    assert u.grad is not None and w.grad is None
    constant = attached(RULES[name](), frozen, u.detach(), x.detach())
    with torch.no_grad():
        assert not attached(RULES[name](), w, u, x).requires_grad
    torch.testing.assert_close(constant.detach(), attached(RULES[name](), w, u, x).detach())


@pytest.mark.parametrize("name", ["neumann", "hook", "function", "shine"])
@pytest.mark.parametrize("where", ["cell", "input", "head", "linear loss"])
def test_second_derivatives_are_refused(name, where):
    """A scalar map: torchdeq returns -2.803 for a second derivative of -3.440, without a word."""
    w, u, x = problem()
    head = torch.ones(5, dtype=D64, requires_grad=True)
    z = attached(RULES[name](), w, u, x)
    loss = z.sum() if where == "linear loss" else (z * head).square().sum()
    first = torch.autograd.grad(loss, (w, u, x), create_graph=True)
    plain = attached(RULES[name](), w, u, x)
    value = plain.sum() if where == "linear loss" else (plain * head).square().sum()
    close(first, torch.autograd.grad(value, (w, u, x)), rtol=1e-10)
    target = {"cell": w, "input": x, "head": head, "linear loss": w}[where]
    with pytest.raises(UserError, match="Second derivatives through an implicit or Neumann gradient are not available"):
        torch.autograd.grad(sum(g.square().sum() for g in first), target)


def test_second_derivatives_where_they_are_right():
    a = torch.tensor(0.4, dtype=D64, requires_grad=True)
    b = torch.full((1, 1), 0.3, dtype=D64)
    fn = lambda a: lambda z: torch.tanh(a * z + b)
    values = [
        solve(fn(v), torch.zeros(1, 1, dtype=D64), solver=FORWARD).z.item() for v in (0.4 - 1e-4, 0.4, 0.4 + 1e-4)
    ]
    expected = (values[0] - 2 * values[1] + values[2]) / 1e-8
    z = solve(fn(a), torch.zeros(1, 1, dtype=D64), solver=FORWARD, grad=Backprop(steps=120)).z
    (first,) = torch.autograd.grad(z.sum(), a, create_graph=True)
    (second,) = torch.autograd.grad(first, a)
    assert float(second) == pytest.approx(expected, rel=1e-4)


# The backward solve and its report


def test_the_backward_solve_is_reported():
    w, u, x = problem()
    seen = []
    rule = Implicit(solver=Picard(max_iter=30, tol=1e-6))
    rule.on_report = seen.append
    loss_of(attached(rule, w, u, x)).backward()
    assert rule.report is seen[0] and rule.report.converged.all() and rule.report.z is None
    assert rule.report.steps.max() > 1 and (rule.report.residual_rel <= 1e-6).all()
    loose = Implicit(solver=Picard(max_iter=2, tol=1e-12), throw=True)
    with pytest.raises(NotConverged, match="3 of 3 samples did not reach rel residual 1e-12 in 2 steps"):
        loss_of(attached(loose, w, u, x)).backward()


def test_a_backward_solve_without_steps_is_the_one_step_gradient():
    w, u, x = problem()
    close(grads_of(Implicit(solver=Picard(max_iter=0)), w, u, x), grads_of(OneStep(), w, u, x), rtol=1e-12)
    close(
        grads_of(Implicit(solver=Picard(max_iter=2)), w, u, x), grads_of(Neumann(steps=3, tau=1.0), w, u, x), rtol=1e-12
    )


@pytest.mark.parametrize("name", ["neumann", "hook", "function", "shine"])
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_gradient_that_is_not_finite_stays_so_and_stays_with_its_sample(name, bad):
    """Loss scaling looks for it; other samples go on."""
    w, u, x = problem()
    weight = torch.ones(3, 5, dtype=D64)
    clean = torch.autograd.grad((attached(RULES[name](), w, u, x) * weight).sum(), x)[0]
    weight[1] = bad
    (found,) = torch.autograd.grad((attached(RULES[name](), w, u, x) * weight).sum(), x)
    assert not found[1].isfinite().any() and torch.equal(found[[0, 2]], clean[[0, 2]])


def test_a_diverging_backward_sample_leaves_the_others_alone():
    scale = torch.tensor([[0.5], [3.0], [0.4]], dtype=D64)
    x = torch.full((3, 2), 0.7, dtype=D64, requires_grad=True)
    z0 = torch.zeros(3, 2, dtype=D64)
    fn = lambda z, x: scale * z + x  # sample 1 repels, Newton finds it
    z = solve(fn, z0, (x,), solver=NewtonKrylov(max_iter=20, tol=1e-12), grad=Implicit(solver=BACKWARD)).z
    (gradient,) = torch.autograd.grad(z.sum(), x)
    torch.testing.assert_close(gradient[[0, 2]], (1 / (1 - scale[[0, 2]])).expand(-1, 2), rtol=1e-9, atol=0)
    assert gradient.isfinite().all()
    z = solve(fn, z0, (x,), solver=NewtonKrylov(max_iter=20, tol=1e-12), grad=Implicit(solver=Broyden(tol=1e-12))).z
    (gradient,) = torch.autograd.grad(z.sum(), x)
    torch.testing.assert_close(gradient, (1 / (1 - scale)).expand(-1, 2), rtol=1e-9, atol=0)


def test_shine_uses_what_the_forward_solve_learnt():
    w, u, x = problem(width=8, norm=0.9)
    exact, one = grads_of(EXACT["hook"](), w, u, x), grads_of(OneStep(), w, u, x)
    solver = Broyden(max_iter=60, tol=1e-10)
    shine = [cosine(grads_of(Shine(refine=n), w, u, x, solver=solver), exact) for n in (0, 1, 5, 60)]
    assert shine[0] > cosine(one, exact) and shine[-1] > 1 - 1e-9 and shine == sorted(shine)
    products = []
    rule = Shine()
    z = attached(rule, w, u, x, solver=solver, fn=lambda *a: products.append(1) or cell(*a))
    forward = len(products)
    z.sum().backward()
    assert len(products) == forward, "the backward pass evaluates nothing"
    with pytest.raises(
        UserError, match=r"Shine reuses the inverse of a Broyden solve. Set solver to common.deq.solvers.B"
    ):
        attached(Shine(), w, u, x, solver=Picard())


def test_calls_of_the_map_per_rule():
    w, u, x = problem()
    counts = {}
    for name in RULES:
        calls = []
        solver = Broyden(max_iter=40, tol=1e-8)
        z = attached(RULES[name](), w, u, x, solver=solver, fn=lambda *a, c=calls: c.append(1) or cell(*a))
        forward = len(calls)
        z.sum().backward()
        counts[name] = (forward, len(calls) - forward)
    solved = counts["onestep"][0] - 1
    assert counts["onestep"] == (solved + 1, 0) and counts["onestep_recompute"] == (solved + 1, 1)
    assert counts["unrolled"] == (solved + 3, 0) and counts["unrolled_recompute"] == (solved + 3, 3)
    assert counts["neumann"] == counts["hook"] == (solved + 1, 0) and counts["function"] == (solved + 1, 1)
    assert counts["backprop"] == (4, 0) and counts["backprop_recompute"] == (4, 4)


# States along the unrolling


def test_states_of_the_unrolled_steps():
    w, u, x = problem()
    z = torch.randn(3, 5, dtype=D64)
    fn = lambda z: cell(z, x, w, u)
    by_hand = [z]
    for _ in range(6):
        by_hand.append(0.5 * fn(by_hand[-1]) + 0.5 * by_hand[-1])
    for rule, expected in (
        (Unrolled(steps=6), [6]),
        (Unrolled(steps=6, gap=1), [1, 2, 3, 4, 5, 6]),
        (Unrolled(steps=6, gap=2), [2, 4, 6]),
        (Unrolled(steps=6, gap=4), [4, 6]),
        (Unrolled(steps=6, at=(2, 3)), [2, 3, 6]),
        (Unrolled(steps=6, at=(6,)), [6]),
    ):
        states = rule.attach(fn, z, None)
        assert len(states) == len(expected)
        for state, position in zip(states, expected, strict=True):
            torch.testing.assert_close(state, by_hand[position])


def test_backprop_is_measured_like_plain_iteration():
    w, u, x = problem()
    z0 = torch.zeros(3, 5, dtype=D64)
    for stop in ("rel", "abs"):
        run = lambda grad, steps, stop=stop: solve(
            lambda z: cell(z, x, w, u), z0, solver=Picard(max_iter=steps, tol=1e-4, stop=stop, tau=0.8), grad=grad,
            states_at=(1, 3, 5), trajectory=True,
        )  # fmt: skip
        for steps in (5, 60):
            found, plain = run(Backprop(tau=0.8), steps), run(None, steps)
            assert found.steps.tolist() == [steps] * 3 and found.calls == steps and found.stop == stop
            assert torch.equal(found.converged, found.residual <= 1e-4)
            if steps == 5:
                torch.testing.assert_close(found.residual_abs, plain.residual_abs)
                torch.testing.assert_close(found.z, plain.z)
            else:
                assert found.converged.all() and "All 3 samples converged" in found.message
            torch.testing.assert_close(found.states[0], plain.states[0])
            assert found.states[0].requires_grad and len(found.states) == 3 and len(found.trajectory) == steps
            torch.testing.assert_close(found.trajectory[:5], plain.trajectory[:5])
    with pytest.raises(UserError, match=r"unrolls solver.max_iter=0 steps"):
        solve(lambda z: z, z0, solver=Picard(max_iter=0), grad=Backprop())


# Surroundings: autocast, compilation, checkpoints, shapes alone


@EVERY
def test_under_autocast(name):
    torch.manual_seed(0)
    linear = nn.Linear(16, 16)
    with torch.no_grad():
        linear.weight.mul_(0.8 / torch.linalg.matrix_norm(linear.weight, 2))
    x = torch.randn(6, 16)
    solver = Broyden(max_iter=30, tol=1e-3)

    def gradient(enabled, backward_inside):
        linear.zero_grad()
        inputs = x.clone().requires_grad_()
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            fn = lambda z, x: torch.tanh(linear(z) + x)
            z = solve(fn, torch.zeros(6, 16), (inputs,), solver=solver, grad=RULES[name]()).z
            assert z.dtype == torch.float32
            loss = z.square().sum()
            if backward_inside:
                loss.backward()
        if not backward_inside:
            loss.backward()
        return [linear.weight.grad.clone(), linear.bias.grad.clone(), inputs.grad]

    exact = gradient(False, False)
    for inside in (False, True):
        low = gradient(True, inside)
        assert all(g.isfinite().all() and g.dtype == torch.float32 for g in low)
        assert cosine(low, exact) > 0.999 and all(
            (a - b).norm() < 0.05 * b.norm() for a, b in zip(low, exact, strict=True)
        )


def compiled_matches(name, backend):
    torch._dynamo.reset()
    torch.manual_seed(0)
    linear = nn.Linear(8, 8)
    with torch.no_grad():
        linear.weight.mul_(0.6)
    x = torch.randn(4, 8)
    # layer_norm and tanh save tensors of their own: buffers a compiled backward would like to reuse
    plain = lambda z, x: 0.5 * torch.tanh(nn.functional.layer_norm(linear(z) + x, (8,)))
    results = []
    for fn in (plain, torch.compile(plain, backend=backend, dynamic=True)):
        for _ in range(2):
            linear.zero_grad()
            inputs = x.clone().requires_grad_()
            solver = Broyden(max_iter=30, tol=1e-6)
            z = solve(fn, torch.zeros(4, 8), (inputs,), solver=solver, grad=RULES[name]()).z
            z.square().sum().backward()
            results.append([linear.weight.grad.clone(), inputs.grad])
    for got in results[1:]:
        close(got, results[0], rtol=1e-5 if name != "shine" else 2e-2)


@EVERY
@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_a_compiled_cell(name, backend):
    compiled_matches(name, backend)


@pytest.mark.slow
@pytest.mark.skipif(not (shutil.which("g++") or shutil.which("clang++")), reason="no C++ compiler")
@EVERY
def test_a_cell_compiled_to_machine_code(name):
    compiled_matches(name, "inductor")


@EVERY
def test_a_layer_inside_an_activation_checkpoint(name):
    w, u, x = problem()
    plain = grads_of(RULES[name](), w, u, x)
    inside = checkpoint(lambda x: attached(RULES[name](), w, u, x), x, use_reentrant=False)
    close(torch.autograd.grad(loss_of(inside), (w, u, x)), plain, rtol=1e-10)


@EVERY
def test_a_checkpointed_cell(name):
    w, u, x = problem()
    plain = grads_of(RULES[name](), w, u, x)
    saved = lambda *a: checkpoint(cell, *a, use_reentrant=False)
    close(grads_of(RULES[name](), w, u, x, fn=saved), plain, rtol=1e-10)


@EVERY
def test_shapes_alone(name):
    with FakeTensorMode():
        w, u, x = (torch.zeros(s, requires_grad=True) for s in ((5, 5), (5, 4), (3, 4)))
        solver = Broyden(max_iter=3)
        z = attached(RULES[name](), w, u, x, solver=solver)
        z.sum().backward()
        assert z.shape == (3, 5) and w.grad.shape == (5, 5) and x.grad.shape == (3, 4)
    for backward in (Anderson(max_iter=3), Broyden(max_iter=3)):
        with FakeTensorMode():
            w, u, x = (torch.zeros(s, requires_grad=True) for s in ((5, 5), (5, 4), (3, 4)))
            attached(Implicit(solver=backward), w, u, x, solver=Picard(max_iter=2)).sum().backward()
            assert u.grad.shape == (5, 4)


@EVERY
def test_gradients_repeat_bit_for_bit(name):
    w, u, x = problem()
    first, second = (grads_of(RULES[name](), w, u, x) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@EVERY
def test_a_map_that_ignores_its_state(name):
    w, u, x = problem()
    z = attached(RULES[name](), w, u, x, fn=lambda z, x, w, u: (x @ u.T).tanh() + 0 * w.sum())
    got = torch.autograd.grad(z.sum(), (u, x))
    scale = {"unrolled": 1 - 0.4**3, "unrolled_recompute": 1 - 0.4**3, "neumann": 1 - 0.4**3, "backprop": 1 - 0.2**4}
    expected = torch.autograd.grad((x @ u.T).tanh().sum(), (u, x))
    close(got, [scale.get(name, 1.0) * g for g in expected], rtol=1e-6)


@pytest.mark.parametrize(
    "make, message",
    [
        (
            lambda: Unrolled(steps=0),
            "grad.steps must be >= 1, got 0. Without a step no gradient reaches the parameters",
        ),
        (lambda: Neumann(steps=0), "grad.steps must be >= 1"),
        (lambda: Backprop(steps=0), "grad.steps must be >= 1"),
        (lambda: Unrolled(tau=0), r"grad.tau must lie in \(0, 1\], got 0"),
        (lambda: Neumann(tau=1.1), r"grad.tau must lie in \(0, 1\], got 1.1"),
        (lambda: Unrolled(steps=3, gap=4), r"grad.gap must lie in 1 .. steps=3 or be null, got 4"),
        (lambda: Unrolled(steps=3, at=(0,)), r"grad.at must list steps in 1 .. 3, got \[0\]"),
        (lambda: Unrolled(steps=3, at=(1,), gap=1), "grad.gap and grad.at exclude each other"),
        (lambda: Shine(refine=-1), "grad.refine must be >= 0, got -1"),
    ],
)
def test_bad_settings(make, message):
    with pytest.raises(UserError, match=message) as raised:
        make()
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize("memory", [None, 3])
def test_the_gradient_of_a_sample_that_ends_first_is_that_of_the_sample_alone(memory):
    """Shine reads Broyden's history: what a sample that has ended would learn while it waits is not in it."""
    generator = torch.Generator().manual_seed(3)
    a = torch.randn(6, 6, generator=generator, dtype=torch.float64)
    a = a / torch.linalg.matrix_norm(a, 2)
    x = torch.randn(2, 6, generator=generator, dtype=torch.float64)
    weight = torch.tensor([[0.4], [1.6]], dtype=torch.float64)
    c = torch.randn(2, 6, generator=generator, dtype=torch.float64)

    def gradient(rows):
        theta = x[rows].clone().requires_grad_()
        solver = Broyden(max_iter=80, tol=1e-4, memory=memory)
        found = solve(lambda z: weight[rows] * torch.tanh(z @ a.T) + theta, torch.zeros_like(theta), solver=solver,
                      grad=Shine())  # fmt: skip
        assert found.converged.all()
        return torch.autograd.grad((found.z * c[rows]).sum(), theta)[0], found.steps

    (both, steps), (alone, _) = gradient(slice(0, 2)), gradient(slice(0, 1))
    assert steps[0] + 3 < steps[1]
    torch.testing.assert_close(both[:1], alone, rtol=1e-10, atol=1e-12)


def test_a_backward_solve_that_diverges_warns():
    x = torch.ones(2, 3)
    theta = torch.ones(3, requires_grad=True)
    fn = lambda z: x - 3 * theta * z
    for solver, warned in (
        (Picard(max_iter=30), True),
        (Picard(max_iter=30, stop="never"), False),
        (Anderson(), False),
    ):
        z = solve(fn, torch.zeros_like(x), solver=Anderson(tol=1e-5), grad=Implicit(solver=solver)).z
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            z.sum().backward()
        assert any("The backward solve failed: 2 of 2 samples diverged" in str(w.message) for w in caught) == warned


def test_a_tiny_gradient_is_as_exact_as_a_large_one():
    """The backward solve is scale-free: a loss of 1e-15 has the same relative error."""
    a = torch.diag(torch.linspace(-0.9, 0.9, 5))
    x = torch.ones(2, 5, requires_grad=True)
    exact = 1 / (1 - torch.diagonal(a))
    for scale in (1.0, 1e-15, 1e-30):
        z = solve(lambda z: z @ a.T + x, torch.zeros(2, 5), solver=Anderson(tol=1e-6), grad=Implicit()).z
        (grad,) = torch.autograd.grad((z * scale).sum(), x)
        torch.testing.assert_close(grad / scale, exact.expand(2, 5), rtol=0.2, atol=0)
