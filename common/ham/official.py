"""Weights of released Hamburger blocks under our names (Gsunshine/Enjoy-Hamburger: HamNet, mmseg head, Light-Ham)."""

import re
from collections.abc import Mapping

from torch import Tensor

from common.errors import UserError

NORM = r"(weight|bias|running_mean|running_var|num_batches_tracked)"
# Pattern of a released name -> ours. `lower_bread` is a Sequential before NMF (with its ReLU), a convolution elsewhere.
HAMNET = (
    (r"lower_bread\.(?:0\.)?(weight|bias)", r"lower.\1"),
    (r"cheese\.conv\.weight", r"cheese.conv.weight"),
    (rf"cheese\.bn\.{NORM}", r"cheese.norm.\1"),
    (r"upper_bread\.(?:0\.)?weight", r"upper.weight"),  # a Sequential with its norm in V1
    (rf"upper_bread\.1\.{NORM}", r"norm.\1"),
    (r"(coef_shortcut|coef_ham)", r"\1"),
    (r"ham(?:_1)?\.bases", r"ham.bases"),
    (r"ham_2\.bases", r"ham_channel.bases"),
)
MMSEG = (
    (r"ham_in\.conv\.(weight|bias)", r"lower.\1"),
    (r"ham_out\.conv\.weight", r"upper.weight"),
    (rf"ham_out\.(?:gn|bn|norm)\.{NORM}", r"norm.\1"),
)


def from_official(state: Mapping[str, Tensor], prefix: str = "") -> dict[str, Tensor]:
    """State dict for `Hamburger` from a released one: V1, V2, V2+ of HamNet, or the block of the mmseg heads (a v1).

    prefix  only names that start with it are read, without it: "hamburger." or "decode_head.hamburger." (Light-Ham).
            Names of other modules below the prefix, such as the `squeeze` of the mmseg head, are an error

    Bases of RAND_INIT=False go to a Ham with bases=online. Raises UserError for a name without counterpart.
    """
    found = {}
    for name, value in state.items():
        if not name.startswith(prefix):
            continue
        found[_ours(name[len(prefix) :], name)] = value
    if not found:
        raise UserError(f"No weight of the checkpoint begins with '{prefix}'. Names begin with: {_first(state)}.")
    return found


def block_tree(state: Mapping[str, Tensor], decomposition: str = "NMF", **options) -> dict:
    """`_target_` tree of the `Hamburger` that a state dict of `from_official` belongs to.

    decomposition  NMF, VQ or CD, which weights do not show (nor their rank, unless bases are stored)
    options        further arguments of `Hamburger`, or of the decomposition: rank, steps, eval_steps, inv_t
    Version, sizes and norm are read from the tensors. Raises UserError for tensors that make no whole block.
    """
    for name in ("lower.weight", "upper.weight"):
        if name not in state:
            raise UserError(
                f"the file holds no {name}, so it is no whole Hamburger. Set the prefix to that of the block."
            )
    wide, in_channels = state["lower.weight"].shape[:2]
    version = "v2plus" if "coef_ham" in state else "v2" if "cheese.conv.weight" in state else "v1"
    dual = bool(options.pop("dual", "ham_channel.bases" in state))
    channels = wide // 2 if dual else wide
    norm = "norm" if version == "v1" else "cheese.norm"
    tree = {
        "_target_": "common.ham.burger.Hamburger", "in_channels": in_channels, "channels": channels,
        "version": version, "dual": dual,
        "norm": "bn" if f"{norm}.running_mean" in state else "gn" if f"{norm}.weight" in state else "none",
    }  # fmt: skip
    if version == "v2plus":
        tree["cheese_factor"] = channels // state["cheese.conv.weight"].shape[0]
    inner = {key: options.pop(key) for key in ("rank", "steps", "eval_steps", "inv_t") if key in options}
    if "ham.bases" in state:
        tree |= {"bases": "online", "groups": len(state["ham.bases"])}
        inner.setdefault("rank", state["ham.bases"].shape[-1])
    tree["ham"] = {"_target_": f"common.ham.decompose.{decomposition}", **inner}
    return tree | options


def _ours(name: str, full: str) -> str:
    for pattern, ours in (*HAMNET, *MMSEG):
        if match := re.fullmatch(pattern, name):
            return match.expand(ours)
    raise UserError(
        f"'{full}' belongs to no released Hamburger block. Set prefix to the block's own, or drop the name."
    )


def _first(state: Mapping[str, Tensor]) -> str:
    return ", ".join(sorted({name.split(".")[0] for name in state})[:8]) or "nothing"
