"""Hamburger: a matrix decomposition (ham) between two 1x1 convolutions (bread), added to its input."""

import math
from collections import OrderedDict
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from common import limits
from common.errors import UserError
from common.ham.decompose import NMF, Decomposition
from common.ham.ham import Ham

VERSIONS = ("v1", "v2", "v2plus")
NORMS = ("bn", "gn", "syncbn", "none")


class Hamburger(nn.Module):
    """(B, in_channels, H, W) -> the same shape. With l the lower bread (and a ReLU for NMF) and u the upper one:

        v1      relu(z + norm(u(ham(l(z)))))
        v2      relu(z + u(cheese(ham(l(z))))),   cheese: 1x1 convolution, norm, ReLU
        v2plus  relu(b z + a u(cheese(ham(l(z))))) with learned scalars b = 1 and a = 0 at the start

    in_channels    of z
    channels       of the ham's input (the paper's S times D); twice as many leave the lower bread with `dual`
    version        v1 (released light models), v2 (published HamNet), v2plus
    ham            decomposition: NMF, VQ or CD; None: NMF(). The ReLU before NMF is part of the block
    groups, spatial, bases, pixels, eta, eval_seed    as in common.ham.ham.Ham
    dual           v2plus: a spatial ham on half of the channels, a channel ham on the other half
    cheese_factor  v2plus: the cheese reduces its channels by this factor
    zero_ham       v2plus: a = 0 at the start, else 1
    norm           bn, syncbn, gn or none
    norm_momentum  of bn and syncbn; the published HamNet has 3e-4
    norm_groups    of gn

    Parameters with in_channels = channels = 512: v1 525,824, v2 787,968, v2plus 787,970.
    arXiv 2109.04553, section 3; versions as in the released code.
    """

    def __init__(
        self,
        in_channels: int,
        channels: int = 512,
        *,
        version: str = "v2",
        ham: Decomposition | None = None,
        groups: int = 1,
        spatial: bool = True,
        bases: str = "random",
        pixels: int | None = None,
        eta: float = 0.9,
        eval_seed: int | None = None,
        dual: bool = False,
        cheese_factor: int = 1,
        zero_ham: bool = True,
        norm: str = "bn",
        norm_momentum: float = 0.1,
        norm_groups: int = 32,
    ):
        super().__init__()
        _check(version, dual, cheese_factor, channels)
        ham = NMF() if ham is None else ham
        self.rectify = ham.nonnegative
        if self.rectify:
            ham = replace(ham, negative="trust")  # its input comes from a ReLU
        self.version, self.dual = version, dual
        wide = 2 * channels if dual else channels
        made = lambda spatial: Ham(
            channels, ham, groups=groups, spatial=spatial, bases=bases, pixels=pixels, eta=eta, eval_seed=eval_seed
        )
        normed = lambda size: _norm(norm, size, norm_momentum, norm_groups)
        self.lower = _conv(in_channels, wide, bias=True)
        self.ham = made(spatial or dual)
        self.ham_channel = made(False) if dual else None
        self.cheese = self.norm = None
        if version == "v1":
            self.norm = normed(in_channels)
        else:
            inner = channels // cheese_factor
            self.cheese = nn.Sequential(
                OrderedDict(conv=_conv(wide, inner), norm=normed(inner), act=nn.ReLU(inplace=True))
            )
            wide = inner
        self.upper = _conv(wide, in_channels)
        if version == "v2plus":
            self.coef_shortcut = nn.Parameter(torch.ones(1))
            self.coef_ham = nn.Parameter(torch.zeros(1) if zero_ham else torch.ones(1))

    def forward(self, z: Tensor) -> Tensor:
        x = self.lower(z)
        x = F.relu_(x) if self.rectify else x
        if self.dual:
            near, far = x.chunk(2, dim=1)
            x = torch.cat([self.ham(near), self.ham_channel(far)], dim=1)
        else:
            x = self.ham(x)
        x = x if self.cheese is None else self.cheese(x)
        x = self.upper(x)
        if self.version == "v2plus":
            return F.relu_(self.coef_ham * x + self.coef_shortcut * z)
        x = x if self.norm is None else self.norm(x)
        return F.relu(x + z, inplace=True)


def _check(version: str, dual: bool, cheese_factor: int, channels: int) -> None:
    limits.choice("hamburger.version", version, VERSIONS)
    if version != "v2plus" and dual:
        raise UserError(f"hamburger.dual exists in v2plus alone, the version is {version}. Set version=v2plus.")
    if version != "v2plus" and cheese_factor != 1:
        raise UserError(f"hamburger.cheese_factor exists in v2plus alone, the version is {version}. Set it to 1.")
    limits.whole("hamburger.cheese_factor", cheese_factor, least=1)
    limits.multiple_of("hamburger.channels", channels, cheese_factor, "cheese_factor", hint="Set it to a divisor.")


def _conv(inside: int, outside: int, bias: bool = False) -> nn.Conv2d:
    """1x1 convolution with normal weights of variance 2 / outputs, as in the released code."""
    conv = nn.Conv2d(inside, outside, 1, bias=bias)
    nn.init.normal_(conv.weight, std=math.sqrt(2 / outside))
    return conv


def _norm(kind: str, channels: int, momentum: float, groups: int) -> nn.Module | None:
    limits.choice("hamburger.norm", kind, NORMS)
    if kind == "gn":
        limits.multiple_of("hamburger.channels", channels, groups, "norm_groups", hint="Set them to a divisor.")
        return nn.GroupNorm(groups, channels)
    if kind == "none":
        return nn.Identity()
    return (nn.BatchNorm2d if kind == "bn" else nn.SyncBatchNorm)(channels, momentum=momentum)
