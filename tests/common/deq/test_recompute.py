import pytest
import torch
from torch import nn

from common.deq.dropout import VariationalDropout
from common.deq.layers import apply_norm, reset
from common.deq.recompute import mem_gc


class Cell(nn.Module):
    def __init__(self, p=0.5, plain=0.5):
        super().__init__()
        self.a, self.b = nn.Linear(6, 24), nn.Linear(24, 6)
        self.drop, self.plain = VariationalDropout(p), nn.Dropout(plain)
        self.calls = 0

    def forward(self, z, x):
        self.calls += 1
        return torch.tanh(self.b(self.plain(self.drop(torch.relu(self.a(z))))) + x)


def gradients(cell, run, x, between=None):
    torch.manual_seed(3)
    reset(cell)
    z = torch.zeros(4, 6)
    for _ in range(4):
        z = run(z, x)
    if between:
        between()
    cell.zero_grad()
    x.grad = None
    z.square().sum().backward()
    return [p.grad.clone() for p in cell.parameters()] + [x.grad.clone()], z.detach()


def cell_and_input(kind="weight", **options):
    torch.manual_seed(0)
    cell = Cell(**options).double()
    apply_norm(cell, kind)
    return cell, torch.randn(4, 6, dtype=torch.float64).requires_grad_()


@pytest.fixture(autouse=True)
def _double():
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(before)


@pytest.mark.parametrize("kind", ["weight", "spectral", "none"])
@pytest.mark.parametrize("between", [False, True])
def test_gradients_equal_those_of_stored_activations(kind, between):
    """With dropout of both kinds, and a reset between forward and backward pass."""
    cell, x = cell_and_input(kind)
    again = (lambda: (reset(cell), cell(torch.zeros(4, 6), x))) if between and kind != "spectral" else None
    if kind == "spectral":
        cell.eval().requires_grad_()  # a reset in training moves the singular vectors, also of the second run here
    stored, out = gradients(cell, cell, x, again)
    cell.calls = 0
    recomputed, same = gradients(cell, lambda z, x: mem_gc(cell, (z, x)), x, again)
    assert cell.calls == 8 + bool(again)  # four steps, each twice
    assert torch.equal(out, same)
    for a, b in zip(stored, recomputed, strict=True):
        assert torch.equal(a, b) or torch.allclose(a, b, rtol=1e-12, atol=0)
        assert a.abs().sum() > 0


def test_the_masks_after_the_backward_pass_are_those_before():
    cell, x = cell_and_input()
    gradients(cell, lambda z, x: mem_gc(cell, (z, x)), x)
    mask = cell.drop.mask
    assert mask is not None
    out = mem_gc(cell, (torch.zeros(4, 6), x))
    reset(cell)
    cell.drop(torch.zeros(4, 24))
    new = cell.drop.mask
    out.sum().backward()
    assert cell.drop.mask is new and new is not mask


def test_closures_name_their_module():
    cell, x = cell_and_input(plain=0.0)

    def again():
        reset(cell)
        cell(torch.zeros(4, 6), x)

    stored, _ = gradients(cell, cell, x, again)
    named, _ = gradients(cell, lambda z, x: mem_gc(lambda z, x: cell(z, x), (z, x), module=cell), x, again)
    for a, b in zip(stored, named, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=0)


def test_two_losses_one_graph():
    cell, x = cell_and_input(plain=0.0)

    def both(run):
        torch.manual_seed(3)
        reset(cell)
        first = run(torch.zeros(4, 6), x)
        second = run(first, x)
        params = list(cell.parameters())
        return torch.autograd.grad(first.sum(), params, retain_graph=True) + torch.autograd.grad(second.sum(), params)

    for a, b in zip(both(cell), both(lambda z, x: mem_gc(cell, (z, x))), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=0)


def test_activations_are_not_kept():
    cell, x = cell_and_input(p=0.0, plain=0.0)
    reset(cell)

    def kept(run):
        sizes = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t: sizes.append(t.numel()) or t, lambda t: t):
            run(torch.zeros(4, 6).requires_grad_(), x)
        return sum(sizes)

    assert kept(lambda z, x: mem_gc(cell, (z, x))) <= 2 * 4 * 6 < 200 < kept(cell)  # the two arguments


def test_tuples_no_arguments_and_no_gradients():
    w = torch.ones(3, requires_grad=True)
    a, b = mem_gc(lambda: (w * 2, w.square()))
    (a + b).sum().backward()
    assert torch.equal(w.grad, torch.full((3,), 4.0))
    with torch.no_grad():
        assert not mem_gc(nn.Linear(2, 2), (torch.ones(1, 2),)).requires_grad
