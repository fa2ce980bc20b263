"""The hinge losses against their definition and their derivatives."""

import torch

from common.losses.adversarial import hinge_discriminator_loss, hinge_generator_loss


def test_the_discriminator_pays_what_lies_inside_the_margin():
    real, fake = torch.tensor([2.0, 1.0, 0.25, -3.0]), torch.tensor([-5.0, -1.0, 0.5])
    by_hand = (0 + 0 + 0.75 + 4) / 4 + (0 + 0 + 1.5) / 3
    assert hinge_discriminator_loss(real, fake).item() == by_hand
    assert hinge_discriminator_loss(torch.zeros(7), torch.zeros(3)).item() == 2  # says nothing
    assert hinge_discriminator_loss(torch.full((2,), 1.5), torch.full((2,), -1.5)).item() == 0


def test_the_gradient_ends_at_the_margin():
    real = torch.tensor([2.0, 0.5, -1.0], requires_grad=True)
    fake = torch.tensor([-2.0, -0.5, 1.0], requires_grad=True)
    hinge_discriminator_loss(real, fake).backward()
    torch.testing.assert_close(real.grad, torch.tensor([0.0, -1 / 3, -1 / 3]))
    torch.testing.assert_close(fake.grad, torch.tensor([0.0, 1 / 3, 1 / 3]))


def test_the_generator_has_no_margin():
    fake = torch.tensor([[-2.0], [4.0], [1.0]], requires_grad=True)
    loss = hinge_generator_loss(fake)
    loss.backward()
    assert loss.item() == -1
    torch.testing.assert_close(fake.grad, torch.full((3, 1), -1 / 3))
