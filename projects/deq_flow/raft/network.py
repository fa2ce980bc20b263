"""Optical flow as an equilibrium: DEQ-Flow (Bai et al., arXiv 2204.08442), and RAFT as its unrolled baseline.

encoders -> correlation and context;  (h*, c*) = f(h*, c*);  flow = upsampled c* - c_0. The sizes and details are those
of the authors' second version and of TorchDEQ's zoo; the first one differs in the width of one flow head.
"""

from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from common import limits
from common.deq.layer import DEQ
from common.deq.layers import reset
from common.errors import UserError
from projects.deq_flow.raft.correlation import AllPairs, OnDemand
from projects.deq_flow.raft.encoder import Encoder
from projects.deq_flow.raft.update import Attention, UpdateBlock
from projects.deq_flow.raft.upsample import FACTOR, MaskHead, convex_upsample, forward_interpolate

LOOKUPS = {"dense": AllPairs, "on_demand": OnDemand}
STARTS = ("zero", "tanh_context")

FlowState = tuple[Tensor, Tensor]  # (h (B, C, h, w), c (B, 2, h, w)): hidden state, and where each pixel goes


class FlowEquilibrium(nn.Module):
    """Two images (B, 3, H, W) in [-1, 1] -> flow (B, 2, H, W): u, v in pixels from the first to the second.

    deq               equilibrium layer: solver, gradient rule, states trained on. With the rule `Backprop` and every
                      step a state this is RAFT, unrolled
    feature_channels  D of the correlated features
    hidden_channels   C of the hidden state and of the context
    corr_channels     widths of the motion encoder's two convolutions of the correlation
    flow_channels     and of the flow
    motion_channels   of its output, flow included
    head_channels     width of the flow head: 2 motion_channels; the authors' first version has at most 256
    encoder_channels  of both encoders at 1/2, 1/4, 1/8
    attention         GMA: motion gathered by attention over the context
    lookup            "dense": the correlation volume is kept; "on_demand": memory linear in the number of pixels
    levels, radius    of the correlation pyramid and its windows
    all_grad          gradients flow through the coordinates into the lookup; see `UpdateBlock`
    hidden_init       "zero": h starts at zero, all of the context is injected; "tanh_context": as RAFT, the context
                      encoder has C channels more, whose tanh is the first h
    norm              applied to the update block once: `common.deq.layers.apply_norm` with its options, or None

    A gradient rule with `recompute` keeps neither the activations of its steps nor those of the upsampling: in the
    backward pass they exist for one state at a time.

    H and W must be multiples of 8, and of at least 2^(levels + 2) pixels. Everything is per sample but batch norms.

    state  (h, c) of the last call, detached: `start` of the next one; no part of a copy or a checkpoint
    cell   f on (h, c), what `speed.compile` compiles
    Raises UserError for sizes that do not fit.
    """

    def __init__(
        self,
        *,
        deq: DEQ,
        feature_channels: int = 256,
        hidden_channels: int = 128,
        corr_channels: Sequence[int] = (256, 192),
        flow_channels: Sequence[int] = (128, 64),
        motion_channels: int = 128,
        head_channels: int = 256,
        encoder_channels: Sequence[int] = (64, 96, 128),
        attention: bool = False,
        lookup: str = "dense",
        levels: int = 4,
        radius: int = 4,
        all_grad: bool = False,
        hidden_init: str = "zero",
        norm: Callable[[nn.Module], object] | None = None,
    ):
        super().__init__()
        limits.choice("lookup", lookup, tuple(LOOKUPS))
        limits.choice("hidden_init", hidden_init, STARTS)
        _check_sizes(
            levels=levels, radius=radius, feature_channels=feature_channels, hidden_channels=hidden_channels,
            head_channels=head_channels, corr_channels=(2, corr_channels), flow_channels=(2, flow_channels),
            encoder_channels=(3, encoder_channels),
        )  # fmt: skip
        limits.whole("motion_channels", motion_channels, least=3, hint="Two of them are the flow. Set 128.")
        self.hidden_channels, self.hidden_init = hidden_channels, hidden_init
        correlation = LOOKUPS[lookup](levels, radius)
        context = hidden_channels * (1 if hidden_init == "zero" else 2)
        self.features = Encoder(feature_channels, norm="instance", channels=encoder_channels)
        self.context = Encoder(context, norm="batch", channels=encoder_channels)
        self.attention = Attention(hidden_channels, whole=lookup == "dense") if attention else None
        self.cell = UpdateBlock(
            lookup=correlation,
            lookup_channels=levels * (2 * radius + 1) ** 2,
            hidden_channels=hidden_channels,
            context_channels=hidden_channels,
            corr_channels=corr_channels,
            flow_channels=flow_channels,
            motion_channels=motion_channels,
            head_channels=head_channels,
            attention=attention,
            all_grad=all_grad,
        )
        self.mask = MaskHead(hidden_channels)
        if norm is not None:
            norm(self.cell)
        self.deq = deq
        self.batch_norm_frozen = False
        self.state: FlowState | None = None

    def outputs(self, first: Tensor, second: Tensor, start: FlowState | None = None) -> list[Tensor]:
        """Flows (B, 2, H, W) of each state the layer gives: several in training, one in evaluation.

        start  (h, c) to begin at, such as `state` of the pair before or `carried` of it; None: no motion
        """
        self._check(first, second)
        batch, _, height, width = first.shape
        exact = torch.promote_types(first.dtype, torch.float32)  # half precision has too few digits for coordinates
        origin = grid(batch, height // FACTOR, width // FACTOR, dtype=exact, device=first.device)
        one, two = self.features(torch.cat([first, second])).chunk(2)
        correlation = self.cell.lookup.prepare(one, two)
        h, context = self._context(first, exact)
        attention = () if self.attention is None else self.attention(context)
        reset(self.cell)
        args = (self.cell.gru.inject(context), correlation, origin, attention)
        states = self.deq(self.cell, (h, origin) if start is None else self._started(start, h), args)
        self.state = tuple(part.detach() for part in states[-1])
        decode = self._decode
        if torch.is_grad_enabled() and getattr(self.deq.grad, "recompute", False):
            decode = partial(checkpoint, decode, use_reentrant=False)
        return [decode(h, c - origin) for h, c in states]

    def _decode(self, h: Tensor, flow: Tensor) -> Tensor:
        return convex_upsample(flow, self.mask(h))

    def forward(self, first: Tensor, second: Tensor, start: FlowState | None = None) -> Tensor:
        return self.outputs(first, second, start)[-1]

    def carried(self) -> FlowState:
        """`state` for the next pair of a video, its flow carried along itself (`forward_interpolate`)."""
        if self.state is None:
            raise UserError("there is no state to carry on before the first call. Pass start=None for the first pair.")
        h, c = self.state
        origin = grid(len(c), *c.shape[2:], dtype=c.dtype, device=c.device)
        return h, origin + forward_interpolate(c - origin)

    def freeze_batch_norm(self, frozen: bool = True) -> None:
        """Batch normalisation by its running statistics in training too, until called with False: every stage after
        the first."""
        self.batch_norm_frozen = frozen
        self.train(self.training)

    def train(self, mode: bool = True):
        super().train(mode)
        for module in self.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.train(mode and not self.batch_norm_frozen)
        return self

    def __getstate__(self) -> dict:
        return {**super().__getstate__(), "state": None}

    def _context(self, image: Tensor, exact: torch.dtype) -> FlowState:
        """(first hidden state, injected context)."""
        context = self.context(image)
        if self.hidden_init == "zero":
            h = torch.zeros_like(context, dtype=exact)
        else:
            h, context = context.split(self.hidden_channels, dim=1)
            h = torch.tanh(h).to(exact)
        return h, torch.relu(context)

    def _started(self, start: FlowState, h: Tensor) -> FlowState:
        hidden, c = start
        want = (len(h), 2, *h.shape[2:])
        if hidden.shape != h.shape or tuple(c.shape) != want:
            raise UserError(
                f"start must be (h, c) of shapes {tuple(h.shape)} and {want} for these images, got "
                f"{tuple(hidden.shape)} and {tuple(c.shape)}. Start at None when the size changes."
            )
        return hidden.to(h), c.to(h)

    @property
    def least(self) -> int:
        """Shortest side of an image in pixels: the last level of the pyramid then has one cell."""
        return FACTOR * 2 ** (self.cell.lookup.levels - 1)

    def _check(self, first: Tensor, second: Tensor) -> None:
        if first.ndim != 4 or first.shape[1] != 3 or first.shape != second.shape:
            raise UserError(
                "this network takes two images of one shape (batch, 3, H, W), got "
                f"{tuple(first.shape)} and {tuple(second.shape)}. Resize or crop one of them."
            )
        if first.shape[2] % FACTOR or first.shape[3] % FACTOR or min(first.shape[2:]) < self.least:
            raise UserError(
                f"the height and width of the images must be multiples of {FACTOR} of at least {self.least}, got "
                f"{first.shape[2]} x {first.shape[3]}. Pad the images, or set fewer levels."
            )


def grid(
    batch: int, height: int, width: int, *, dtype: torch.dtype = torch.float32, device: torch.device | None = None
) -> Tensor:
    """(B, 2, height, width): x and y of each pixel."""
    y, x = (torch.arange(size, dtype=dtype, device=device) for size in (height, width))
    return torch.stack(torch.meshgrid(x, y, indexing="xy")).expand(batch, 2, height, width)


def _check_sizes(**fields: int | tuple[int, Sequence[int]]) -> None:
    single = {name: value for name, value in fields.items() if not isinstance(value, tuple)}
    limits.positive(**single)
    for name, value in fields.items():
        if name in single:
            continue
        count, widths = value
        if len(widths) != count:
            raise UserError(f"{name} must hold {count} widths, got {list(widths)}. Set {count} whole numbers.")
        limits.positive(**{f"{name}[{i}]": width for i, width in enumerate(widths)})
