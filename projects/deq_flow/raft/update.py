"""The update block of RAFT, GMA and DEQ-Flow: (hidden state, coordinates) -> (hidden state, coordinates).

RAFT arXiv 2003.12039, GMA arXiv 2104.02409, DEQ-Flow arXiv 2204.08442. Everything that does not change between two
applications is computed once per pair of images and passed in: the correlation, the attention over the first image, and
the context's share of the recurrent unit, whose convolutions are linear in their input channels.
"""

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class UpdateBlock(nn.Module):
    """f(h, c): look up the correlation around c, encode it with the flow, update h, move c by the head's output for h.

    lookup    `projects.deq_flow.raft.correlation.AllPairs` or `OnDemand`: called with what its `prepare` gave, and c
    gather    GMA: gathers motion over the image with the attention given; None: RAFT
    all_grad  False: c is a constant inside f, as in RAFT: no gradient flows from one step to the next through the
              coordinates, and derivatives of f (for Newton, implicit gradients, Jacobian penalties) lack that part too
    """

    def __init__(
        self,
        *,
        lookup: Callable,
        lookup_channels: int,
        hidden_channels: int,
        context_channels: int,
        corr_channels: Sequence[int],
        flow_channels: Sequence[int],
        motion_channels: int,
        head_channels: int,
        attention: bool,
        all_grad: bool,
    ):
        super().__init__()
        self.lookup, self.all_grad = lookup, all_grad
        self.motion = MotionEncoder(lookup_channels, corr_channels, flow_channels, motion_channels)
        self.gather = Aggregate(motion_channels) if attention else None
        self.gru = SepConvGRU(hidden_channels, context_channels, motion_channels * (2 if attention else 1))
        self.head = FlowHead(hidden_channels, head_channels)

    def forward(
        self,
        z: tuple[Tensor, Tensor],
        context: tuple[Tensor, Tensor],
        correlation: tuple[Tensor, ...],
        origin: Tensor,
        attention: tuple[Tensor, ...] = (),
    ) -> tuple[Tensor, Tensor]:
        """One application.

        z            (h (B, C, h, w), c (B, 2, h, w)): hidden state, and where each pixel goes, x and y in pixels at 1/8
        context      `self.gru.inject` of the context
        correlation  `self.lookup.prepare` of the features
        origin       (B, 2, h, w) the pixels' own coordinates
        attention    of the context, for `gather`
        """
        h, c = z
        if not self.all_grad:
            c = c.detach()
        motion = self.motion(self.lookup(correlation, c), c - origin)
        if self.gather is not None:
            motion = torch.cat([motion, self.gather(motion, attention)], dim=1)
        h = self.gru(h, motion, context)
        return h, c + self.head(h)


class MotionEncoder(nn.Module):
    """Correlation (B, lookup_channels, h, w) and flow (B, 2, h, w) -> (B, out_channels, h, w); the last two channels
    are the flow itself."""

    def __init__(
        self, lookup_channels: int, corr_channels: Sequence[int], flow_channels: Sequence[int], out_channels: int
    ):
        super().__init__()
        self.corr1 = nn.Conv2d(lookup_channels, corr_channels[0], 1)
        self.corr2 = nn.Conv2d(corr_channels[0], corr_channels[1], 3, padding=1)
        self.flow1 = nn.Conv2d(2, flow_channels[0], 7, padding=3)
        self.flow2 = nn.Conv2d(flow_channels[0], flow_channels[1], 3, padding=1)
        self.merge = nn.Conv2d(corr_channels[1] + flow_channels[1], out_channels - 2, 3, padding=1)

    def forward(self, correlation: Tensor, flow: Tensor) -> Tensor:
        corr = F.relu(self.corr2(F.relu(self.corr1(correlation), inplace=True)), inplace=True)
        moved = F.relu(self.flow2(F.relu(self.flow1(flow), inplace=True)), inplace=True)
        merged = F.relu(self.merge(torch.cat([corr, moved], dim=1)), inplace=True)
        return torch.cat([merged, flow], dim=1)


