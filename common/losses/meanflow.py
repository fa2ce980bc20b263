"""Average velocities: MeanFlow (arXiv 2505.13447), improved MeanFlow (2512.02012), pixel MeanFlow (2601.22158).

Path z = (1 - t) x + t e, time 0 = data, 1 = noise, v = e - x. The average velocity u(z, t, r) = 1/(t - r) times the
integral of the velocity from r to t takes z at t to z - (t - r) u at r. Networks are called
    net(z, t, r, class_labels=..., ...) -> u (B, C, H, W)
class_labels one-hot (B, label_dim), a row of zeros being no class; iMF and pMF networks also take omega, t_min, t_max
(B,) and, with an auxiliary head, heads="u" | "v" | "both". No parameters, no random numbers except dropout masks.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn

from common import limits
from common.deq.structure import without_autocast
from common.diffusion.jvp import total_derivative
from common.errors import UserError
from common.losses.robust import adaptive_weight, squared_distance
from common.tensors import append_dims, known_to_host, select_rows

# ---------------------------------------------------------------------------------------------------------------------
# The mathematics


def average_velocity_target(v: Tensor, dudt: Tensor, t: Tensor, r: Tensor) -> Tensor:
    """Regression target for u(z, t, r): v - (t - r) du/dt, a constant. MeanFlow identity; at r = t exactly v.

    v      (B, ...) velocity at (z, t)
    dudt   (B, ...) total derivative of u by t at fixed r, dz/dt = v (`common.diffusion.jvp.total_derivative`)
    t, r   (B,), 0 <= r <= t <= 1
    """
    return (v - append_dims(t - r, v) * dudt).detach()


def compound_velocity(u: Tensor, dudt: Tensor, t: Tensor, r: Tensor) -> Tensor:
    """V = u + (t - r) stopgrad(du/dt), (B, ...): an instantaneous velocity made of u. iMF; at r = t exactly u."""
    return u + append_dims(t - r, u) * dudt.detach()


def guided_velocity(
    v: Tensor, v_uncond: Tensor, v_cond: Tensor | None = None, omega: Tensor | float = 1.0, kappa: Tensor | float = 0.0
) -> Tensor:
    """omega v + kappa v_cond + (1 - omega - kappa) v_uncond, (B, ...). MeanFlow, section on guidance.

    v         (B, ...) conditional velocity e - x of the sample
    v_uncond, v_cond   (B, ...) the network's velocities, without and with class
    omega, kappa   numbers or (B,); the guidance scale is omega / (1 - kappa). omega 1, kappa 0: v
    """
    omega, kappa = (append_dims(k, v) if torch.is_tensor(k) else k for k in (omega, kappa))
    total = omega * v + (1 - omega - kappa) * v_uncond
    return total if v_cond is None else total + kappa * v_cond


def guided_target(v: Tensor, v_cond: Tensor, v_uncond: Tensor, omega: Tensor) -> Tensor:
    """v + (1 - 1/omega) (v_cond - v_uncond), (B, ...), v_cond already guided with omega (B,) >= 1. iMF; omega 1: v.

    At its fixed point v_cond = v_uncond + omega (v - v_uncond): classifier-free guidance of scale omega.
    """
    return v + append_dims(1 - 1 / omega, v) * (v_cond - v_uncond)


def inside(t: Tensor, start: Tensor | float, end: Tensor | float) -> Tensor:
    """start <= t <= end, (B,) bool."""
    return (t >= start) & (t <= end)


def velocity_from_data(z: Tensor, x: Tensor, t: Tensor, floor: float = 0.05) -> Tensor:
    """(z - x) / max(t, floor), (B, ...): the velocity that leads from z at t to x at 0. pMF; e - x for t >= floor."""
    return (z - x) / append_dims(t.clamp(min=floor), z)


def data_from_velocity(z: Tensor, u: Tensor, t: Tensor) -> Tensor:
    """z - t u, (B, ...): where velocity u leads from z at t. Inverse of `velocity_from_data` for t >= floor."""
    return z - append_dims(t, z) * u


# ---------------------------------------------------------------------------------------------------------------------
# The losses


class Terms(NamedTuple):
    """Per-sample terms of a loss, (B,) each. With power 1 the loss is nearly constant: watch the others."""

    loss: Tensor  # what is minimised
    u: Tensor  # |u - target|^2 or |V - target|^2, summed over pixels, no gradient
    v: Tensor  # MeanFlow: |u - (e - x)|^2; with an auxiliary head: its squared error. No gradient


@dataclass(frozen=True, kw_only=True)
class MeanFlowLoss:
    """w |u - stopgrad(v - (t - r) du/dt)|^2, summed over pixels, w = 1/stopgrad(|.|^2 + eps)^power. Eq. 10, 22.

    power, eps     p and c of w; ImageNet: 1, 0.01 in the code (paper 0.001); CIFAR-10: 0.75, 0.001
    omega, kappa   guidance in the target, see `guided_velocity`; 1 and 0: none, and no further network call
    start, end     times between which guidance acts
    tangent_v, tangent_t, tangent_r   directions of z (times v), t and r in the derivative; 1, 1, 0 is the identity, the
                   paper's ablation writes it (v, 0, 1) for (z, r, t)
    skip_equal     False: samples with r = t take the derivative pass too, which keeps shapes fixed. Same result
    """

    power: float = 1.0
    eps: float = 1e-3
    omega: float = 1.0
    kappa: float = 0.0
    start: float = 0.0
    end: float = 1.0
    tangent_v: float = 1.0
    tangent_t: float = 1.0
    tangent_r: float = 0.0
    skip_equal: bool = True

    def __post_init__(self):
        _check_weight(self)
        limits.number("omega", self.omega)
        limits.number("kappa", self.kappa, least=0, below=1, hint="The scale is omega / (1 - kappa). Set kappa=0.5.")
        limits.number("start", self.start, least=0, most=1)
        limits.number("end", self.end, least=self.start, most=1)
        for name in ("tangent_v", "tangent_t", "tangent_r"):
            limits.number(name, getattr(self, name))

    @property
    def guided(self) -> bool:
        """Whether the target needs the network's own velocities."""
        return self.omega != 1 or self.kappa != 0

    def __call__(
        self,
        net: nn.Module,
        x: Tensor,
        t: Tensor,
        r: Tensor,
        e: Tensor,
        *,
        class_labels: Tensor | None = None,
        dropped: Tensor | None = None,
        augment_labels: Tensor | None = None,
        dropout_masks: tuple[Tensor, ...] | None = None,
    ) -> Terms:
        """Terms (B,) each.

        x, e           (B, C, H, W) data and standard normal noise
        t, r           (B,), 0 <= r <= t <= 1. Give them on the CPU: the host then finds the rows without waiting
        class_labels   (B, label_dim) one-hot or None
        dropped        (B,) bool or None: samples trained without their class, and towards v
        augment_labels (B, augment_dim) or None;   dropout_masks: one per layer, None: drawn here (`net.draw_dropout`)
        Raises UserError for shapes that do not fit and, on the CPU, for r > t.
        """
        noisy = _NoisyBatch(net, x, t, r, e, class_labels, dropped, augment_labels, dropout_masks)
        v = noisy.e - x
        target = self._guided(net, noisy, v) if self.guided else v
        dudt = total_derivative(
            net, noisy.z, t, r, (self.tangent_v * target, self.tangent_t, self.tangent_r), noisy.conditions,
            skip_equal=self.skip_equal,
        )  # fmt: skip
        u = net(noisy.z, noisy.t, noisy.r, **noisy.conditions)
        # |u - stopgrad(v - (t - r) du/dt)|^2, eq. 10, with the adaptive weight of eq. 22
        with without_autocast(x.device.type):
            u = u.to(x.dtype)
            squared = squared_distance(u - average_velocity_target(target, dudt, noisy.t, noisy.r))
            watched = squared_distance(u.detach() - v)
        return Terms(_weighted(squared, self), squared.detach(), watched)

    def _guided(self, net, noisy: "_NoisyBatch", v: Tensor) -> Tensor:
        """The guided velocity of the rows that keep their label and lie in the window; v elsewhere."""
        if noisy.labels is None:
            raise UserError("omega and kappa guide by class, but there are no class labels. Set omega=1 and kappa=0.")
        wanted = inside(noisy.host_t, self.start, self.end)
        if noisy.dropped is not None:
            wanted = wanted & ~noisy.dropped.to(wanted.device)

        def compute(z, t, v, labels):
            with _evaluating(net, noisy.masks):
                if self.kappa == 0:
                    return guided_velocity(v, net(z, t, t, class_labels=torch.zeros_like(labels)), omega=self.omega)
                both = net(*(torch.cat([k, k]) for k in (z, t, t)),
                           class_labels=torch.cat([torch.zeros_like(labels), labels]))  # fmt: skip
                v_uncond, v_cond = both.to(v.dtype).chunk(2)
                return guided_velocity(v, v_uncond, v_cond, omega=self.omega, kappa=self.kappa)

        return _compute_rows(compute, wanted, v, noisy.z, noisy.t, v, noisy.labels)


