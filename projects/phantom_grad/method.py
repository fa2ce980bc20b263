"""The phantom gradient as matrices: what the rules of `common.deq.grads` compute, written out for small dense problems.

    forward:   z* = solve z = F(z, u), without autograd
    exact:     dL/dtheta = g (I - J)^-1 P              # a second solve
    unrolled:  z_0 = stop(z*);  z_{t+1} = tau F(z_t, u) + (1 - tau) z_t for k steps;  L(z_k).backward()
    Neumann:   v_0 = g;  v_{t+1} = tau v_t J + (1 - tau) v_t
               dL/dtheta = tau (v_0 + ... + v_{k-1}) P
    k = 1, tau = 1: dL/dtheta = g P                    # one step

Symbols as in the paper: J = dF/dz (d, d) and P = dF/dtheta (d, p) at the equilibrium, g = dL/dz a row (d,).
"""

import torch
from torch import Tensor


def exact_direction(jacobian: Tensor, grad: Tensor) -> Tensor:
    """Rows y = g (I - J)^-1, the exact gradient up to the product with P.

    jacobian (B, d, d), grad (B, d) -> (B, d). Raises torch's LinAlgError where I - J is singular.
    On Training Implicit Models (arXiv 2111.05177), section 2.
    """
    eye = torch.eye(jacobian.shape[-1], dtype=jacobian.dtype, device=jacobian.device)
    return torch.linalg.solve((eye - jacobian).transpose(1, 2), grad.unsqueeze(2)).squeeze(2)


def phantom_matrix(jacobian: Tensor, steps: int, tau: float) -> Tensor:
    """tau sum_{t < k} (tau J + (1 - tau) I)^t, what (I - J)^-1 is replaced by; (..., d, d) -> (..., d, d).

    steps  k >= 1;  tau  damping in (0, 1] (the paper's lambda)
    The unrolled rule (UPG) and the Neumann rule (NPG) agree on it at an exact equilibrium (2111.05177, section 4).
    """
    eye = torch.eye(jacobian.shape[-1], dtype=jacobian.dtype, device=jacobian.device).expand_as(jacobian)
    damped = torch.lerp(eye, jacobian, tau)
    total, power = eye.clone(), eye
    for _ in range(steps - 1):
        power = power @ damped
        total = total + power
    return tau * total


def ascent_condition(jacobian: Tensor, parameters: Tensor, stand_in: Tensor) -> tuple[Tensor, Tensor]:
    """(left, right): left <= right makes the phantom gradient an ascent direction of the loss for every g.

        ||(I - J) A - P||_2  <=  sigma_min(P)^2 / sigma_max(P)

    jacobian (d, d), parameters P (d, p) with p >= d, stand_in A (d, p) for (I - J)^-1 P; scalars returned.

    Why: with h = g (I - J)^-1 and E = (I - J) A - P the inner product of g A with the exact gradient is
    h P P^T h^T + h E P^T h^T >= |h|^2 (sigma_min^2 - ||E|| sigma_max). arXiv 2111.05177, Theorem 1; the
    constants are those of this derivation.
    """
    eye = torch.eye(len(jacobian), dtype=jacobian.dtype, device=jacobian.device)
    left = torch.linalg.matrix_norm((eye - jacobian) @ stand_in - parameters, 2)
    values = torch.linalg.svdvals(parameters)
    return left, values[-1] ** 2 / values[0]
