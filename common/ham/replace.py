"""Hams in timm networks: in place of the self-attention of a transformer, or behind stages of a convolutional network.

vit = with_ham(timm.create_model("vit_small_patch16_224"), ham=NMF(rank=32))
resnet = with_ham(timm.create_model("resnet50", pretrained=True), at=["layer3"])
"""

from collections.abc import Sequence
from dataclasses import replace

import torch.nn.functional as F
from torch import Tensor, nn

from common.errors import UserError, nearest
from common.ham.burger import Hamburger
from common.ham.decompose import NMF, Decomposition
from common.ham.ham import Ham


class TokenHam(nn.Module):
    """Tokens (B, N, dim) -> (B, N, dim_out): linear (and a ReLU for NMF), ham over the N tokens, linear.

    Prefix tokens are tokens like any other. channels: of the ham; None: dim. The rest as in common.ham.ham.Ham.
    """

    def __init__(
        self,
        dim: int,
        channels: int | None = None,
        *,
        dim_out: int | None = None,
        ham: Decomposition | None = None,
        groups: int = 1,
        eval_seed: int | None = None,
    ):
        super().__init__()
        ham = NMF() if ham is None else ham
        self.rectify = ham.nonnegative
        if self.rectify:
            ham = replace(ham, negative="trust")
        channels = dim if channels is None else channels
        self.lower = nn.Linear(dim, channels)
        self.ham = Ham(channels, ham, groups=groups, eval_seed=eval_seed)
        self.upper = nn.Linear(channels, dim if dim_out is None else dim_out)

    def forward(self, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False) -> Tensor:
        """The last two are in timm's call; a ham has no mask."""
        if attn_mask is not None or is_causal:
            raise UserError("A ham mixes all tokens and takes no mask. Keep the attention where one is needed.")
        x = self.lower(x)
        x = F.relu_(x) if self.rectify else x
        return self.upper(self.ham(x.transpose(1, 2)).transpose(1, 2))


def with_ham(
    model: nn.Module,
    *,
    at: str | Sequence[str] = "attention",
    ham: Decomposition | None = None,
    channels: int | None = None,
    groups: int = 1,
    version: str = "v1",
    norm: str = "bn",
    eval_seed: int | None = None,
) -> nn.Module:
    """The same network, changed in place, with hams; usable as a `_target_` around `timm.create_model`.

    at             attention: every self-attention of timm (class Attention) becomes a `TokenHam`. Or names of modules:
                   an attention is replaced, any stage listed in the network's feature_info gets a Hamburger behind it
    ham            decomposition; None: NMF()
    channels       of the ham; None: as many as the tokens or the stage have
    version, norm  of a Hamburger
    Raises UserError when there is nothing at such a place.
    """
    modules = dict(model.named_modules())
    attentions = [name for name, module in modules.items() if _is_attention(module)]
    stages = {entry["module"]: entry["num_chs"] for entry in _features(model)}
    names = attentions if at == "attention" else [at] if isinstance(at, str) else list(at)
    if not names:
        raise UserError(f"{type(model).__name__} has no self-attention. Set at to stages of it: {', '.join(stages)}.")
    for name in names:
        if name in attentions:
            old = modules[name]
            new = TokenHam(
                old.qkv.in_features, channels, dim_out=old.proj.out_features, ham=ham, groups=groups,
                eval_seed=eval_seed,
            )  # fmt: skip
        elif name in stages and name in modules:
            burger = Hamburger(
                stages[name], channels or stages[name], version=version, ham=ham, groups=groups, norm=norm,
                eval_seed=eval_seed,
            )  # fmt: skip
            new = nn.Sequential(modules[name], burger)
        else:
            places = [*stages, *attentions]
            raise UserError(
                f"{type(model).__name__} has no place '{name}' for a ham. {nearest(name, places)}Places: "
                f"{', '.join(places[:12]) or 'none'}."
            )
        parent, _, child = name.rpartition(".")
        setattr(modules[parent], child, new)
    return model


def _is_attention(module: nn.Module) -> bool:
    return type(module).__name__ == "Attention" and all(
        isinstance(getattr(module, part, None), nn.Linear) for part in ("qkv", "proj")
    )


def _features(model: nn.Module) -> list[dict]:
    found = getattr(model, "feature_info", None) or []
    return [entry for entry in found if isinstance(entry, dict) and "num_chs" in entry and "module" in entry]
