"""Matrix decompositions as layers: non-negative (NMF), vector quantisation (VQ) and concept decomposition (CD).

X (G, d, n) is close to D C with a dictionary D (G, d, r) of r atoms and codes C (G, r, n), one column per pixel; G
counts independent matrices. A few steps of an iterative algorithm find them, and the gradient takes a short cut through
those steps: Is Attention Better Than Matrix Decomposition? (arXiv 2109.04553). The paper's C is our C^T, (n, r).

    D, C = NMF(rank=64).solve(x)        # codes with gradient
    y = D @ C
"""

from abc import ABC, abstractmethod
from dataclasses import dataclass
from functools import cache
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from common import limits
from common.deq.grads import Gradient, Implicit, Neumann
from common.errors import UserError, nearest
from common.tensors import only_shapes

GRADIENTS = ("one_step", "bptt", "phantom", "implicit")
NEGATIVE = ("error", "clamp", "trust")


@dataclass(frozen=True, kw_only=True)
class Decomposition(ABC):
    """Abstract: how factors are drawn, started, improved and read out. NMF, VQ and CD below.

    rank           r >= 1, number of atoms; may exceed d and n
    steps          K >= 0, steps in training
    eval_steps     the same in evaluation
    gradient       one_step  the codes of the last read-out alone, from constant D and C: what the paper trains with
                   bptt      all K steps and what they start from
                   phantom   damped Neumann series of `phantom_steps` terms at the last step (common.deq.grads.Neumann)
                   implicit  exact at a fixed point (common.deq.grads.Implicit); K steps rarely reach one
                   or a rule of common.deq.grads, whose output then is the last step. OneStep() of there differentiates
                   the whole last step, that of D too; `one_step` leaves D out, as the released code does.
                   All four words give the same forward pass
    phantom_steps  k >= 1
    phantom_tau    damping in (0, 1]
    inv_t          inverse temperature 1/T > 0 of the softmax over atoms
    unit           random atoms have unit length; False as in HamGAN's NMF
    """

    rank: int = 64
    steps: int = 6
    eval_steps: int = 6
    gradient: str | Gradient = "one_step"
    phantom_steps: int = 5
    phantom_tau: float = 0.5
    inv_t: float = 1.0
    unit: bool = True

    nonnegative: ClassVar[bool] = False  # X, D and C must be >= 0
    keeps_codes: ClassVar[bool] = False  # a step starts from the codes, too, not from the dictionary alone

    def __post_init__(self):
        limits.whole("ham.rank", self.rank, least=1, hint="The paper uses 64.")
        for name in ("steps", "eval_steps"):
            limits.whole(f"ham.{name}", getattr(self, name), hint="The paper uses 6.")
        limits.number("ham.inv_t", self.inv_t, above=0, hint="The paper uses 1 for NMF, 100 for VQ and CD.")
        self._rule()

    def _rule(self) -> Gradient | None:
        """The rule of common.deq behind `gradient`; None for the two that need none."""
        rule = self.gradient
        if isinstance(rule, Gradient):
            if rule.replaces_solver or rule.needs_solver_state:
                raise UserError(
                    f"ham.gradient={type(rule).__name__} needs a solver of common.deq. Use one of "
                    f"{', '.join(GRADIENTS)}, or the rule OneStep, Unrolled, Neumann or Implicit."
                )
            return rule
        if rule not in GRADIENTS:
            raise UserError(
                f"ham.gradient must be one of {', '.join(GRADIENTS)}, or a rule of common.deq.grads, got {rule!r}. "
                f"{nearest(str(rule), GRADIENTS)}"
            )
        if rule == "phantom":
            return Neumann(steps=self.phantom_steps, tau=self.phantom_tau)
        return Implicit() if rule == "implicit" else None

    def draw(
        self,
        matrices: int,
        d: int,
        *,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
        generator: torch.Generator | None = None,
    ) -> Tensor:
        """Random dictionaries (matrices, d, r): uniform for NMF, else normal, from torch's generator of that device."""
        make = torch.rand if self.nonnegative else torch.randn
        bases = make(matrices, d, self.rank, dtype=dtype, device=device, generator=generator)
        return F.normalize(bases, dim=1) if self.unit else bases

    def check_input(self, x: Tensor) -> Tensor:
        """x, checked or clamped to the numbers the decomposition is defined for."""
        return x

    def init(self, x: Tensor, bases: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """(D0, C0): the given or random dictionary, and C0 = softmax over atoms of (1/T) D0^T X."""
        bases = self.draw(len(x), x.shape[1], dtype=x.dtype, device=x.device) if bases is None else bases
        return bases, self._first_codes(torch.bmm(bases.transpose(1, 2), x))

    def _first_codes(self, projection: Tensor) -> Tensor:
        return torch.softmax(projection if self.inv_t == 1 else self.inv_t * projection, dim=1)

    @abstractmethod
    def step(self, x: Tensor, bases: Tensor, codes: Tensor) -> tuple[Tensor, Tensor]:
        """(D, C) after one step. Nothing given is changed."""

    @abstractmethod
    def final(self, x: Tensor, bases: Tensor, codes: Tensor | None) -> Tensor:
        """The codes C that are read out, given the factors after the last step."""

    @abstractmethod
    def _iterate(self, x: Tensor, bases: Tensor, steps: int) -> tuple[Tensor, Tensor | None]:
        """`steps` steps from a dictionary; codes only where `keeps_codes`."""

    def solve(self, x: Tensor, bases: Tensor | None = None, *, steps: int | None = None) -> tuple[Tensor, Tensor]:
        """(D, C) with the gradient of the rule; D C is the output of the layer.

        x      (G, d, n), floating point
        bases  (G, d, r) to start from; None: random
        steps  None: self.steps
        """
        x = self.check_input(x)
        if bases is None:
            bases = self.draw(len(x), x.shape[1], dtype=x.dtype, device=x.device)
        steps = self.steps if steps is None else steps
        tracked = torch.is_grad_enabled() and (x.requires_grad or bases.requires_grad)
        # Without a step there is nothing to unroll: the start is the state, a constant, and every rule is one_step.
        if not tracked or not steps or self.gradient == "one_step":
            with torch.no_grad():
                bases, codes = self._iterate(x, bases, steps)
        elif self.gradient == "bptt":
            bases, codes = self._iterate(x, bases, steps)
        else:
            bases, codes = self._attach(x, bases, steps)
        return bases, self.final(x, bases, codes)

    def _attach(self, x: Tensor, bases: Tensor, steps: int) -> tuple[Tensor, Tensor | None]:
        """The last step is the image under which a rule of common.deq.grads differentiates the state before it."""
        with torch.no_grad():
            bases, codes = self._iterate(x, bases, steps - 1)
        if self.keeps_codes:
            return self._rule().attach(lambda state: self.step(x, *state), (bases, codes), None)[-1]
        return self._rule().attach(lambda state: self._iterate(x, state, 1)[0], bases, None)[-1], None


# ---------------------------------------------------------------------------------------------------------------------
# Non-negative matrix factorisation


@dataclass(frozen=True, kw_only=True)
class NMF(Decomposition):
    """min |X - D C|^2 over D, C >= 0 by multiplicative updates (Lee and Seung 2000), codes first:

        C <- C * (D^T X) / (D^T D C + e),   D <- D * (X C^T) / (D C C^T + e)             (elementwise * and /)

    The last codes: one more update of C. Then y is linear in x for given factors, pixel by pixel:
    dy_n/dx_n = D diag(C_n / (D^T D C_n + e)) D^T.

    eps       e
    negative  what becomes of negative numbers in X: error, clamp (to 0) or trust (X is known to be >= 0 and not
              checked: for a GPU, where the check waits for the device)
    fused     the elementwise update as one kernel by torch.compile
    """

    eps: float = 1e-6
    negative: str = "error"
    fused: bool = False

    nonnegative: ClassVar[bool] = True
    keeps_codes: ClassVar[bool] = True

    def __post_init__(self):
        super().__post_init__()
        limits.choice("ham.negative", self.negative, NEGATIVE)
        limits.number("ham.eps", self.eps, above=0, hint="The paper uses 1e-6.")

    def check_input(self, x: Tensor) -> Tensor:
        if self.negative == "clamp":
            return F.relu(x)
        if self.negative == "error" and x.numel() and _has_values(x) and float(least := x.detach().amin()) < 0:
            raise UserError(
                f"NMF needs an input >= 0, its smallest number is {float(least):.4g}. Put a ReLU before it, set "
                "ham.negative=clamp, or use VQ or CD."
            )
        return x

    def step(self, x, bases, codes):
        return self._step(x, bases, codes, torch.bmm(bases.transpose(1, 2), x))

    def _step(self, x: Tensor, bases: Tensor, codes: Tensor, projection: Tensor) -> tuple[Tensor, Tensor]:
        # C <- C * (D^T X) / ((D^T D) C + e), then D <- D * (X C^T) / (D (C C^T) + e) with the new C. The Gram
        # matrices (r, r) go first: r^2 (d + n) multiplications rather than 2 d r n.
        codes = self._update(codes, projection, torch.bmm(_gram(bases), codes))
        right = codes.transpose(1, 2)
        bases = self._update(bases, torch.bmm(x, right), torch.bmm(bases, torch.bmm(codes, right)))
        return bases, codes

    def _update(self, factor: Tensor, numerator: Tensor, denominator: Tensor) -> Tensor:
        """factor * numerator / (denominator + e); the last two are made for this call and may be overwritten."""
        if self.fused:
            return _compiled()(factor, numerator, denominator, self.eps)
        if numerator.requires_grad or denominator.requires_grad:
            return _multiply(factor, numerator, denominator, self.eps)
        return numerator.div_(denominator.add_(self.eps)).mul_(factor)

    def _iterate(self, x, bases, steps):
        projection = torch.bmm(bases.transpose(1, 2), x)  # serves the first codes and the first step
        codes = self._first_codes(projection)
        for k in range(steps):
            bases, codes = self._step(x, bases, codes, projection) if k == 0 else self.step(x, bases, codes)
        return bases, codes

    def final(self, x, bases, codes):
        # The weights first: with constant factors they are a constant, and all the backward pass keeps besides D.
        # C * (D^T X) / (D^T D C + e)
        weights = codes / torch.bmm(_gram(bases), codes).add_(self.eps)
        return weights * torch.bmm(bases.transpose(1, 2), x)


def _multiply(factor: Tensor, numerator: Tensor, denominator: Tensor, eps: float) -> Tensor:
    return factor * (numerator / (denominator + eps))


@cache
def _compiled():
    return torch.compile(_multiply, dynamic=True)


def _gram(bases: Tensor) -> Tensor:
    return torch.bmm(bases.transpose(1, 2), bases)


def _has_values(x: Tensor) -> bool:
    return not torch.compiler.is_compiling() and not only_shapes(x)


# ---------------------------------------------------------------------------------------------------------------------
# Clustering of pixels by their direction

TINY = 1e-6  # of the released code: added to sums over pixels, least length of an atom
LEAST = 1e-12  # least length of a pixel


def _assign(x: Tensor, atoms: Tensor, scale: Tensor) -> Tensor:
    """Softmax over atoms of atoms^T x * scale, (G, r, n). scale (G, 1, n) holds 1/T over the length of each pixel: no
    normalised copy of x is made.
    """
    return torch.softmax(torch.bmm(atoms.transpose(1, 2), x) * scale, dim=1)


def _lengths(x: Tensor) -> Tensor:
    """Length of each pixel (G, 1, n). Over columns of a matrix the norm is slow on a CPU (4096 pixels: 2.2 ms against
    0.6), but it alone has a derivative at 0.
    """
    if x.requires_grad:
        return torch.linalg.vector_norm(x, dim=1, keepdim=True)
    return x.square().sum(dim=1, keepdim=True).sqrt_()


def _centres(x: Tensor, codes: Tensor) -> Tensor:
    """X s^T with each atom's shares s summing to 1 over the pixels, (G, d, r). Divided behind the product, where the
    matrix is small.
    """
    return torch.bmm(x, codes.transpose(1, 2)) / (codes.sum(dim=2)[:, None] + TINY)


@dataclass(frozen=True, kw_only=True)
class VQ(Decomposition):
    """Soft k-means on cosine similarity:

        s = softmax over atoms of (1/T) cos(d_k, x_n);   d_k <- sum_n s_kn x_n / (sum_n s_kn + 1e-6)

    The last codes: s once more, with the length of x_n as a constant. A low inverse temperature (10) draws all atoms to
    the mean, and the one-step gradient to 0.
    """

    inv_t: float = 100.0

    def step(self, x, bases, codes):
        return self._step(x, bases, self._scale(x))

    def _scale(self, x: Tensor) -> Tensor:
        return self.inv_t / _lengths(x).clamp_min(LEAST)

    def _step(self, x: Tensor, bases: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
        codes = _assign(x, F.normalize(bases, dim=1, eps=TINY), scale)
        return _centres(x, codes), codes

    def _iterate(self, x, bases, steps):
        scale = self._scale(x) if steps else None
        for _ in range(steps):
            bases, _codes = self._step(x, bases, scale)
        return bases, None

    def final(self, x, bases, codes):
        return _assign(x, F.normalize(bases, dim=1, eps=TINY), self.inv_t / (_lengths(x.detach()) + TINY))


@dataclass(frozen=True, kw_only=True)
class CD(Decomposition):
    """Spherical k-means, then codes by ridge regression (concept decomposition, Dhillon and Modha 2001):

        s = softmax over atoms of (1/T) cos(d_k, x_n);   d_k <- normalise(sum_n s_kn x_n / (sum_n s_kn + 1e-6))
        C = (D^T D + beta I)^-1 D^T X

    y is linear in x for given D: the ridge projection D (D^T D + beta I)^-1 D^T.

    beta  > 0; 0.1 in the released PyTorch code, 0.01 in HamGAN
    """

    inv_t: float = 100.0
    beta: float = 0.1

    def __post_init__(self):
        super().__post_init__()
        limits.number("ham.beta", self.beta, above=0, hint="With more atoms than channels D^T D alone is singular.")

    def step(self, x, bases, codes):
        return self._step(x, bases, self._scale(x))

    def _scale(self, x: Tensor) -> Tensor:
        return self.inv_t / _lengths(x).clamp_min(LEAST)

    def _step(self, x: Tensor, bases: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
        codes = _assign(x, bases, scale)
        return F.normalize(_centres(x, codes), dim=1, eps=TINY), codes

    def _iterate(self, x, bases, steps):
        scale = self._scale(x) if steps else None
        for _ in range(steps):
            bases, _codes = self._step(x, bases, scale)
        return bases, None

    def final(self, x, bases, codes):
        gram = _gram(bases)
        gram = gram + self.beta * torch.eye(self.rank, dtype=x.dtype, device=x.device)
        # The small system first: (G, r, d) rather than (G, r, n) numbers go through it.
        return torch.bmm(torch.linalg.solve_ex(gram, bases.transpose(1, 2))[0], x)