@dataclass(frozen=True, kw_only=True)
class ImprovedMeanFlowLoss:
    """w |V - v_g|^2 + w' |v - v_g|^2, V = u + (t - r) stopgrad(du/dt): the target does not depend on u. iMF; pMF.

    The derivative is taken along the network's own velocity, a function of z; e - x is not.
    power, eps    of the weights w = 1/stopgrad(|.|^2 + eps)^power; official 1, 0.01
    head          where that velocity comes from. "auxiliary": the v-head, trained beside u; "boundary": u(z, t, t);
                  "data": nowhere, the derivative follows the target itself, which is MeanFlow's loss (the paper's
                  ablation starts there)
    uncond_omega  guidance scale of the call without class: "one" (official code) or "same" (paper, algorithm 2)
    t_floor       targets are (z - x) / max(t, t_floor); 0.05 in pMF, whose networks clip alike; 0: e - x
    skip_equal    see `MeanFlowLoss`
    """

    power: float = 1.0
    eps: float = 0.01
    head: str = "auxiliary"
    uncond_omega: str = "one"
    t_floor: float = 0.0
    skip_equal: bool = True

    def __post_init__(self):
        _check_weight(self)
        limits.choice("head", self.head, ("auxiliary", "boundary", "data"))
        limits.choice("uncond_omega", self.uncond_omega, ("one", "same"))
        limits.number("t_floor", self.t_floor, least=0, most=1)

    def __call__(
        self,
        net: nn.Module,
        x: Tensor,
        t: Tensor,
        r: Tensor,
        e: Tensor,
        *,
        class_labels: Tensor | None = None,
        dropped: Tensor | None = None,
        omega: Tensor | None = None,
        t_min: Tensor | None = None,
        t_max: Tensor | None = None,
        dropout_masks: tuple[Tensor, ...] | None = None,
        perceptual: Callable | None = None,
    ) -> Terms:
        """Terms (B,) each; arguments as in `MeanFlowLoss`, and

        e             noise, already times the noise scale of the data set
        omega         (B,) >= 1, guidance scale that conditions the network; None: a network without guidance
        t_min, t_max  (B,), times between which it guides; samples with r = t are guided at all times
        perceptual    (image, x, t, weighted) -> (B,): a further loss of the image z - t u; `weighted` applies w
        """
        noisy = _NoisyBatch(net, x, t, r, e, class_labels, dropped, None, dropout_masks)
        v = velocity_from_data(noisy.z, x, noisy.t, self.t_floor) if self.t_floor else noisy.e - x
        target, direction = v, None
        if omega is not None:
            if noisy.labels is None or t_min is None or t_max is None:
                raise UserError("guidance by omega needs class labels, t_min and t_max. Leave omega out without them.")
            omega, t_min, t_max = (k.to(x.device, x.dtype, non_blocking=True) for k in (omega, t_min, t_max))
            equal = noisy.t == noisy.r
            t_min, t_max = torch.where(equal, 0.0, t_min), torch.where(equal, 1.0, t_max)
            noisy.conditions |= {"omega": omega, "t_min": t_min, "t_max": t_max}
            target, direction = self._guided(net, noisy, v)
        if self.head == "data":
            direction = target
        if direction is None:
            direction = self._direction(net, noisy)
        heads = {"heads": "both"} if self.head == "auxiliary" else {}
        only_u = {"heads": "u"} if heads else {}
        dudt = total_derivative(
            net, noisy.z, t, r, (direction, 1.0, 0.0), noisy.conditions | only_u, skip_equal=self.skip_equal
        )
        found = net(noisy.z, noisy.t, noisy.r, **noisy.conditions, **heads)
        with without_autocast(x.device.type):
            u, seen = (k.to(x.dtype) for k in found) if heads else (found.to(x.dtype), None)
            squared = squared_distance(compound_velocity(u, dudt, noisy.t, noisy.r) - target)
            loss = _weighted(squared, self)
            other = squared_distance((u.detach() if seen is None else seen) - target)
            if seen is not None:
                loss = loss + _weighted(other, self)
            if perceptual is not None:
                image = data_from_velocity(noisy.z, u, noisy.t)
                loss = loss + perceptual(image, x, noisy.t, lambda distance: _weighted(distance, self))
        return Terms(loss, squared.detach(), other.detach())

    def _velocity(self, net, z: Tensor, t: Tensor, **conditions) -> Tensor:
        heads = {"heads": "v"} if self.head == "auxiliary" else {}
        return net(z, t, t, **conditions, **heads).to(z.dtype)

    def _direction(self, net, noisy: "_NoisyBatch") -> Tensor:
        """The network's own velocity where it is needed: where r < t."""

        def compute(z, t, labels):
            with _evaluating(net, noisy.masks):
                return self._velocity(net, z, t, **({} if labels is None else {"class_labels": labels}))

        labels = noisy.conditions.get("class_labels")
        return _compute_rows(compute, noisy.host_r < noisy.host_t, torch.zeros_like(noisy.z), noisy.z, noisy.t, labels)

    def _guided(self, net, noisy: "_NoisyBatch", v: Tensor) -> tuple[Tensor, Tensor]:
        """(v_g, v_c), (B, ...) each. Both calls have r = t and guidance at all times, as the authors' code does."""
        given = noisy.conditions
        omega = torch.where(inside(noisy.t, given["t_min"], given["t_max"]), given["omega"], 1.0)
        needed = noisy.host_r < noisy.host_t
        if noisy.dropped is not None:  # a sample without class still needs v_c if it takes a derivative
            needed = needed | ~noisy.dropped.to(needed.device)

        def compute(z, t, v, labels, omega, full):
            without = full if self.uncond_omega == "same" else torch.ones_like(full)
            with _evaluating(net, noisy.masks):
                both = self._velocity(
                    net, torch.cat([z, z]), torch.cat([t, t]), omega=torch.cat([omega, without]),
                    class_labels=torch.cat([labels, torch.zeros_like(labels)]),
                    t_min=torch.zeros_like(torch.cat([t, t])), t_max=torch.ones_like(torch.cat([t, t])),
                )  # fmt: skip
            v_cond, v_uncond = both.chunk(2)
            return torch.stack([guided_target(v, v_cond, v_uncond, omega), v_cond], dim=1)

        fallback = torch.stack([v, v], dim=1)
        if noisy.dropped is None:
            needed = torch.ones_like(needed)
        found = _compute_rows(compute, needed, fallback, noisy.z, noisy.t, v, noisy.labels, omega, given["omega"])
        target, direction = found.unbind(1)
        if noisy.dropped is not None:
            target = torch.where(append_dims(noisy.dropped.to(v.device), v), v, target)
        return target, direction


