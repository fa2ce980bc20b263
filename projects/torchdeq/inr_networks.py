"""Networks that are a signal: coordinates in, values out; as an equilibrium, as one pass, or as a plain deep network.

Shapes: B points, d coordinates in [-1, 1] (`projects.torchdeq.signal_data`), w channels of width, c values.
"""

import math
from collections.abc import Callable
from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from common import limits
from common.deq.layers import apply_norm, reset


class FourierFilter(nn.Module):
    """u_k = sin(A_k x + b_k), entering by product: h -> u_k h (Multiplicative Filter Networks, ICLR 2021, FourierNet).

    in_features   d;  width  w
    count         filters made at once: one for the state and one per layer
    scale         frequency: A = scale / sqrt(count) times torch's default initialisation, b ~ U(-pi, pi)
    """

    neutral = 1.0  # what `combine` turns into the filter itself

    def __init__(self, in_features: int, width: int, count: int, scale: float):
        super().__init__()
        self.count = count
        self.map = scaled_map(in_features, width * count, scale / math.sqrt(count))

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        """x (B, d) -> `count` tensors (B, w)."""
        return torch.sin(self.map(x)).chunk(self.count, dim=-1)

    @staticmethod
    def combine(h: Tensor, u: Tensor) -> Tensor:
        return u * h


class GaborFilter(nn.Module):
    """u_k = sin(A_k x + b_k) exp(-gamma_k ||x - mu_k||^2 / 2), entering by product (the same paper, GaborNet).

    alpha         gamma ~ Gamma(alpha, 1), A additionally times sqrt(gamma), mu ~ U(-1, 1); the rest as `FourierFilter`
    """

    neutral = 1.0

    def __init__(self, in_features: int, width: int, count: int, scale: float, alpha: float = 3.0):
        super().__init__()
        self.count = count
        self.map = scaled_map(in_features, width * count, scale / math.sqrt(count))
        self.mu = nn.Parameter(2 * torch.rand(width * count, in_features) - 1)
        self.gamma = nn.Parameter(torch.distributions.Gamma(alpha, 1.0).sample((width * count,)))
        with torch.no_grad():
            self.map.weight.mul_(self.gamma.sqrt()[:, None])

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        """x (B, d) -> `count` tensors (B, w)."""
        # |x|^2 + |mu|^2 - 2 x mu rather than differences: no (B, w, d) tensor
        distance = x.square().sum(1, keepdim=True) + self.mu.square().sum(1) - 2 * (x @ self.mu.T)
        return (torch.sin(self.map(x)) * torch.exp(-0.5 * self.gamma * distance)).chunk(self.count, dim=-1)

    @staticmethod
    def combine(h: Tensor, u: Tensor) -> Tensor:
        return u * h


class SirenFilter(nn.Module):
    """u_k = A_k x + b_k, entering inside the sine: h -> sin(h + u_k), a SIREN layer with the coordinates as input.

    Arguments as `FourierFilter`.
    """

    neutral = 0.0

    def __init__(self, in_features: int, width: int, count: int, scale: float):
        super().__init__()
        self.count = count
        self.map = scaled_map(in_features, width * count, scale / math.sqrt(count))

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        """x (B, d) -> `count` tensors (B, w)."""
        return self.map(x).chunk(self.count, dim=-1)

    @staticmethod
    def combine(h: Tensor, u: Tensor) -> Tensor:
        return torch.sin(h + u)


class ReluFilter(nn.Module):
    """u_k = A_k phi(x) + b_k with random Fourier features phi, entering by relu(h + u_k) (arXiv 2006.10739).

    scale         spread of the frequencies of `FourierFeatures`; the rest as `FourierFilter`
    """

    neutral = 0.0

    def __init__(self, in_features: int, width: int, count: int, scale: float):
        super().__init__()
        self.count = count
        self.features = FourierFeatures(in_features, width, scale)
        self.map = nn.Linear(2 * width, width * count)

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        """x (B, d) -> `count` tensors (B, w)."""
        return self.map(self.features(x)).chunk(self.count, dim=-1)

    @staticmethod
    def combine(h: Tensor, u: Tensor) -> Tensor:
        return torch.relu(h + u)


