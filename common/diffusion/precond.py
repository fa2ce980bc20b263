"""Input and output scalings around a raw network F: D(x; sigma) = c_skip x + c_out F(c_in x; c_noise).

EDM (arXiv 2206.00364) eq. 7 and table 1. Every class holds the raw network as `model` (`unet` for EDM2), as the
official checkpoints do, so state-dict keys need no translation. sigma is a noise level in data units; tensors are not
checked for sigma > 0 (that would wait for the device): callers must never ask for sigma <= 0.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from numbers import Real
from typing import Any

import numpy as np
import torch
from torch import Generator, Tensor, nn

from common import limits
from common.diffusion.paths import VP
from common.errors import UserError
from common.nets.edm2 import MPConv, MPFourier, normalize, weights_kept
from common.tensors import append_dims

DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


class Preconditioner(nn.Module, ABC):
    """What all preconditioners share; subclasses give `coefficients`.

    model      raw network, `net(x, noise_labels, class_labels, augment_labels, dropout_masks) -> F`
    sigma_min, sigma_max   noise levels the network supports (samplers stay inside)
    dtype      "float32", "float16" or "bfloat16": type of the raw network's input; the raw networks of `common.nets`
               run in the type of their input. float16 only acts on CUDA devices, as in the official code.
               Everything around the network stays float32. Under `torch.autocast` leave it at float32.
    """

    slot = "model"  # attribute the raw network lives under

    def __init__(self, model: nn.Module, sigma_min: float, sigma_max: float, dtype: str):
        super().__init__()
        limits.number("sigma_min", sigma_min, least=0)
        limits.number("sigma_max", sigma_max, above=sigma_min)
        limits.choice("dtype", dtype, tuple(DTYPES))
        self.add_module(self.slot, model)
        self.sigma_min = float(sigma_min)
        self.sigma_max = float(sigma_max)
        self.dtype = dtype

    @property
    def raw(self) -> Any:
        """The raw network, a module with img_resolution, in_channels and label_dim."""
        return getattr(self, self.slot)

    @property
    def img_resolution(self) -> int:
        return self.raw.img_resolution

    @property
    def img_channels(self) -> int:
        return self.raw.in_channels

    @property
    def label_dim(self) -> int:
        return self.raw.label_dim

    @abstractmethod
    def coefficients(self, sigma: Tensor) -> tuple[Tensor | float, Tensor, Tensor | float, Tensor]:
        """c_skip, c_out, c_in, c_noise for sigma (any shape, > 0)."""

    @contextmanager
    def weights_normalized_once(self) -> Iterator[None]:
        """For networks that renormalise their weights in every training forward pass (EDM2): do it once now and keep
        the passes inside from doing it again, so that all of them see bit for bit the same weights. Others: nothing.
        """
        layers = [layer for layer in self.modules() if isinstance(layer, MPConv)] if self.training else []
        if not layers:
            yield
            return
        with torch.no_grad():
            for layer in layers:
                w = layer.weight
                w.copy_(normalize(w.to(torch.promote_types(w.dtype, torch.float32)), tuple(range(1, w.ndim))))
        with weights_kept(self):
            yield

    def draw_dropout(self, x: Tensor, generator: Generator | None = None) -> tuple[Tensor, ...]:
        """One keep mask per active dropout layer for a batch shaped like x (B, C, H, W); () without dropout."""
        return self.raw.draw_dropout(x, generator=generator)

    def forward(
        self,
        x: Tensor,
        sigma: Tensor | float,
        class_labels: Tensor | None = None,
        augment_labels: Tensor | None = None,
        dropout_masks: tuple[Tensor, ...] | None = None,
    ) -> Tensor:
        """Denoised image D(x; sigma), (B, C, H, W) float32 (float64 when the weights are float64).

        x             (B, C, H, W) noisy image x_0 + sigma n, any float type
        sigma         (B,) or scalar, > 0, data units
        class_labels  (B, label_dim) one-hot, or None: all zeros, unconditional
        augment_labels (B, augment_dim) or None;   dropout_masks: see `draw_dropout`
        Raises UserError for a Python-number sigma <= 0 and for labels of another width.
        """
        return self._denoise(x, sigma, class_labels, augment_labels, dropout_masks)[0]

    def _denoise(self, x, sigma, class_labels, augment_labels, dropout_masks) -> tuple[Tensor, Tensor]:
        """D and c_noise (B,)."""
        weight = next(self.parameters(), None)
        wide = torch.float64 if weight is not None and weight.dtype == torch.float64 else torch.float32
        x = x.to(wide)
        if isinstance(sigma, Real):
            limits.sigma("sigma", sigma)
        sigma = append_dims(torch.as_tensor(sigma, dtype=wide, device=x.device).reshape(-1), x)
        sigma = sigma.expand(x.shape[0], *sigma.shape[1:])
        c_skip, c_out, c_in, c_noise = self.coefficients(sigma)
        c_noise = c_noise.flatten()
        x_in = (c_in * x).to(self._network_dtype(x, wide))
        raw = self.raw(
            x_in,
            c_noise,
            class_labels=self._labels(class_labels, x),
            augment_labels=augment_labels,
            dropout_masks=dropout_masks,
        )
        return c_skip * x + c_out * self._image(raw).to(wide), c_noise

    def _network_dtype(self, x: Tensor, wide: torch.dtype) -> torch.dtype:
        wanted = DTYPES[self.dtype]
        if wide is torch.float64 or (wanted is torch.float16 and not x.is_cuda):
            return wide
        return wanted

    def _labels(self, labels: Tensor | None, x: Tensor) -> Tensor | None:
        if self.label_dim == 0:
            return None
        if labels is None:
            return torch.zeros(1, self.label_dim, dtype=x.dtype, device=x.device)
        if labels.dim() != 2 or labels.shape[1] != self.label_dim:
            raise UserError(
                f"class_labels must be one-hot of shape (B, {self.label_dim}), got {tuple(labels.shape)}. "
                f"Use torch.nn.functional.one_hot(labels, {self.label_dim}), or set the network's label_dim."
            )
        return labels.to(x.dtype)

    def _image(self, raw: Tensor) -> Tensor:
        return raw


def _edm(sigma: Tensor, sigma_data: float) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    total = sigma**2 + sigma_data**2
    return sigma_data**2 / total, sigma * sigma_data / total.sqrt(), 1 / total.sqrt(), sigma.log() / 4


class EDMPrecond(Preconditioner):
    """EDM table 1, last column: c_skip = sd^2/(sigma^2+sd^2), c_out = sigma sd/sqrt(sigma^2+sd^2),
    c_in = 1/sqrt(sigma^2+sd^2), c_noise = ln(sigma)/4; sd = sigma_data, the standard deviation of the data.
    """

    def __init__(
        self,
        *,
        model: nn.Module,
        sigma_data: float = 0.5,
        sigma_min: float = 0.0,
        sigma_max: float = math.inf,
        dtype: str = "float32",
    ):
        super().__init__(model, sigma_min, sigma_max, dtype)
        self.sigma_data = limits.number("sigma_data", sigma_data, above=0)

    def coefficients(self, sigma):
        return _edm(sigma, self.sigma_data)


class ECMPrecond(Preconditioner):
    """Consistency model of ECT (arXiv 2406.14548): in training mode EDM's scalings; in eval mode shifted by sigma_min,
    c_skip = sd^2/((sigma-sigma_min)^2+sd^2), c_out = (sigma-sigma_min) sd/sqrt(sigma^2+sd^2), so that
    D(x; sigma_min) = x exactly. Forgetting `.eval()` changes samples slightly. sigma_min = 0 shifts nothing: the same
    scalings in both modes, as in ECT's ImageNet branch.
    """

    def __init__(
        self,
        *,
        model: nn.Module,
        sigma_data: float = 0.5,
        sigma_min: float = 0.003,
        sigma_max: float = math.inf,
        dtype: str = "float32",
    ):
        super().__init__(model, sigma_min, sigma_max, dtype)
        self.sigma_data = limits.number("sigma_data", sigma_data, above=0)

    def coefficients(self, sigma):
        c_skip, c_out, c_in, c_noise = _edm(sigma, self.sigma_data)
        if not self.training and self.sigma_min:
            above = sigma - self.sigma_min
            c_skip = self.sigma_data**2 / (above**2 + self.sigma_data**2)
            c_out = above * self.sigma_data * c_in
        return c_skip, c_out, c_in, c_noise


class VPPrecond(Preconditioner):
    """EDM table 1, VP column: c_skip 1, c_out -sigma, c_in 1/sqrt(sigma^2+1), c_noise = (M-1) t(sigma).

    epsilon_t  smallest training time; sigma_min = sigma(epsilon_t), sigma_max = sigma(1)
    """

    def __init__(
        self,
        *,
        model: nn.Module,
        beta_d: float = 19.9,
        beta_min: float = 0.1,
        M: int = 1000,
        epsilon_t: float = 1e-5,
        dtype: str = "float32",
    ):
        path = VP(beta_d=beta_d, beta_min=beta_min)
        limits.number("epsilon_t", epsilon_t, above=0, most=0.999)
        low, high = (math.sqrt(math.expm1(0.5 * beta_d * t**2 + beta_min * t)) for t in (epsilon_t, 1.0))
        super().__init__(model, low, high, dtype)
        self.path = path
        self.M = limits.whole("M", M, least=1)

    def coefficients(self, sigma):
        return 1, -sigma, 1 / (sigma**2 + 1).sqrt(), (self.M - 1) * self.path.t_of_sigma(sigma)


class VEPrecond(Preconditioner):
    """EDM table 1, VE column: c_skip 1, c_out sigma, c_in 1, c_noise = ln(sigma/2)."""

    def __init__(
        self,
        *,
        model: nn.Module,
        sigma_min: float = 0.02,
        sigma_max: float = 100.0,
        dtype: str = "float32",
    ):
        super().__init__(model, limits.sigma("sigma_min", sigma_min), sigma_max, dtype)

    def coefficients(self, sigma):
        return 1, sigma, 1, (0.5 * sigma).log()


@lru_cache(maxsize=8)
def iddpm_levels(C1: float = 0.001, C2: float = 0.008, M: int = 1000) -> tuple[float, ...]:
    """Noise levels u_0 > u_1 > ... > u_M = 0 of iDDPM (EDM table 1, note 3): u_{j-1}^2 =
    (u_j^2 + 1) / max(abar_{j-1}/abar_j, C1) - 1 with abar_j = sin^2(pi j / (2 M (C2 + 1))).
    """
    abar = np.sin(0.5 * np.pi * np.arange(M + 1, dtype=np.float64) / M / (C2 + 1)) ** 2
    u = np.zeros(M + 1)
    for j in range(M, 0, -1):
        u[j - 1] = math.sqrt((u[j] ** 2 + 1) / max(abar[j - 1] / abar[j], C1) - 1)
    return tuple(u.tolist())


class IDDPMPrecond(Preconditioner):
    """EDM table 1, iDDPM column: as VP but c_noise = M - 1 - j with u_j the table entry nearest to sigma.

    model  predicts 2 x channels (noise and variance); the second half is not used by the denoiser
    The table is the buffer `u`, stored in official checkpoints under that name.
    """

    u: Tensor

    def __init__(
        self, *, model: nn.Module, C1: float = 0.001, C2: float = 0.008, M: int = 1000, dtype: str = "float32"
    ):
        limits.whole("M", M, least=2)
        levels = iddpm_levels(C1, C2, M)
        super().__init__(model, levels[M - 1], levels[0], dtype)
        self.M = M
        self._levels = levels
        self.register_buffer("u", torch.tensor(levels, dtype=torch.float32))

    def levels(self) -> tuple[float, ...]:
        """The positive noise levels, largest first (for `common.diffusion.time.GridSigma`)."""
        return self._levels[:-1]

    def _index(self, sigma: Tensor) -> Tensor:
        return (sigma.to(torch.float32).unsqueeze(-1) - self.u.to(sigma.device, torch.float32)).abs().argmin(-1)

    def round_sigma(self, sigma: Tensor) -> Tensor:
        """The nearest noise level of the table; samplers move their grid there."""
        return self.u.to(sigma.device)[self._index(sigma)].to(sigma.dtype)

    def coefficients(self, sigma):
        return 1, -sigma, 1 / (sigma**2 + 1).sqrt(), (self.M - 1 - self._index(sigma)).to(sigma.dtype)

    def _image(self, raw):
        return raw[:, : self.img_channels]


class EDM2Precond(Preconditioner):
    """EDM2 (arXiv 2312.02696): EDM's scalings plus the uncertainty u(sigma) of eq. 21, a magnitude-preserving linear
    layer on Fourier features of c_noise. Submodules are called `unet`, `logvar_fourier`, `logvar_linear` as in the
    official checkpoints.

    logvar_channels  Fourier features of the head; 0 leaves the head out (ECT's EDM2 branch drops it)
    """

    slot = "unet"

    def __init__(
        self,
        *,
        model: nn.Module,
        sigma_data: float = 0.5,
        sigma_min: float = 0.0,
        sigma_max: float = math.inf,
        dtype: str = "float32",
        logvar_channels: int = 128,
    ):
        super().__init__(model, sigma_min, sigma_max, dtype)
        self.sigma_data = limits.number("sigma_data", sigma_data, above=0)
        if limits.whole("logvar_channels", logvar_channels):
            self.logvar_fourier = MPFourier(logvar_channels)
            self.logvar_linear = MPConv(logvar_channels, 1, kernel=())

    def coefficients(self, sigma):
        return _edm(sigma, self.sigma_data)

    def forward(
        self,
        x: Tensor,
        sigma: Tensor | float,
        class_labels: Tensor | None = None,
        augment_labels: Tensor | None = None,
        dropout_masks: tuple[Tensor, ...] | None = None,
        return_logvar: bool = False,
    ):
        """D(x; sigma) as in `Preconditioner.forward`; with return_logvar=True the pair (D, u(sigma) (B, 1, 1, 1))."""
        denoised, c_noise = self._denoise(x, sigma, class_labels, augment_labels, dropout_masks)
        if not return_logvar:
            return denoised
        if not hasattr(self, "logvar_linear"):
            raise UserError("return_logvar needs the uncertainty head, got logvar_channels=0. Set logvar_channels=128.")
        logvar = self.logvar_linear(self.logvar_fourier(c_noise))
        return denoised, append_dims(logvar.to(denoised.dtype), x)
