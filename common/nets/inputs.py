"""What every raw network checks before it computes: one clear sentence instead of a shape error deep inside."""

from collections.abc import Sequence

import torch
from torch import Tensor

from common import limits
from common.errors import UserError


def check_inputs(
    net, x: Tensor, noise_labels: Tensor, class_labels: Tensor | None, augment_labels: Tensor | None
) -> Tensor | None:
    """Class labels ready to use: (B or 1, label_dim), zeros when none are given, None for an unconditional network.

    net             has img_resolution, in_channels, label_dim, augment_dim
    x               (B, in_channels, img_resolution, img_resolution)
    noise_labels    (B,) or (1,); (B, num_times) or (1, num_times) for a net with num_times above 1
    class_labels    one-hot (B or 1, label_dim) or None
    augment_labels  (B or 1, augment_dim) or None
    Raises UserError when a shape does not fit.
    """
    want = (net.in_channels, net.img_resolution, net.img_resolution)
    if x.ndim != 4 or tuple(x.shape[1:]) != want:
        raise UserError(
            f"this network takes images of shape (batch, {want[0]}, {want[1]}, {want[2]}), got {tuple(x.shape)}. "
            "Set img_resolution and the channel count of the network to those of the data."
        )
    batch = x.shape[0]
    num_times = getattr(net, "num_times", 1)
    each = (num_times,) if num_times > 1 else ()
    if noise_labels.ndim == 0 or noise_labels.shape[0] not in (1, batch) or noise_labels.shape[1:] != each:
        want = " or ".join(str((rows, *each)) for rows in (batch, 1))
        raise UserError(f"noise_labels must have shape {want}, got {tuple(noise_labels.shape)}.")
    _check_labels("class_labels", "label_dim", class_labels, net.label_dim, batch)
    _check_labels("augment_labels", "augment_dim", augment_labels, net.augment_dim, batch)
    if not net.label_dim:
        return None
    return torch.zeros(1, net.label_dim, device=x.device) if class_labels is None else class_labels


def _check_labels(name: str, field: str, labels: Tensor | None, dim: int, batch: int) -> None:
    if labels is None:
        return
    if labels.ndim != 2 or labels.shape[1] != dim or labels.shape[0] not in (1, batch):
        raise UserError(
            f"{name} must have shape ({batch}, {dim}) because the network has {field}={dim}, "
            f"got {tuple(labels.shape)}. Set {field} of the network to the width of the labels."
        )


def check_label_dims(**fields: int) -> None:
    """UserError unless every field is an integer of at least 0 (0 = no such labels)."""
    for name, value in fields.items():
        limits.whole(name, value, hint=f"Set {name}=0 for no labels.")


def check_pyramid(img_resolution: int, channel_mult: Sequence[int], attn_resolutions: Sequence[int]) -> None:
    """UserError unless the image halves evenly once per level and attention is asked for where a level exists.

    Attention resolutions above the image size are ignored, as in the original, so that defaults fit small images.
    """
    if not channel_mult:
        raise UserError("channel_mult must name at least one level, got []. Set channel_mult to e.g. [1, 2, 2].")
    limits.positive(**{f"channel_mult[{level}]": mult for level, mult in enumerate(channel_mult)})
    limits.multiple_of(
        "img_resolution", img_resolution, 2 ** (len(channel_mult) - 1), f"channel_mult has {len(channel_mult)} levels",
        hint="Resize the images or shorten channel_mult.",
    )  # fmt: skip
    levels = [img_resolution >> level for level in range(len(channel_mult))]
    for res in attn_resolutions:
        if res <= img_resolution and res not in levels:
            raise UserError(
                f"attn_resolutions names {res}, but this network works at {levels}. Choose attention among those."
            )


def attention_heads(channels: int, channels_per_head: int) -> int:
    """channels / channels_per_head. Raises UserError unless that is a whole number of at least 1."""
    if channels < channels_per_head or channels % channels_per_head:
        raise UserError(
            f"attention over {channels} channels cannot be cut into heads of {channels_per_head}. "
            f"Set model_channels so that every attention level has a multiple of {channels_per_head} channels."
        )
    return channels // channels_per_head
