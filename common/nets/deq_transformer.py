"""The DEQ transformer: a causal language model whose body is the fixed point of a few weight-tied transformer blocks.

Deep Equilibrium Models (arXiv 1909.01377) on Transformer-XL (arXiv 1901.02860), in the 3-block form of TorchDEQ's zoo
(arXiv 2310.18605, deq-lm) and the one-block PostLN form of the original (deq-seq there).
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import linear, pad, relu

from common import limits
from common.deq.dropout import VariationalDropout, VariationalDropout1d, VariationalDropToken1d, VariationalMask
from common.nets.adaptive import AdaptiveVocabulary


class Memory(NamedTuple):
    """What earlier segments leave to later ones, without gradient; M positions, newest last.

    states      (B, M, D)       equilibria z
    injections  (B, M, 2 H Dh)  key and value part of the input injections u
    """

    states: Tensor
    injections: Tensor


class Segment(NamedTuple):
    """Result of one segment: `hidden` one (B, T, D) per state (the last is the solution), and the `memory` after it."""

    hidden: list[Tensor]
    memory: Memory


class RelativeAttention(nn.Module):
    """Causal self-attention with relative positions over [memory, segment] and a residual; Transformer-XL, section 3.3.

    Heads q, k, v lie interleaved, (H, 3, Dh), in the rows of `qkv` and in the injection. Written out instead of
    calling the fused kernel, because Jacobian products and second derivatives must pass through it.
    """

    def __init__(
        self, *, width: int, heads: int, head_width: int, dropout: float, attention_dropout: float,
        norm_order: str, head_norm: bool, affine: bool,
    ):  # fmt: skip
        super().__init__()
        self.heads, self.head_width, self.norm_order = heads, head_width, norm_order
        inner = heads * head_width
        self.qkv = nn.Linear(width, 3 * inner, bias=False)
        self.position = nn.Linear(width, inner, bias=False)
        self.content_bias = nn.Parameter(torch.empty(heads, head_width).uniform_(-0.05, 0.05))
        self.position_bias = nn.Parameter(torch.empty(heads, head_width).uniform_(-0.05, 0.05))
        self.out = nn.Linear(inner, width)
        self.norm = nn.LayerNorm(width, elementwise_affine=affine)
        self.head_norm = nn.LayerNorm(inner, elementwise_affine=affine) if head_norm else nn.Identity()
        self.attention_drop = VariationalDropout(attention_dropout)
        self.drop = VariationalDropout1d(dropout)

    def masks(self, z: Tensor, keys: int) -> tuple[Tensor | None, Tensor | None]:
        """Dropout masks of one solve for z (B, T, D) and that many keys: of the attention weights, of the output."""
        weights = z[:, None, :, :1].expand(-1, self.heads, -1, keys)
        return _mask(self.attention_drop, weights), _mask(self.drop, z)

    def past(self, memory: Memory) -> Tensor:
        """Keys and values (B, M, H, 2, Dh) of the memory. They do not depend on z: once per solve, not per call."""
        states = self.norm(memory.states) if self.norm_order == "pre" else memory.states
        shape = (self.heads, 3, self.head_width)
        weight = self.qkv.weight.unflatten(0, shape)[:, 1:].flatten(0, 2)
        return (linear(states, weight) + memory.injections).unflatten(-1, (self.heads, 2, self.head_width))

    def forward(self, z: Tensor, u: Tensor, past: Tensor, masks: tuple, positions: Tensor, causal: Tensor) -> Tensor:
        """z (B, T, D) -> (B, T, D); u (B, T, 3 H Dh), past (B, M, H, 2, Dh), masks as from `masks`, positions
        (1, M + T, D), causal bool (T, M + T), true where a query may look."""
        x = self.norm(z) if self.norm_order == "pre" else z
        q, k, v = (self.qkv(x) + u).unflatten(-1, (self.heads, 3, self.head_width)).unbind(-2)
        keys, values = torch.cat([past[..., 0, :], k], dim=1), torch.cat([past[..., 1, :], v], dim=1)
        places = self.position(positions[0]).unflatten(-1, (self.heads, self.head_width))
        scores = torch.einsum("bihd,bjhd->bhij", q + self.content_bias, keys)
        scores = scores + relative_shift(torch.einsum("bihd,jhd->bhij", q + self.position_bias, places))
        scores = (scores * self.head_width**-0.5).masked_fill(~causal, -torch.inf)
        weights = self.attention_drop(scores.softmax(dim=-1), masks[0])
        mixed = torch.einsum("bhij,bjhd->bihd", weights, values).flatten(-2)
        mixed = z + self.drop(self.out(self.head_norm(mixed)), masks[1])
        return mixed if self.norm_order == "pre" else self.norm(mixed)


def relative_shift(scores: Tensor) -> Tensor:
    """Scores (B, H, T, K) by relative position -> by key: row i moves left by T - 1 - i. Transformer-XL, appendix B.

    Entries beyond a row's end hold other rows' scores; the causal mask covers exactly those.
    """
    batch, heads, queries, keys = scores.shape
    return pad(scores, (1, 0)).view(batch, heads, keys + 1, queries)[:, :, 1:].reshape(scores.shape)


class FeedForward(nn.Module):
    """Position-wise ReLU layer with a residual: (B, T, D) -> (B, T, D)."""

    def __init__(self, *, width: int, inner: int, dropout: float, norm_order: str, affine: bool):
        super().__init__()
        self.norm_order = norm_order
        self.up = nn.Linear(width, inner)
        self.up_drop = VariationalDropout1d(dropout)
        self.down = nn.Linear(inner, width)
        self.down_drop = VariationalDropout1d(dropout)
        self.norm = nn.LayerNorm(width, elementwise_affine=affine)

    def masks(self, z: Tensor) -> tuple[Tensor | None, Tensor | None]:
        """Dropout masks of one solve for z (B, T, D): inside the layer, of its output."""
        return _mask(self.up_drop, z[..., :1].expand(-1, -1, self.up.out_features)), _mask(self.down_drop, z)

    def forward(self, x: Tensor, masks: tuple) -> Tensor:
        y = self.norm(x) if self.norm_order == "pre" else x
        x = x + self.down_drop(self.down(self.up_drop(relu(self.up(y)), masks[0])), masks[1])
        return x if self.norm_order == "pre" else self.norm(x)


class TransformerCell(nn.Module):
    """f(z, u): the blocks one after the other, each with the same injection u (arXiv 1909.01377, section 4.2)."""

    def __init__(
        self, *, blocks: int, width: int, heads: int, head_width: int, inner: int, dropout: float,
        attention_dropout: float, norm_order: str, head_norm: bool, affine: bool,
    ):  # fmt: skip
        super().__init__()
        self.attention = nn.ModuleList(
            RelativeAttention(
                width=width, heads=heads, head_width=head_width, dropout=dropout, attention_dropout=attention_dropout,
                norm_order=norm_order, head_norm=head_norm, affine=affine,
            )
            for _ in range(blocks)
        )  # fmt: skip
        self.feed_forward = nn.ModuleList(
            FeedForward(width=width, inner=inner, dropout=dropout, norm_order=norm_order, affine=affine)
            for _ in range(blocks)
        )

    def past(self, memory: Memory) -> tuple[Tensor, ...]:
        """(B, M, H, 2, Dh) per block: its keys and values of the memory."""
        return tuple(attention.past(memory) for attention in self.attention)

    def masks(self, z: Tensor, keys: int) -> tuple:
        """Dropout masks of one solve per block; they travel among the solver's args, so that rows may leave."""
        return tuple(
            (attention.masks(z, keys), feed_forward.masks(z))
            for attention, feed_forward in zip(self.attention, self.feed_forward)
        )

    def forward(self, z: Tensor, u: Tensor, past: tuple, masks: tuple, positions: Tensor, causal: Tensor) -> Tensor:
        """z (B, T, D) -> (B, T, D); u (B, T, 3 H Dh), past and masks as made above, the rest as in the attention."""
        for block, (attention, feed_forward) in enumerate(zip(self.attention, self.feed_forward)):
            z = attention(z, u, past[block], masks[block][0], positions, causal)
            z = feed_forward(z, masks[block][1])
        return z


