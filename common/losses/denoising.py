"""Denoising losses lambda(sigma) |D(y + sigma n; sigma) - y|^2 of EDM, VP, VE, iDDPM and EDM2."""

from dataclasses import dataclass

from torch import Tensor, nn

from common import limits
from common.tensors import append_dims

WEIGHTS = ("edm", "inverse_variance", "uniform")


@dataclass(frozen=True, kw_only=True)
class DenoisingLoss:
    """Per-sample loss of a preconditioned network on y + sigma noise.

    weight      "edm": (sigma^2 + sd^2) / (sigma sd)^2, EDM (arXiv 2206.00364) eq. 5-8;
                "inverse_variance": 1 / sigma^2, the VP, VE and iDDPM columns of its table 1; "uniform": 1
    sigma_data  sd, standard deviation of the data
    uncertainty True: EDM2 (arXiv 2312.02696) eq. 21, weight / exp(u) |D - y|^2 + u with u = u(sigma) from the network
                (needs EDM2Precond with its head)
    reduction   over pixels and channels: "sum" (official: the gradient scale of EDM) or "mean" (about 1 at the start)
    """

    weight: str = "edm"
    sigma_data: float = 0.5
    uncertainty: bool = False
    reduction: str = "sum"

    def __post_init__(self):
        limits.choice("weight", self.weight, WEIGHTS)
        limits.choice("reduction", self.reduction, ("sum", "mean"))
        limits.number("sigma_data", self.sigma_data, above=0)

    def weighting(self, sigma: Tensor) -> Tensor:
        """lambda(sigma), shape of sigma."""
        if self.weight == "edm":
            return (sigma**2 + self.sigma_data**2) / (sigma * self.sigma_data) ** 2
        return 1 / sigma**2 if self.weight == "inverse_variance" else sigma.new_ones(sigma.shape)

    def __call__(
        self,
        net: nn.Module,
        y: Tensor,
        sigma: Tensor,
        noise: Tensor,
        *,
        class_labels: Tensor | None = None,
        augment_labels: Tensor | None = None,
        dropout_masks: tuple[Tensor, ...] | None = None,
    ) -> Tensor:
        """Losses (B,).

        net     preconditioner of `common.diffusion.precond`
        y       (B, C, H, W) clean images; noise: same shape, standard normal
        sigma   (B,) > 0, data units, on any device
        """
        sigma = sigma.to(y.device, y.dtype, non_blocking=True)
        scale = append_dims(sigma, y)
        inputs = {"class_labels": class_labels, "augment_labels": augment_labels, "dropout_masks": dropout_masks}
        if self.uncertainty:
            denoised, logvar = net(y + noise * scale, sigma, **inputs, return_logvar=True)
            error = self.weighting(scale) / logvar.exp() * (denoised - y) ** 2 + logvar
        else:
            error = self.weighting(scale) * (net(y + noise * scale, sigma, **inputs) - y) ** 2
        error = error.flatten(1)
        return error.sum(1) if self.reduction == "sum" else error.mean(1)
