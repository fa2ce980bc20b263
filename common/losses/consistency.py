"""Consistency training by Easy Consistency Tuning (ECT, arXiv 2406.14548): the pair (t, r), its schedule, the loss.

Times are noise levels in data units (x_t = y + t eps). No parameters, no random numbers except dropout masks.
"""

from collections.abc import Callable
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from common import limits
from common.losses.robust import pseudo_huber, squared_distance
from common.tensors import append_dims, only_shapes, select_rows

ADJUSTMENTS = ("sigmoid", "const")
WEIGHTS = ("inverse_gap", "snrpk", "uniform")


def stage_of_step(step: int, steps_per_stage: int, stages: int) -> int:
    """Stage 0, 1, ..., stages - 1 at optimiser step `step` (counted from 0); the last stage never ends."""
    limits.whole("step", step)
    limits.whole("steps_per_stage", steps_per_stage, least=1)
    limits.whole("stages", stages, least=1)
    return min(step // steps_per_stage, stages - 1)


def ratio(
    t: Tensor,
    stage: int,
    q: float,
    k: float = 8.0,
    b: float = 1.0,
    adj: str = "sigmoid",
    ratio_limit: float | None = None,
) -> Tensor:
    """r/t in [0, 1): max(0, 1 - n(t) / q^(stage+1)), n(t) = 1 + k sigmoid(-b t) ("sigmoid") or 1 ("const").

    t (B,) > 0; ratio_limit caps the result (FastGen 0.9961). ECT section 3.2 with stages counted from 0.
    """
    n = 1 + k * torch.sigmoid(-b * t) if adj == "sigmoid" else torch.ones_like(t)
    value = 1 - 1 / q ** (stage + 1) * n
    return value.clamp(min=0, max=ratio_limit)


def t_to_r(
    t: Tensor,
    stage: int,
    q: float,
    k: float = 8.0,
    b: float = 1.0,
    adj: str = "sigmoid",
    ratio_limit: float | None = None,
) -> Tensor:
    """The earlier time r = t ratio(t), 0 <= r <= t, shape of t. r = 0 means: compare with the image itself."""
    return t * ratio(t, stage, q, k, b, adj, ratio_limit)


@dataclass(frozen=True, kw_only=True)
class ConsistencyLoss:
    """ECT loss per sample: w(t, r) d(f(x_t, t), stopgrad f(x_r, r)), with x_t = y + t eps, x_r = y + r eps.

    q, k, b, adj    schedule of r, see `ratio`; q = 2 (CIFAR-10), 4 (ImageNet-64), 256 (one hour); q = 1 is diffusion
    ratio_limit     cap on r/t, None = no cap
    c               pseudo-Huber constant in data units for the SUM over pixels; 0 = plain distance
    weight          "inverse_gap": 1/(t - r) (CIFAR-10); "snrpk": 1/t^2 + 1/sigma_data^2 (ImageNet-64 branch of the
                    official code, independent of r); "uniform": 1
    sigma_data      only used by "snrpk"
    sync_dropout    True: student and teacher use one and the same keep mask per sample; False: independent masks
    skip_zero       True: samples with r = 0 take no teacher pass (their target is y). The number of teacher rows then
                    varies; False keeps every shape fixed, for torch.compile. Same result either way.
    ode_solver      how `ode_teacher` steps from t to r: "euler" or "heun"
    official        exact square root for c = 0 as in the official code (gradient nan where f = target)
    """

    q: float = 2.0
    k: float = 8.0
    b: float = 1.0
    adj: str = "sigmoid"
    ratio_limit: float | None = None
    c: float = 0.0
    weight: str = "inverse_gap"
    sigma_data: float = 0.5
    sync_dropout: bool = True
    skip_zero: bool = True
    ode_solver: str = "heun"
    official: bool = False

    def __post_init__(self):
        limits.number("q", self.q, least=1)
        limits.number("k", self.k, least=0)
        limits.number("b", self.b, least=0)
        limits.choice("adj", self.adj, ADJUSTMENTS)
        if self.ratio_limit is not None:
            limits.number("ratio_limit", self.ratio_limit, least=0, most=1)
        limits.number("c", self.c, least=0)
        limits.choice("weight", self.weight, WEIGHTS)
        limits.number("sigma_data", self.sigma_data, above=0)
        limits.choice("ode_solver", self.ode_solver, ("euler", "heun"))

    def t_to_r(self, t: Tensor, stage: int) -> Tensor:
        """r for noise levels t (B,) at this stage."""
        return t_to_r(t, limits.whole("stage", stage), self.q, self.k, self.b, self.adj, self.ratio_limit)

    def weighting(self, t: Tensor, r: Tensor) -> Tensor:
        """w(t, r), (B,)."""
        if self.weight == "inverse_gap":
            return 1 / (t - r)
        if self.weight == "snrpk":
            return (t**2 + self.sigma_data**2) / (t * self.sigma_data) ** 2
        return torch.ones_like(t)

    def __call__(
        self,
        net: nn.Module,
        y: Tensor,
        t: Tensor,
        eps: Tensor,
        *,
        stage: int,
        class_labels: Tensor | None = None,
        augment_labels: Tensor | None = None,
        dropout_masks: tuple[Tensor, ...] | None = None,
        teacher: nn.Module | None = None,
        ode_teacher: Callable | None = None,
    ) -> Tensor:
        """Losses (B,).

        net           preconditioner, f(x, sigma, class_labels, augment_labels, dropout_masks); in train mode
        y, eps        (B, C, H, W) clean images in [-1, 1] and standard normal noise
        t             (B,) > 0 noise levels. Give it on the CPU: the host then finds the rows that need the teacher
                      without waiting for the device
        stage         0, 1, 2, ...
        dropout_masks one keep mask per dropout layer (`net.draw_dropout`); None and sync_dropout: drawn here
        teacher       gives the target instead of net itself (e.g. a frozen copy); never gets gradients
        ode_teacher   diffusion denoiser D(x, sigma, class_labels, augment_labels): x_r then is its ODE step from
                      x_t to r (distillation, ECD) instead of y + r eps
        """
        r = self.t_to_r(t, stage)
        delta = self.difference(
            net,
            y,
            t,
            r,
            eps,
            class_labels=class_labels,
            augment_labels=augment_labels,
            dropout_masks=dropout_masks,
            teacher=teacher,
            ode_teacher=ode_teacher,
        )
        metric = pseudo_huber(squared_distance(delta), self.c, official=self.official)
        return metric * self.weighting(t, r).to(metric.device, metric.dtype, non_blocking=True)

    def difference(
        self,
        net: nn.Module,
        y: Tensor,
        t: Tensor,
        r: Tensor,
        eps: Tensor,
        *,
        class_labels: Tensor | None = None,
        augment_labels: Tensor | None = None,
        dropout_masks: tuple[Tensor, ...] | None = None,
        teacher: nn.Module | None = None,
        ode_teacher: Callable | None = None,
    ) -> Tensor:
        """Delta = f(x_t, t) - stopgrad f(x_r, r), (B, C, H, W); where r = 0 the target is y (or the ODE end point)."""
        x_t = y + eps * _per_sample(t, y)
        draw_dropout = getattr(net, "draw_dropout", None)
        if self.sync_dropout and dropout_masks is None and draw_dropout is not None:
            dropout_masks = draw_dropout(x_t)
        labels = {"class_labels": class_labels, "augment_labels": augment_labels}
        teacher = net if teacher is None else teacher
        with _same_weights(net, teacher):
            # The teacher goes first: its activations are freed before the student's are kept for the backward pass.
            with torch.no_grad():
                masks = dropout_masks if self.sync_dropout else None
                target = self._target(teacher, y, x_t, t, r, eps, labels, masks, ode_teacher)
            sigma = t.to(y.device, y.dtype, non_blocking=True)
            return net(x_t, sigma, **labels, dropout_masks=dropout_masks) - target

    def _target(self, teacher, y, x_t, t, r, eps, labels, masks, ode_teacher) -> Tensor:
        if not self.skip_zero or only_shapes(r):
            live = r > 0
            safe = torch.where(live, r, t)  # ln(0) must not reach the network, not even to be thrown away
            x_r, end = self._earlier(y, x_t, t, safe, eps, labels, ode_teacher)
            predicted = teacher(x_r, safe.to(y.device, y.dtype, non_blocking=True), **labels, dropout_masks=masks)
            return torch.where(append_dims(live, y).to(y.device, non_blocking=True), predicted.to(y.dtype), end)
        rows = (r > 0).nonzero().flatten()
        if rows.numel() == r.numel():
            x_r, _ = self._earlier(y, x_t, t, r, eps, labels, ode_teacher)
            return teacher(x_r, r.to(y.device, y.dtype, non_blocking=True), **labels, dropout_masks=masks).to(y.dtype)
        target = y if ode_teacher is None else _call(ode_teacher, x_t, t, labels)
        if rows.numel():
            r, t = r[rows], t[rows]
            rows = rows.to(y.device, non_blocking=True)
            y, x_t, eps, labels, masks = select_rows((y, x_t, eps, labels, masks), rows, len(y))
            x_r, _ = self._earlier(y, x_t, t, r, eps, labels, ode_teacher)
            predicted = teacher(x_r, r.to(y.device, y.dtype, non_blocking=True), **labels, dropout_masks=masks)
            target = target.index_copy(0, rows, predicted.to(y.dtype))
        return target

    def _earlier(self, y, x_t, t, r, eps, labels, ode_teacher) -> tuple[Tensor, Tensor]:
        """x_r for r > 0, and what the target would be at r = 0."""
        if ode_teacher is None:
            return y + eps * _per_sample(r, y), y
        # One step of dx/dsigma = (x - D) / sigma from t to r: Euler, then Heun's mean of both slopes (EDM algorithm 1).
        denoised = _call(ode_teacher, x_t, t, labels)
        slope = (x_t - denoised) / _per_sample(t, y)
        step = _per_sample(r, y) - _per_sample(t, y)
        x_r = x_t + step * slope
        if self.ode_solver == "heun":
            slope = 0.5 * (slope + (x_r - _call(ode_teacher, x_r, r, labels)) / _per_sample(r, y))
            x_r = x_t + step * slope
        return x_r, denoised


def _per_sample(value: Tensor, like: Tensor) -> Tensor:
    """value (B,) -> (B, 1, 1, 1) on the device and in the dtype of `like`."""
    return append_dims(value.to(like.device, like.dtype, non_blocking=True), like)


def _call(denoiser: Callable, x: Tensor, sigma: Tensor, labels: dict) -> Tensor:
    return denoiser(x, sigma.to(x.device, x.dtype, non_blocking=True), **labels).to(x.dtype)


@contextmanager
def _same_weights(*nets: nn.Module):
    """EDM2 networks renormalise their weights in every training forward pass; student and teacher pass must see
    the very same weights. A network may offer `weights_normalized_once()`, a context manager; others are left alone.
    """
    with ExitStack() as stack:
        for net in dict.fromkeys(nets):
            normalized_once = getattr(net, "weights_normalized_once", None)
            if normalized_once is not None:
                stack.enter_context(normalized_once())
        yield
