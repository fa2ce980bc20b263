"""Variational dropout: one mask per sample for the whole solve, so that the map does not change between solver steps.

A mask is drawn at the first use after `reset` (common.deq.layers.reset), from torch's global generator, on the device
and in the data type of the input. Every solver step and gradient step then uses it. Gal and Ghahramani
(arXiv 1512.05287); in equilibrium models Bai et al. (arXiv 1909.01377).

A solver that takes converged samples out of the batch must take their rows of the mask, too. For that, draw the mask
before the solve and pass it in `args`, from which the solver selects the rows of the samples that are left:

    mask = self.drop.mask_for(z0)
    deq(lambda z, x, mask: self.cell(z, x, mask), z0, args=(x, mask))     # inside the cell: self.drop(h, mask)
"""

import torch
from torch import Tensor, nn

from common.errors import UserError


class VariationalMask(nn.Module):
    """Base class of all dropout layers below: multiplies by a mask that is kept until `reset`.

    dropout   probability of a zero, 0 to 1; the other entries are divided by 1 - dropout
    In evaluation mode, or with dropout=0, the layer is the identity.
    """

    def __init__(self, dropout: float):
        super().__init__()
        if not 0 <= dropout <= 1:
            raise UserError(
                f"dropout must be between 0 and 1, got {dropout}. Set dropout to a probability such as 0.1."
            )
        self.dropout = dropout
        # Not a buffer: a mask is valid in one process for one step. It must not be saved or sent to other processes.
        self.mask: Tensor | None = None

    def mask_shape(self, x: Tensor) -> tuple[int, ...]:
        """Shape of the mask for an input x (B, ...): B rows, and size 1 on each axis that shares one decision."""
        raise NotImplementedError

    def mask_for(self, x: Tensor) -> Tensor:
        """A new mask for x of shape mask_shape(x): entries 0 or 1/(1 - dropout); ones if the layer is the identity.

        Only shape, device, dtype and memory layout of x are used. The layer does not keep this mask.
        """
        shape = self.mask_shape(x)
        if not self.training or self.dropout == 0:
            return x.new_ones(shape)
        keep = 1 - self.dropout
        mask = torch.empty(shape, device=x.device, dtype=x.dtype).bernoulli_(keep)
        if keep:
            mask = mask / keep
        if x.ndim == 4 and x.is_contiguous(memory_format=torch.channels_last) and not x.is_contiguous():
            mask = mask.contiguous(memory_format=torch.channels_last)
        return mask

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """x times the mask, same shape.

        x     (B, ...), the axes as described by the class
        mask  mask_for(x) with the same rows selected as in x. None: the kept mask, drawn now if there is none
        Raises UserError when the mask has another number of rows than x.
        """
        if not self.training or self.dropout == 0:
            return x
        kept = mask is None
        if mask is None:
            if self.mask is None:
                self.reset_mask(x)
            mask = self.mask
        assert mask is not None
        if mask.shape[0] != x.shape[0]:
            self._refuse(x, mask, kept)
        return x * mask.to(device=x.device, dtype=x.dtype)

    def reset_mask(self, x: Tensor) -> None:
        """Keep a fresh mask for x until the next reset (TorchDEQ's name)."""
        self.mask = _plain(self.mask_for(x))

    def reset(self) -> None:
        """Discard the kept mask. The next use draws a new one."""
        self.mask = None

    def _refuse(self, x: Tensor, mask: Tensor, kept: bool) -> None:
        have = f"holds {mask.shape[0]} samples but its input holds {x.shape[0]}"
        if not kept:
            raise UserError(f"the mask given to dropout {have}. Select the same rows of both, or pass it in args.")
        if mask.shape[0] > x.shape[0]:
            raise UserError(
                f"the kept dropout mask {have}, probably because the solver took converged samples out of the batch. "
                "Draw mask = drop.mask_for(z0) before the solve, pass it in args and call drop(x, mask) in the cell."
            )
        raise UserError(f"the kept dropout mask {have}. Call common.deq.layers.reset(net) before each forward pass.")

    def extra_repr(self) -> str:
        return f"dropout={self.dropout}"


def _plain(mask: Tensor) -> Tensor:
    """The plain tensor inside a mask that was drawn under jvp or grad of torch.func, so that it can be kept."""
    while not torch.compiler.is_compiling() and torch._C._functorch.is_gradtrackingtensor(mask):
        mask = torch._C._functorch.get_unwrapped(mask)
    return mask


class VariationalDropout(VariationalMask):
    """Drops single entries of x (B, ...) of any shape, each independently."""

    def __init__(self, dropout: float = 0.5):
        super().__init__(dropout)

    def mask_shape(self, x: Tensor) -> tuple[int, ...]:
        return tuple(x.shape)


class _ChannelOrTokenDropout(VariationalMask):
    """Base class of channel and token dropout: x has a batch axis, `token_axes` axes of tokens and one of channels.

    token_first   True: (B, tokens..., channels); False: (B, channels, tokens...)
    """

    token_axes: int
    drops_channels: bool  # True: one decision per channel, for all tokens; False: one per token, for all channels

    def __init__(self, dropout: float = 0.5, token_first: bool = True):
        super().__init__(dropout)
        self.token_first = token_first

    def mask_shape(self, x: Tensor) -> tuple[int, ...]:
        if x.ndim != self.token_axes + 2:
            raise UserError(
                f"{type(self).__name__} takes {self.token_axes + 2} axes (batch, channels and {self.token_axes} of "
                f"tokens), got shape {tuple(x.shape)}. Use the class whose number is the number of token axes."
            )
        batch, *rest = x.shape
        channel = self.token_axes if self.token_first else 0
        return batch, *(size if (axis == channel) == self.drops_channels else 1 for axis, size in enumerate(rest))

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, token_first={self.token_first}"


class VariationalDropout1d(_ChannelOrTokenDropout):
    """Drops whole channels of x (B, L, D), or (B, D, L) with token_first=False."""

    token_axes, drops_channels = 1, True


class VariationalDropout2d(_ChannelOrTokenDropout):
    """Drops whole channels of x (B, H, W, D), or (B, D, H, W) with token_first=False."""

    token_axes, drops_channels = 2, True


class VariationalDropout3d(_ChannelOrTokenDropout):
    """Drops whole channels of x (B, T, H, W, D), or (B, D, T, H, W) with token_first=False."""

    token_axes, drops_channels = 3, True


class VariationalDropToken1d(_ChannelOrTokenDropout):
    """Drops whole tokens of x (B, L, D), or (B, D, L) with token_first=False."""

    token_axes, drops_channels = 1, False


class VariationalDropToken2d(_ChannelOrTokenDropout):
    """Drops whole tokens of x (B, H, W, D), or (B, D, H, W) with token_first=False."""

    token_axes, drops_channels = 2, False


class VariationalDropToken3d(_ChannelOrTokenDropout):
    """Drops whole tokens of x (B, T, H, W, D), or (B, D, T, H, W) with token_first=False."""

    token_axes, drops_channels = 3, False