FILTERS: dict[str, type[nn.Module]] = {
    "fourier": FourierFilter, "gabor": GaborFilter, "siren": SirenFilter, "relu": ReluFilter
}  # fmt: skip


class FilterCell(nn.Module):
    """The map of the equilibrium: z -> f(z; u), (B, w) -> (B, w), for filter outputs u = (u_0, ..., u_n), each (B, w).

    h_0 = z + q(e, u_0);  h_k = q(W_k h_{k-1} + b_k, u_k), k = 1..n;  f = h_n, where q is the filter's `combine` and e
    its neutral element. W ~ U(-1/sqrt(w), 1/sqrt(w)). ((Implicit)^2, NeurIPS 2021; DEQ-INR of TorchDEQ's zoo.)
    """

    def __init__(self, width: int, layers: int, combine: Callable[[Tensor, Tensor], Tensor], neutral: float):
        super().__init__()
        self.combine = combine
        self.neutral = neutral
        self.maps = nn.ModuleList(nn.Linear(width, width) for _ in range(layers))
        for linear in self.maps:
            nn.init.uniform_(linear.weight, -1 / math.sqrt(width), 1 / math.sqrt(width))

    def forward(self, z: Tensor, *u: Tensor) -> Tensor:
        h = z + self.combine(torch.full_like(u[0], self.neutral), u[0])
        for linear, filtered in zip(self.maps, u[1:], strict=True):
            h = self.combine(linear(h), filtered)
        return h


class EquilibriumInr(nn.Module):
    """DEQ-INR: value(x) = H z*, z* = f(z*; u(x)) for every coordinate on its own ((Implicit)^2, NeurIPS 2021).

    in_features   d: 1 audio, 2 images, 3 video;  out_features  c
    width         w, channels of the state;  layers  linear maps inside one application of f
    filter        fourier | gabor | siren | relu: how the coordinates enter
    scale         frequency of the filters ("input_scale" of the zoo: 256, 128, 64, 25000)
    alpha         shape of gabor's gamma; other filters ignore it
    norm          weight | spectral | none: normalisation of the cell's linear maps
    deq           equilibrium layer (`common.deq.layer.DEQ`); None: a single application of f to z = 0, the explicit
                  multiplicative filter network of the same size (as does a layer of one step differentiated through)
    Points are the rows of the state: a point that has converged stops costing. Raises UserError for an unknown filter
    or a size below 1.
    """

    def __init__(
        self,
        *,
        in_features: int,
        out_features: int,
        width: int = 512,
        layers: int = 1,
        filter: str = "siren",
        scale: float = 256.0,
        alpha: float = 3.0,
        norm: str = "weight",
        deq: nn.Module | None = None,
    ):
        super().__init__()
        check_sizes(in_features=in_features, out_features=out_features, width=width, layers=layers)
        limits.choice("project.net.filter", filter, tuple(FILTERS))
        self.in_features = in_features
        self.out_features = out_features
        self.width = width
        kind = FILTERS[filter]
        extra = {"alpha": alpha} if filter == "gabor" else {}
        self.filter = kind(in_features, width, layers + 1, scale, **extra)
        self.cell = FilterCell(width, layers, kind.combine, kind.neutral)
        self.head = nn.Linear(width, out_features)
        apply_norm(self.cell, kind=norm)
        self.deq = deq

    def states(self, x: Tensor, z0: Tensor | None = None) -> list[Tensor]:
        """Equilibrium states (B, w) of coordinates x (B, d) from z0 (B, w), zero when None; a list as `DEQ` returns."""
        if z0 is None:
            z0 = x.new_zeros(len(x), self.width)
        u = self.filter(x)
        reset(self.cell)
        return [self.cell(z0, *u)] if self.deq is None else self.deq(self.cell, z0, u)

    def outputs(self, x: Tensor, z0: Tensor | None = None) -> list[Tensor]:
        """Values (B, c), one tensor per state of the equilibrium layer; the last is the solution's."""
        return [self.head(z) for z in self.states(x, z0)]

    def forward(self, x: Tensor) -> Tensor:
        """Values (B, c) at coordinates x (B, d)."""
        return self.outputs(x)[-1]


