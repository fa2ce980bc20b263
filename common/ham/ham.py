"""A matrix decomposition as a module on feature maps: `Ham(512, NMF(rank=64))(x)`."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from common import limits
from common.deq.structure import without_autocast
from common.errors import UserError
from common.ham.decompose import NMF, Decomposition
from common.tensors import is_channels_last, mean_over_processes

BASES = ("random", "online", "learned")


class Ham(nn.Module):
    """(B, channels, ...) -> the same shape: the low-rank part of each sample, its global context.

    channels       C
    decomposition  NMF, VQ or CD of common.ham.decompose; None: NMF()
    groups         S, independent groups of C/S channels
    spatial        True: atoms are feature vectors, d = C/S, n = pixels. False (channel ham): atoms are pictures,
                   d = pixels, n = C/S
    bases          dictionary to start from. random: new at each call, from torch's generator; online: a buffer
                   (S, d, r), moved by `update_bases` and by nothing else; learned: a parameter, which only the gradient
                   rule bptt reaches
    pixels         number of pixels, for stored bases of a channel ham; else None
    eta            rate of `update_bases`, in [0, 1]
    eval_seed      evaluation starts every sample from the same random bases, drawn from this seed: its output then
                   depends on the sample alone, not on the batch, the device or what ran before. None: as in training

    Everything inside runs in float32 (float64 for such input), under autocast, too; the output has the input's type.
    arXiv 2109.04553, section 3.
    """

    def __init__(
        self,
        channels: int,
        decomposition: Decomposition | None = None,
        *,
        groups: int = 1,
        spatial: bool = True,
        bases: str = "random",
        pixels: int | None = None,
        eta: float = 0.9,
        eval_seed: int | None = None,
    ):
        super().__init__()
        self.decomposition = NMF() if decomposition is None else decomposition
        limits.whole("ham.groups", groups, least=1)
        limits.multiple_of("ham.channels", channels, groups, "ham.groups", hint="Set ham.groups to a divisor.")
        limits.choice("ham.bases", bases, BASES)
        limits.number("ham.eta", eta, least=0, most=1, hint="The paper uses 0.9.")
        self.channels, self.groups, self.spatial, self.kind = channels, groups, spatial, bases
        self.pixels, self.eta, self.eval_seed = pixels, eta, eval_seed
        self.last_bases: Tensor | None = None  # (S, d, r), mean dictionary of the last call, kept for `update_bases`
        if bases != "random":
            self._store(bases)

    def _store(self, kind: str) -> None:
        if not self.spatial and self.pixels is None:
            raise UserError(f"ham.pixels must be set for {kind} bases of a channel ham: its atoms are whole pictures.")
        if self.eval_seed is not None:
            raise UserError(f"ham.eval_seed draws random bases, but the bases are {kind}. Set eval_seed=null.")
        drawn = self.decomposition.draw(self.groups, self.channels // self.groups if self.spatial else self.pixels)
        if kind == "online":
            self.register_buffer("bases", drawn)
        elif self.decomposition.gradient == "bptt":
            self.bases = nn.Parameter(drawn)
        else:
            raise UserError(
                "ham.bases=learned needs ham.gradient=bptt: no other rule has a gradient to the first bases. Or use "
                "bases=online."
            )

    def forward(self, x: Tensor, bases: Tensor | None = None) -> Tensor:
        """bases  to start from, (S, d, r) for all samples or (B, S, d, r); None: as configured"""
        if x.dim() < 3 or x.shape[1] != self.channels:
            raise UserError(f"Ham expects an input (B, {self.channels}, ...), got {tuple(x.shape)}.")
        with without_autocast(x.device.type):
            return self._forward(x, bases).to(x.dtype)

    def _forward(self, x: Tensor, bases: Tensor | None) -> Tensor:
        shape, last = x.shape, is_channels_last(x)
        x = x.to(torch.promote_types(x.dtype, torch.float32)).flatten(2)
        x = x.reshape(shape[0] * self.groups, self.channels // self.groups, x.shape[2])
        x = x if self.spatial else x.transpose(1, 2)
        steps = self.decomposition.steps if self.training else self.decomposition.eval_steps
        found, codes = self.decomposition.solve(x, self._start_bases(x, bases), steps=steps)
        if self.kind == "online":
            self.last_bases = found.detach().unflatten(0, (-1, self.groups)).mean(dim=0)
        # Made in the memory order of the input, so that neither this nor the convolution behind it copies
        if self.spatial and not last:
            y = torch.bmm(found, codes)
        else:
            y = torch.bmm(codes.transpose(1, 2), found.transpose(1, 2))
            y = y.transpose(1, 2) if self.spatial else y
        return y.reshape(shape) if not last else y.unflatten(2, shape[2:]).reshape(shape)

    def _start_bases(self, x: Tensor, given: Tensor | None) -> Tensor:
        """Dictionaries (B S, d, r) to start from."""
        samples, d = len(x) // self.groups, x.shape[1]
        rule = self.decomposition
        if given is None and self.kind != "random":
            if self.bases.shape[1] != d:
                raise UserError(f"ham.pixels is {self.bases.shape[1]}, but the input has {d} pixels.")
            given = self.bases
            if self.kind == "learned":
                given = F.normalize(given.abs() if rule.nonnegative else given, dim=1)
        if given is None and self.eval_seed is not None and not self.training:
            given = rule.draw(self.groups, d, generator=torch.Generator().manual_seed(self.eval_seed))
        if given is None:
            return rule.draw(len(x), d, dtype=x.dtype, device=x.device)
        wanted = (samples, self.groups, d, rule.rank)
        if tuple(given.shape) not in (wanted, wanted[1:]):
            raise UserError(f"bases must have the shape {wanted[1:]} or {wanted}, got {tuple(given.shape)}.")
        return given.to(x).expand(wanted).reshape(len(x), d, rule.rank)

    @torch.no_grad()
    def update_bases(self) -> None:
        """D <- normalise(D + eta (mean over the last batch of D_K - D)), for online bases.

        Called by the training loop; without a call since the last update nothing happens. The mean includes every
        process of a distributed run, so all of them call it.
        """
        if self.kind != "online":
            raise UserError(f"update_bases needs online bases, this Ham's are {self.kind}. Set ham.bases=online.")
        if self.last_bases is None:
            return
        mean, self.last_bases = mean_over_processes(self.last_bases), None
        self.bases.copy_(F.normalize(self.bases.lerp(mean.to(self.bases), self.eta), dim=1))

    def extra_repr(self) -> str:
        kind = "" if self.spatial else ", spatial=False"
        return f"{self.channels}, {self.decomposition}, groups={self.groups}{kind}, bases={self.kind}"


def update_bases(module: nn.Module) -> int:
    """Move the stored bases below `module` after an optimiser step: online Hams, and any other module with
    `update_bases()`. Returns how many there are."""
    parts = [part for part in module.modules() if hasattr(part, "update_bases")]
    moving = [part for part in parts if not (isinstance(part, Ham) and part.kind != "online")]
    for part in moving:
        part.update_bases()
    return len(moving)
