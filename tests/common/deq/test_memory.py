"""What each gradient rule keeps for the backward pass, counted in saved tensors: exact and repeatable."""

import pytest
import torch
from torch.autograd.graph import saved_tensors_hooks

from common.deq.grads import Backprop, Implicit, Neumann, OneStep, Shine, Unrolled
from common.deq.solve import solve
from common.deq.solvers import Anderson, Broyden, Picard

WIDTH = 32


class Counted:
    """Bytes of distinct storage that autograd keeps from the forward pass on; weights do not count."""

    def __init__(self, *weights):
        self.known = {w.untyped_storage().data_ptr() for w in weights}
        self.bytes, self.peak, self.live = 0, 0, {}

    def pack(self, tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() in self.known:
            return tensor
        held = _Held(self, tensor, storage.data_ptr(), storage.nbytes())
        return held

    def unpack(self, held):
        return held if isinstance(held, torch.Tensor) else held.tensor

    def add(self, key, size, by):
        count = self.live.get(key, 0) + by
        if count == 1 and by == 1:
            self.bytes += size
            self.peak = max(self.peak, self.bytes)
        elif count == 0:
            self.bytes -= size
        self.live[key] = count


class _Held:
    def __init__(self, counter, tensor, key, size):
        self.counter, self.tensor, self.key, self.size = counter, tensor, key, size
        counter.add(key, size, 1)

    def __del__(self):
        self.counter.add(self.key, self.size, -1)


def run(rule, solver=None, batch=8):
    """(bytes kept after the forward pass, peak of forward and backward) of a cell that saves four activations."""
    generator = torch.Generator().manual_seed(0)
    w = (torch.randn(WIDTH, WIDTH, generator=generator) * 0.5 / WIDTH**0.5).requires_grad_()
    x = torch.randn(batch, WIDTH, generator=generator)

    def cell(z, x):
        return 0.5 * torch.tanh(torch.sigmoid(z @ w.T + x) * torch.cos(z))

    counter = Counted(w, x)
    with saved_tensors_hooks(counter.pack, counter.unpack):
        z = solve(
            cell, torch.zeros(batch, WIDTH), (x,), solver=solver or Picard(max_iter=20, stop="never"), grad=rule
        ).z
        loss = z.square().sum()
        kept = counter.bytes
        loss.backward()
    assert w.grad is not None and w.grad.abs().sum() > 0
    return kept, counter.peak


ONE = run(OneStep())


def test_the_counter_counts():
    assert ONE[0] >= 4 * 8 * WIDTH * 4, "four activations of B x D floats"
    double = run(OneStep(), batch=16)
    assert double[0] == 2 * ONE[0]
    assert run(OneStep()) == ONE


@pytest.mark.parametrize("solver", [Picard, Anderson, Broyden])
def test_the_forward_solve_keeps_nothing(solver):
    for steps in (2, 60):
        for rule in (OneStep(), Neumann(), Implicit()):
            kept, _ = run(rule, solver(max_iter=steps, stop="never"))
            assert kept <= ONE[0] + 8 * WIDTH * 4


@pytest.mark.parametrize(
    "make",
    [
        lambda k: Neumann(steps=k),
        lambda k: Implicit(solver=Picard(max_iter=k, stop="never")),
        lambda k: Implicit(solver=Anderson(max_iter=k, stop="never")),
        lambda k: Implicit(solver=Picard(max_iter=k, stop="never"), recompute=True),
    ],
    ids=["neumann", "implicit", "implicit_anderson", "implicit_function"],
)
def test_implicit_and_neumann_do_not_depend_on_the_steps(make):
    few, many = run(make(2)), run(make(100))
    assert few == many
    assert few[0] <= ONE[0] + 2 * 8 * WIDTH * 4, "the graph of one evaluation"
    assert few[1] <= 2 * ONE[1] + 2 * 8 * WIDTH * 4


def test_shine_keeps_no_more():
    solver = Broyden(max_iter=20, stop="never")
    assert run(Shine(), solver)[0] <= ONE[0] + 8 * WIDTH * 4


@pytest.mark.parametrize(
    "make", [lambda k: Unrolled(steps=k), lambda k: Backprop(steps=k)], ids=["unrolled", "backprop"]
)
def test_unrolling_is_linear_in_the_steps(make):
    kept = [run(make(k))[0] for k in (4, 8, 16)]
    assert kept[2] - kept[1] == 2 * (kept[1] - kept[0]) and kept[1] - kept[0] >= 4 * (ONE[0] - 2 * 8 * WIDTH * 4)
    assert kept[2] > 3 * kept[0]


@pytest.mark.parametrize(
    "make",
    [lambda k: Unrolled(steps=k, recompute=True), lambda k: Backprop(steps=k, recompute=True)],
    ids=["unrolled", "backprop"],
)
def test_recomputation_keeps_the_states_alone(make):
    state = 8 * WIDTH * 4
    (few, few_peak), (many, many_peak) = run(make(4)), run(make(24))
    assert many - few <= 20 * state, "one state per step"
    assert many <= 26 * state
    plain = run(Unrolled(steps=24))[0]
    assert many < plain / 2.5
    # the activations of one evaluation at a time come back
    assert (many_peak - many) <= ONE[1] + 2 * state and abs((many_peak - many) - (few_peak - few)) <= 2 * state