# ---------------------------------------------------------------------------------------------------------------------
# What both share


class _NoisyBatch:
    """z = (1 - t) x + t e and the per-sample conditions, on the device of x; times also where they were given."""

    def __init__(self, net, x, t, r, e, class_labels, dropped, augment_labels, dropout_masks):
        if e.shape != x.shape or t.shape != (len(x),) or r.shape != (len(x),):
            raise UserError(
                f"x and e must have one shape and t, r one value per sample, got x {tuple(x.shape)}, e "
                f"{tuple(e.shape)}, t {tuple(t.shape)}, r {tuple(r.shape)}. Draw e like x and t, r with len(x)."
            )
        if known_to_host(t) and bool((r > t).any() | (r < 0).any() | (t > 1).any()):
            raise UserError("times must satisfy 0 <= r <= t <= 1 (0 = data, 1 = noise). Order each pair (t, r).")
        self.host_t, self.host_r = t, r
        self.t, self.r = (time.to(x.device, x.dtype, non_blocking=True) for time in (t, r))
        self.e = e.to(x.dtype)
        self.z = (1 - append_dims(self.t, x)) * x + append_dims(self.t, x) * self.e
        self.labels, self.dropped = class_labels, dropped
        if class_labels is not None and dropped is not None:
            class_labels = class_labels * ~dropped.to(x.device, non_blocking=True)[:, None]
        if dropout_masks is None and hasattr(net, "draw_dropout") and net.training:
            dropout_masks = net.draw_dropout(x)
        self.masks = dropout_masks or ()
        given = {"class_labels": class_labels, "augment_labels": augment_labels, "dropout_masks": self.masks or None}
        self.conditions = {name: value for name, value in given.items() if value is not None}