class Siren(nn.Module):
    """Explicit baseline: a plain sine network (SIREN, NeurIPS 2020, arXiv 2006.09661).

    h_1 = sin(first (W_1 x + b_1)), h_k = sin(omega (W_k h + b_k)), value = W h + b, with the paper's initialisation:
    W_1 ~ U(-1/d, 1/d), the others ~ U(-sqrt(6/w)/omega, sqrt(6/w)/omega).

    layers        hidden layers, >= 1
    first         frequency of the first layer;  omega  of the others
    """

    def __init__(
        self,
        *,
        in_features: int,
        out_features: int,
        width: int = 256,
        layers: int = 4,
        first: float = 100.0,
        omega: float = 30.0,
    ):
        super().__init__()
        check_sizes(in_features=in_features, out_features=out_features, width=width, layers=layers)
        self.in_features = in_features
        self.out_features = out_features
        self.first = first
        self.omega = omega
        sizes = [in_features, *[width] * layers, out_features]
        self.maps = nn.ModuleList(nn.Linear(a, b) for a, b in pairwise(sizes))
        bound = math.sqrt(6 / width) / omega
        nn.init.uniform_(self.maps[0].weight, -1 / in_features, 1 / in_features)
        for linear in self.maps[1:]:
            nn.init.uniform_(linear.weight, -bound, bound)

    def forward(self, x: Tensor) -> Tensor:
        """Values (B, c) at coordinates x (B, d)."""
        h = torch.sin(self.first * self.maps[0](x))
        for linear in self.maps[1:-1]:
            h = torch.sin(self.omega * linear(h))
        return self.maps[-1](h)


class FourierFeatures(nn.Module):
    """phi(x) = [sin(2 pi x F), cos(2 pi x F)] with fixed F ~ N(0, scale^2), (B, d) -> (B, 2 size); arXiv 2006.10739."""

    def __init__(self, in_features: int, size: int, scale: float = 10.0):
        super().__init__()
        self.register_buffer("frequencies", scale * torch.randn(in_features, size))

    def forward(self, x: Tensor) -> Tensor:
        phase = 2 * math.pi * (x @ self.frequencies)
        return torch.cat([torch.sin(phase), torch.cos(phase)], dim=1)


class FourierFeatureMLP(nn.Module):
    """Explicit baseline: random Fourier features and a relu network (arXiv 2006.10739), linear output.

    features      number of frequencies, half the width of phi;  scale  their spread
    """

    def __init__(
        self,
        *,
        in_features: int,
        out_features: int,
        width: int = 256,
        layers: int = 4,
        features: int = 256,
        scale: float = 10.0,
    ):
        super().__init__()
        check_sizes(in_features=in_features, out_features=out_features, width=width, layers=layers, features=features)
        self.in_features = in_features
        self.out_features = out_features
        self.features = FourierFeatures(in_features, features, scale)
        sizes = [2 * features, *[width] * layers, out_features]
        self.maps = nn.ModuleList(nn.Linear(a, b) for a, b in pairwise(sizes))

    def forward(self, x: Tensor) -> Tensor:
        """Values (B, c) at coordinates x (B, d)."""
        h = self.features(x)
        for linear in self.maps[:-1]:
            h = F.relu(linear(h))
        return self.maps[-1](h)


def scaled_map(in_features: int, out_features: int, scale: float) -> nn.Linear:
    """Linear map with torch's default weight times `scale` and phases b ~ U(-pi, pi)."""
    linear = nn.Linear(in_features, out_features)
    with torch.no_grad():
        linear.weight.mul_(scale)
        linear.bias.uniform_(-math.pi, math.pi)
    return linear


def check_sizes(**sizes: int) -> None:
    """Raises UserError naming the first size below 1."""
    limits.positive(**{f"project.net.{name}": value for name, value in sizes.items()})
