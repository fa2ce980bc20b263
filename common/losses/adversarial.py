"""Losses of a discriminator and its generator, from the discriminator's logits: larger means more real."""

import torch.nn.functional as F
from torch import Tensor


def hinge_discriminator_loss(real: Tensor, fake: Tensor) -> Tensor:
    """Mean of max(0, 1 - D(x)) over real images plus mean of max(0, 1 + D(G(z))) over generated ones, a scalar.

    real, fake  (B, ...) logits. 2 where all logits are 0, 0 where both kinds are beyond the margin.

    Geometric GAN (arXiv 1705.02894), SAGAN (arXiv 1805.08318) equation 4.
    """
    return F.relu(1 - real).mean() + F.relu(1 + fake).mean()


def hinge_generator_loss(fake: Tensor) -> Tensor:
    """-mean D(G(z)), a scalar without a lower bound: its margin is the discriminator's. SAGAN equation 4."""
    return -fake.mean()