def _check_weight(loss) -> None:
    limits.number("power", loss.power, least=0)
    limits.number("eps", loss.eps, above=0)


def _weighted(squared: Tensor, loss) -> Tensor:
    return squared * adaptive_weight(squared, power=loss.power, eps=loss.eps) if loss.power else squared


def _compute_rows(compute: Callable, wanted: Tensor, otherwise: Tensor, *inputs: Tensor | None) -> Tensor:
    """compute(*inputs) in the rows `wanted` (B,) bool, `otherwise` elsewhere; a constant. Takes only those rows through
    the network where the host can tell which they are.
    """
    with torch.no_grad():
        if not known_to_host(wanted):
            found = compute(*inputs).to(otherwise.dtype)
            return torch.where(append_dims(wanted.to(otherwise.device), otherwise), found, otherwise)
        rows, count = wanted.nonzero().flatten(), len(wanted)
        if len(rows) == count:
            return compute(*inputs).to(otherwise.dtype)
        if len(rows) == 0:
            return otherwise
        rows = rows.to(otherwise.device, non_blocking=True)
        found = compute(*select_rows(inputs, rows, count))
        return otherwise.index_copy(0, rows, found.to(otherwise.dtype))


@contextmanager
def _evaluating(net: nn.Module, masks: tuple) -> Iterator[None]:
    """No dropout inside: the velocities that make a target are the whole network's. Nothing to do without dropout."""
    if not masks or not net.training:
        yield
        return
    modes = [(part, part.training) for part in net.modules()]
    net.eval()
    try:
        yield
    finally:
        for part, mode in modes:
            part.training = mode
