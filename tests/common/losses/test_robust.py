import torch

from common.losses.robust import adaptive_weight, pseudo_huber, squared_distance


def test_squared_distance_is_a_sum():
    delta = torch.randn(3, 2, 4, 4)
    torch.testing.assert_close(squared_distance(delta), (delta**2).sum((1, 2, 3)))


def test_pseudo_huber_limits():
    squared = torch.tensor([0.0, 1e-6, 4.0, 1e6], dtype=torch.float64)
    torch.testing.assert_close(pseudo_huber(squared, official=True), squared.sqrt())
    torch.testing.assert_close(pseudo_huber(squared)[1:], squared[1:].sqrt(), rtol=1e-5, atol=0)
    huber = pseudo_huber(squared, 10.0)
    assert huber[0] == 0
    torch.testing.assert_close(huber[2], torch.tensor(4 / 20, dtype=torch.float64), rtol=0.02, atol=0)  # L2/(2c)
    torch.testing.assert_close(huber[3], torch.tensor(990.0, dtype=torch.float64), rtol=1e-3, atol=0)  # distance - c


def test_gradient_at_zero():
    for c, official, finite in ((0.0, False, True), (0.06, False, True), (0.0, True, False)):
        delta = torch.zeros(1, 2, requires_grad=True)
        pseudo_huber(squared_distance(delta), c, official=official).sum().backward()
        assert bool(torch.isfinite(delta.grad).all()) == finite


def test_adaptive_weight_with_power_half_has_the_gradient_of_pseudo_huber():
    delta = torch.randn(4, 5, dtype=torch.float64, requires_grad=True)
    squared = squared_distance(delta)
    (one,) = torch.autograd.grad((adaptive_weight(squared, power=0.5, eps=0.06**2) * squared).sum() / 2, delta)
    (two,) = torch.autograd.grad(pseudo_huber(squared_distance(delta), 0.06).sum(), delta)
    torch.testing.assert_close(one, two)