class SepConvGRU(nn.Module):
    """Two gated updates, along rows with 1x5 and along columns with 5x1 convolutions.

        z = sigmoid(conv[h, x]), r = sigmoid(conv[h, x]), n = tanh(conv[r h, x]);   h <- (1 - z) h + z n

    x = [context, motion]. The three convolutions of a direction are one layer, rows z, r, n of its weight (channels
    h, context, motion of its input): a normalisation by output channel is the same for them together.
    """

    def __init__(self, hidden_channels: int, context_channels: int, motion_channels: int):
        super().__init__()
        width = hidden_channels + context_channels + motion_channels
        self.hidden_channels, self.context_channels = hidden_channels, context_channels
        self.rows = nn.Conv2d(width, 3 * hidden_channels, (1, 5), padding=(0, 2))
        self.columns = nn.Conv2d(width, 3 * hidden_channels, (5, 1), padding=(2, 0))

    def inject(self, context: Tensor) -> tuple[Tensor, Tensor]:
        """The context's share (B, Q, h, w) -> (B, 3 C, h, w) of both directions, biases included."""
        start, end = self.hidden_channels, self.hidden_channels + self.context_channels
        return tuple(
            F.conv2d(context, layer.weight[:, start:end], layer.bias, padding=layer.padding)
            for layer in (self.rows, self.columns)
        )

    def forward(self, h: Tensor, motion: Tensor, context: tuple[Tensor, Tensor]) -> Tensor:
        for layer, injected in zip((self.rows, self.columns), context, strict=True):
            h = self._update(layer, h, motion, injected)
        return h

    def _update(self, layer: nn.Conv2d, h: Tensor, motion: Tensor, injected: Tensor) -> Tensor:
        width = self.hidden_channels
        weight, padding = layer.weight, layer.padding
        hidden, moving = weight[:, :width], weight[:, width + self.context_channels :]
        x = F.conv2d(motion, moving, padding=padding) + injected
        gates = torch.sigmoid(x[:, : 2 * width] + F.conv2d(h, hidden[: 2 * width], padding=padding))
        z, r = gates.chunk(2, dim=1)
        n = torch.tanh(x[:, 2 * width :] + F.conv2d(r * h, hidden[2 * width :], padding=padding))
        return h + z * (n - h)


class FlowHead(nn.Module):
    """Hidden state (B, C, h, w) -> movement of the coordinates (B, 2, h, w), pixels at 1/8."""

    def __init__(self, hidden_channels: int, width: int):
        super().__init__()
        self.conv1 = nn.Conv2d(hidden_channels, width, 3, padding=1)
        self.conv2 = nn.Conv2d(width, 2, 3, padding=1)

    def forward(self, h: Tensor) -> Tensor:
        return self.conv2(F.relu(self.conv1(h), inplace=True))


class Attention(nn.Module):
    """GMA's attention of each pixel of the context over all others, one head of the context's width.

    whole  True: `prepare` gives the (B, T, T) weights; False: queries and keys, and `Aggregate` forms rows of the
           weights as it goes, in memory linear in T where the device has such a kernel
    """

    def __init__(self, channels: int, whole: bool = True):
        super().__init__()
        self.whole = whole
        self.query_key = nn.Conv2d(channels, 2 * channels, 1, bias=False)

    def forward(self, context: Tensor) -> tuple[Tensor, ...]:
        """(B, Q, h, w) -> what `Aggregate` takes."""
        query, key = self.query_key(context).flatten(2).transpose(1, 2).chunk(2, dim=2)
        query = query * query.shape[2] ** -0.5
        return (torch.softmax(query @ key.transpose(1, 2), dim=2),) if self.whole else (query, key)


class Aggregate(nn.Module):
    """m + scale x attention over m, with a learnt scale that starts at zero (GMA, equation 5)."""

    def __init__(self, channels: int):
        super().__init__()
        self.value = nn.Conv2d(channels, channels, 1, bias=False)
        self.scale = nn.Parameter(torch.zeros(1))

    def forward(self, motion: Tensor, attention: tuple[Tensor, ...]) -> Tensor:
        """motion (B, M, h, w), what `Attention` gave -> (B, M, h, w)."""
        value = self.value(motion).flatten(2)
        if len(attention) == 1:
            found = value @ attention[0].transpose(1, 2)
        else:
            found = F.scaled_dot_product_attention(*attention, value.transpose(1, 2), scale=1.0).transpose(1, 2)
        return motion + self.scale * found.unflatten(2, motion.shape[2:])