def _mask(drop: VariationalMask, like: Tensor) -> Tensor | None:
    """A fresh mask for inputs of the shape of `like`, None where the layer does nothing."""
    return drop.mask_for(like) if drop.training and drop.dropout else None


class DEQTransformer(nn.Module):
    """Language model p(next token | tokens so far): embedding -> z* = f(z*, u) -> adaptive softmax.

    deq          equilibrium layer (`common.deq.layer.DEQ`)
    vocabulary, cutoffs, divide, embed_width   see `AdaptiveVocabulary`
    width        D; even, because positions are sines and cosines
    blocks       weight-tied transformer blocks inside f
    heads, head_width, inner   attention heads H, their width Dh, width of the feed-forward layer
    memory       positions of earlier segments attended to in training, >= 0; eval_memory: in evaluation, None: memory
    dropout      of embeddings, positions, attention output, feed-forward layer (per feature, shared by all positions of
                 a row and all calls of one solve) and of the output (whole tokens), as in deq-lm
    attention_dropout  of attention weights
    norm_order   "pre" (layer norm before each sub-layer) or "post" (after its residual)
    head_norm    also normalise the joined heads, as deq-lm does
    affine       layer norms have gains and biases (deq-lm) or not (deq-seq)
    norm         applied to f once: `common.deq.layers.apply_norm` with its options, or None
    std          standard deviation of initial weights (deq-lm 0.01)
    cell_start   linear weights of f: "normal", as the others (deq-lm), or "torch", as its layers come (deq-seq, which
                 normalises f before it initialises the network, so that only the biases are reached)

    Position t of any iterate depends on tokens <= t alone under plain iteration. Solvers that mix iterates with
    coefficients computed from the whole row (Anderson, Broyden, Newton), and stopping by the row's residual, let later
    tokens reach earlier positions by as much as the state is short of convergence: evaluate with a fixed number of
    plain iterations when exact causality matters.

    Raises UserError for sizes below 1, an odd width and unknown words.
    """

    def __init__(
        self,
        *,
        deq: nn.Module,
        vocabulary: int,
        width: int = 700,
        blocks: int = 3,
        heads: int = 10,
        head_width: int = 70,
        inner: int = 14800,
        cutoffs: Sequence[int] = (),
        divide: int = 1,
        embed_width: int | None = None,
        memory: int = 150,
        eval_memory: int | None = None,
        dropout: float = 0.05,
        attention_dropout: float = 0.0,
        norm_order: str = "pre",
        head_norm: bool = True,
        affine: bool = True,
        norm: Callable[[nn.Module], object] | None = None,
        std: float = 0.01,
        cell_start: str = "normal",
    ):
        super().__init__()
        limits.choice("cell_start", cell_start, ("normal", "torch"))
        limits.positive(width=width, blocks=blocks, heads=heads, head_width=head_width, inner=inner)
        limits.choice("norm_order", norm_order, ("pre", "post"))
        limits.multiple_of("width", width, 2, "half sines, half cosines")
        for field, length in (("memory", memory), ("eval_memory", eval_memory)):
            if length is not None:
                limits.whole(field, length, hint=f"Set {field}=0 for no memory.")
        self.width, self.heads, self.head_width = width, heads, head_width
        self.memory_length = memory
        self.eval_memory_length = memory if eval_memory is None else eval_memory
        self.vocabulary = AdaptiveVocabulary(
            vocabulary=vocabulary, width=width, cutoffs=cutoffs, divide=divide, embed_width=embed_width, std=std
        )
        self.embed_drop = VariationalDropout1d(dropout)
        self.position_drop = VariationalDropout1d(dropout)
        self.output_drop = VariationalDropToken1d(dropout)
        self.injection = nn.Linear(width, 3 * heads * head_width)
        self.cell = TransformerCell(
            blocks=blocks, width=width, heads=heads, head_width=head_width, inner=inner, dropout=dropout,
            attention_dropout=attention_dropout, norm_order=norm_order, head_norm=head_norm, affine=affine,
        )  # fmt: skip
        self.deq = deq
        self.register_buffer("frequencies", 10000 ** (-torch.arange(0, width, 2) / width), persistent=False)
        self._initialise(std, cell_start)
        if norm is not None:
            norm(self.cell)

    def _initialise(self, std: float, cell_start: str) -> None:
        """Linear weights N(0, std^2), biases 0, layer-norm gains N(1, std^2): small, so that f starts contractive."""
        for module in (self.injection, *self.cell.modules()):
            if isinstance(module, nn.Linear):
                if module is self.injection or cell_start == "normal":
                    nn.init.normal_(module.weight, std=std)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
            elif isinstance(module, nn.LayerNorm) and module.elementwise_affine:
                nn.init.normal_(module.weight, 1.0, std)

    # Computation ------------------------------------------------------------------------------------------------------

    def forward(self, tokens: Tensor, memory: Memory | None = None) -> Tensor:
        """Hidden states (B, T, D) of the solution for tokens (B, T) int64."""
        return self.outputs(tokens, memory)[-1]

    def outputs(self, tokens: Tensor, memory: Memory | None = None) -> list[Tensor]:
        """Hidden states (B, T, D), one per state of the equilibrium layer."""
        return self.segment(tokens, memory).hidden

    def segment(self, tokens: Tensor, memory: Memory | None = None) -> Segment:
        """Solve for tokens (B, T) int64 after `memory` (None: nothing before), and what to remember."""
        if memory is None:
            memory = self.blank_memory(tokens.shape[0], 0)
        u = self.injection(self.embed_drop(self.vocabulary.embed(tokens)))
        queries, past_length = tokens.shape[1], memory.states.shape[1]
        positions = self.position_drop(self.positions(past_length + queries))
        causal = torch.ones(queries, past_length + queries, dtype=torch.bool, device=tokens.device).tril(past_length)

        def cell(z: Tensor, u: Tensor, past: tuple, masks: tuple) -> Tensor:
            return self.cell(z, u, past, masks, positions, causal)

        start = self.injection.weight.new_zeros(*tokens.shape, self.width)  # not half, whatever the autocast
        masks = self.cell.masks(start, past_length + queries)
        states = self.deq(cell, start, (u, self.cell.past(memory), masks))
        return Segment([self.output_drop(z) for z in states], self._remember(memory, states[-1], u))

    def nll(self, hidden: Tensor, targets: Tensor) -> Tensor:
        """Negative log-likelihood (B, T) in nats of targets (B, T), 0 where a target is < 0."""
        return self.vocabulary.nll(hidden, targets)

    def log_probs(self, hidden: Tensor) -> Tensor:
        """Log-probabilities (..., V) of the next token."""
        return self.vocabulary.log_probs(hidden)

    # Memory and positions ---------------------------------------------------------------------------------------------

    def blank_memory(self, batch: int, length: int | None = None) -> Memory:
        """Zeros for `batch` rows and `length` positions (None: as many as training keeps)."""
        length = self.memory_length if length is None else length
        like, inner = self.injection.weight, self.heads * self.head_width
        return Memory(like.new_zeros(batch, length, self.width), like.new_zeros(batch, length, 2 * inner))

    def positions(self, length: int) -> Tensor:
        """Sinusoids (1, length, D) of the distances length - 1 .. 0: first half sines, second half cosines."""
        distances = torch.arange(length - 1, -1, -1, device=self.frequencies.device, dtype=self.frequencies.dtype)
        angles = torch.outer(distances, self.frequencies)
        return torch.cat([angles.sin(), angles.cos()], dim=1).unsqueeze(0)

    def _remember(self, memory: Memory, z: Tensor, u: Tensor) -> Memory:
        keep = self.memory_length if self.training else self.eval_memory_length
        inward = u.detach().unflatten(-1, (self.heads, 3, self.head_width))[..., 1:, :].flatten(-3)
        states = torch.cat([memory.states, z.detach().to(memory.states.dtype)], dim=1)
        injections = torch.cat([memory.injections, inward.to(memory.injections.dtype)], dim=1)
        first = max(states.shape[1] - keep, 0)
        return Memory(states[:, first:], injections[:, first:])
