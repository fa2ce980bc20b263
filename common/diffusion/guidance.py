"""Denoisers with labels and guidance bound in; each is a `denoiser(x, sigma) -> D` for `common.diffusion.sample`.

A guided denoiser costs two network evaluations wherever guidance acts; a sampler's `nfe` counts it as one. At fixed
(x, sigma) D, eps, v and score are related linearly, so guiding D guides all of them.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Callable

import torch
from torch import Tensor

from common import limits
from common.errors import UserError
from common.tensors import append_dims


class _Wrapped:
    """Forwards what samplers ask a preconditioner for: supported noise levels and rounding."""

    def __init__(self, net: Callable):
        self.net = net
        for name in ("sigma_min", "sigma_max", "round_sigma"):
            if hasattr(net, name):
                setattr(self, name, getattr(net, name))


class Conditional(_Wrapped):
    """net with fixed class labels: D(x, sigma | labels). class_labels (B, label_dim) one-hot or None.

    A generator of one call (`common.diffusion.sample.Direct`) is called without sigma.
    """

    def __init__(self, *, net: Callable, class_labels: Tensor | None = None):
        super().__init__(net)
        self.class_labels = class_labels

    def __call__(self, x: Tensor, *sigma: Tensor) -> Tensor:
        return self.net(x, *sigma, class_labels=self.class_labels)


class _Guided(_Wrapped, ABC):
    """D = weak + scale (strong - weak) where low < sigma <= high; `strong` alone elsewhere and when scale == 1."""

    def __init__(self, net: Callable, scale: float, interval: tuple[float, float], channels: int | None):
        super().__init__(net)
        self.scale = limits.number("scale", scale)
        low, high = interval
        limits.number("interval low", low, least=0)
        limits.number("interval high", high, above=low)
        self.interval = (low, high)
        self.channels = channels if channels is None else limits.whole("channels", channels, least=1)

    @abstractmethod
    def strong(self, x: Tensor, sigma: Tensor) -> Tensor:
        """The denoiser to move towards."""

    @abstractmethod
    def weak(self, x: Tensor, sigma: Tensor) -> Tensor:
        """The denoiser to move away from."""

    def __call__(self, x: Tensor, sigma: Tensor) -> Tensor:
        strong = self.strong(x, sigma)
        if self.scale == 1:
            return strong
        inside = (sigma > self.interval[0]) & (sigma <= self.interval[1])
        limited = self.interval != (0, math.inf)
        # Reading `inside` waits for the device once per step, far cheaper than the network pass it may save.
        if limited and not bool(inside.any()):
            return strong
        guided = torch.lerp(self.weak(x, sigma).to(strong.dtype), strong, self.scale)
        if self.channels is not None:
            guided = torch.cat([guided[:, : self.channels], strong[:, self.channels :]], dim=1)
        if not limited:
            return guided
        return torch.where(append_dims(inside, x), guided, strong)


class CFG(_Guided):
    """Classifier-free guidance (arXiv 2207.12598): D = D_u + scale (D_c - D_u).

    net           `net(x, sigma, class_labels=...)`; unconditional = class_labels None
    class_labels  (B, label_dim) one-hot
    scale         w; 1 is a no-op (and costs one evaluation)
    interval      (low, high]: guidance only at these noise levels (arXiv 2404.07724)
    channels      act on the first k channels only, the others stay conditional (DiT code and LightningDiT: 3 of 4/32)
    """

    def __init__(
        self,
        *,
        net: Callable,
        class_labels: Tensor,
        scale: float = 1.0,
        interval: tuple[float, float] = (0.0, math.inf),
        channels: int | None = None,
    ):
        super().__init__(net, scale, interval, channels)
        if class_labels is None:
            raise UserError(
                "class_labels must be given for classifier-free guidance, got None. "
                "Pass one-hot labels of shape (B, label_dim)."
            )
        self.class_labels = class_labels

    def strong(self, x, sigma):
        return self.net(x, sigma, class_labels=self.class_labels)

    def weak(self, x, sigma):
        return self.net(x, sigma, class_labels=None)


class Autoguidance(_Guided):
    """Autoguidance (arXiv 2406.02507): D = D_bad + scale (D - D_bad), both with the same labels.

    guide   a worse version of net (smaller or less trained), same signature
    """

    def __init__(
        self,
        *,
        net: Callable,
        guide: Callable,
        class_labels: Tensor | None = None,
        scale: float = 1.0,
        interval: tuple[float, float] = (0.0, math.inf),
    ):
        super().__init__(net, scale, interval, None)
        self.guide = guide
        self.class_labels = class_labels

    def strong(self, x, sigma):
        return self.net(x, sigma, class_labels=self.class_labels)

    def weak(self, x, sigma):
        return self.guide(x, sigma, class_labels=self.class_labels)


class BoundVelocity:
    """u(z, t, r) of `common.diffusion.sample.AverageVelocitySteps`, class labels bound in. Without r: the velocity.

    net           (z, t, r, class_labels=..., omega=..., t_min=..., t_max=...) -> (B, ...), in the type of its weights
    class_labels  (B, label_dim) one-hot, or None
    noise_scale   standard deviation of the noise at t = 1
    guidance      the guidance scales the network was trained on, (low, high); None: it takes none
    A call with omega outside them raises UserError, unless `beyond` is set: the authors' best scales of iMF-M, iMF-L
    and pMF-B/16 lie above the range of their training code.
    """

    def __init__(
        self,
        *,
        net: Callable,
        class_labels: Tensor | None = None,
        noise_scale: float = 1.0,
        guidance: tuple[float, float] | None = None,
    ):
        self.net, self.class_labels, self.noise_scale, self.guidance = net, class_labels, noise_scale, guidance

    def __call__(
        self,
        z: Tensor,
        t: Tensor,
        r: Tensor | None = None,
        omega: float | None = None,
        t_min: float = 0.0,
        t_max: float = 1.0,
        beyond: bool = False,
    ) -> Tensor:
        parameters = getattr(self.net, "parameters", lambda: iter(()))
        weight = next(parameters(), z)
        z, t, r = (k.to(weight.dtype) for k in (z, t, t if r is None else r))
        given = {} if self.class_labels is None else {"class_labels": self.class_labels}
        if omega is not None:
            if self.guidance is None:
                raise UserError(f"omega={omega:g} is given, but this network was trained without it. Set omega=null.")
            low, high = self.guidance
            if not low <= omega <= high and not beyond:
                raise UserError(
                    f"omega must lie in the trained range {low:g} to {high:g}, got {omega:g}. "
                    f"Set omega={min(max(omega, low), high):g}, or beyond=true to extrapolate."
                )
            batch = lambda value: torch.full_like(t, value)
            given |= {"omega": batch(omega), "t_min": batch(t_min), "t_max": batch(t_max)}
        return self.net(z, t, r, **given)
