"""Adaptive embedding and adaptive softmax with shared tables: frequent words get wide vectors, rare ones narrow.

Adaptive input representations (arXiv 1809.10853) and adaptive softmax (arXiv 1609.04309), in the form of Transformer-XL
(arXiv 1901.02860) that the DEQ transformer uses.
"""

from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.nn.functional import embedding, linear, log_softmax

from common import limits
from common.errors import UserError
from common.tensors import only_shapes

# Under planning (fake tensors) no target is known: a sixteenth of the tokens is taken to fall in each tail cluster.
PLANNED_TAIL = 16


class AdaptiveVocabulary(nn.Module):
    """Token -> vector and vector -> log-probability, over clusters of tokens ordered by frequency.

    vocabulary  number of tokens V; token 0 is the most frequent, V - 1 the rarest
    width       D, width of the network
    cutoffs     first token of each cluster after the first, rising; () makes one cluster: a plain tied softmax
    divide      cluster i has vectors of size d_i = embed_width // divide^i
    embed_width size of the first cluster's vectors, None: width
    std         standard deviation of the initial tables and projections

    The tables E_i (V_i, d_i) serve both directions. Projections d_i <-> D exist when divide > 1 or embed_width differs
    from D; the outward ones are parameters of their own that start equal to the inward ones in the tail clusters
    (what the official code amounts to: it points both at one storage, and moving to a GPU parts them).
    Raises UserError for cutoffs that do not rise inside 1 .. V - 1 and for sizes below 1.
    """

    def __init__(
        self,
        *,
        vocabulary: int,
        width: int,
        cutoffs: Sequence[int] = (),
        divide: int = 1,
        embed_width: int | None = None,
        std: float = 0.01,
    ):
        super().__init__()
        embed_width = width if embed_width is None else embed_width
        limits.positive(vocabulary=vocabulary, width=width, divide=divide, embed_width=embed_width)
        ends = [0, *cutoffs, vocabulary]
        if any(later <= earlier for earlier, later in pairwise(ends)):
            raise UserError(
                f"cutoffs must rise inside 1..{vocabulary - 1} (vocabulary={vocabulary}), got {list(cutoffs)}. "
                "Remove the ones at or above the vocabulary, or set cutoffs=[] for a plain softmax."
            )
        sizes = [embed_width // divide**i for i in range(len(ends) - 1)]
        if sizes[-1] < 1:
            raise UserError(
                f"embed_width {embed_width} // divide {divide}^{len(sizes) - 1} leaves no width for the last cluster. "
                "Lower divide or shorten cutoffs."
            )
        self.vocabulary, self.width, self.std = vocabulary, width, std
        self.firsts, self.counts = ends[:-1], [b - a for a, b in pairwise(ends)]
        self.clusters = len(sizes)
        self.tables = nn.ParameterList(torch.empty(n, d) for n, d in zip(self.counts, sizes))
        projected = divide > 1 or embed_width != width
        self.inward = nn.ParameterList(torch.empty(width, d) for d in sizes if projected)
        self.outward = nn.ParameterList(torch.empty(width, d) for d in sizes if projected)
        self.biases = nn.ParameterList(torch.empty(n) for n in self.counts)
        if self.clusters > 1:
            self.cluster_weight = nn.Parameter(torch.empty(self.clusters - 1, embed_width))
            self.cluster_bias = nn.Parameter(torch.empty(self.clusters - 1))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Tables and projections N(0, std^2), biases 0."""
        with torch.no_grad():
            for weight in (*self.tables, *self.inward, *self.outward):
                nn.init.normal_(weight, std=self.std)
            for inward, outward in list(zip(self.inward, self.outward))[1:]:
                outward.copy_(inward)
            for bias in self.biases:
                nn.init.zeros_(bias)
            if self.clusters > 1:
                nn.init.normal_(self.cluster_weight, std=self.std)
                nn.init.zeros_(self.cluster_bias)

    def embed(self, tokens: Tensor) -> Tensor:
        """Vectors (..., D) of tokens (...) in 0..V-1, scaled by sqrt(D).

        Every token looks into every table, outside ones at a clamped row that is masked: gathers are cheap, and no
        shape depends on the data.
        """
        total = None
        for cluster, (table, first, count) in enumerate(zip(self.tables, self.firsts, self.counts)):
            local = tokens - first
            vectors = embedding(local.clamp(0, count - 1), table)
            if self.clusters > 1:
                vectors = vectors.masked_fill(((local < 0) | (local >= count)).unsqueeze(-1), 0.0)
            if self.inward:
                vectors = linear(vectors, self.inward[cluster])
            total = vectors if total is None else total + vectors
        return total * self.width**0.5

    def nll(self, hidden: Tensor, targets: Tensor) -> Tensor:
        """Negative log-likelihood (...) in nats of targets (...) given hidden (..., D); 0 where the target is < 0.

        The head's log-softmax is taken for every token, a tail's only for the tokens that fall in it. Every parameter
        takes part in every call, empty tails included, so distributed training finds no unused one.
        """
        flat, wanted = hidden.reshape(-1, self.width), targets.reshape(-1)
        ignored, wanted = wanted < 0, wanted.clamp(min=0)
        head = log_softmax(self._logits(flat, 0), dim=-1)
        # The cluster columns follow the shortlist in falling order, as in Transformer-XL: cluster i is column -i.
        column = wanted
        for cluster, first in enumerate(self.firsts[1:], start=1):
            column = torch.where(wanted >= first, self.counts[0] + self.clusters - 1 - cluster, column)
        found = head.gather(1, column.unsqueeze(1)).squeeze(1)
        for cluster, (first, count) in list(enumerate(zip(self.firsts, self.counts)))[1:]:
            rows = _rows((wanted >= first) & (wanted < first + count) & ~ignored)
            tail = log_softmax(self._logits(flat.index_select(0, rows), cluster), dim=-1)
            inside = (wanted.index_select(0, rows) - first).clamp(0, count - 1)
            found = found.index_add(0, rows, tail.gather(1, inside.unsqueeze(1)).squeeze(1))
        return -found.masked_fill(ignored, 0.0).reshape(targets.shape)

    def log_probs(self, hidden: Tensor) -> Tensor:
        """Log-probabilities (..., V) of every next token given hidden (..., D), for sampling."""
        head = log_softmax(self._logits(hidden, 0), dim=-1)
        parts = [head[..., : self.counts[0]]]
        for cluster in range(1, self.clusters):
            tail = log_softmax(self._logits(hidden, cluster), dim=-1)
            parts.append(head[..., -cluster].unsqueeze(-1) + tail)
        return torch.cat(parts, dim=-1)

    def _logits(self, hidden: Tensor, cluster: int) -> Tensor:
        weight, bias = self.tables[cluster], self.biases[cluster]
        if cluster == 0 and self.clusters > 1:
            weight = torch.cat([weight, self.cluster_weight])
            bias = torch.cat([bias, self.cluster_bias])
        if self.outward:
            hidden = linear(hidden, self.outward[cluster].t())
        return linear(hidden, weight, bias)


def _rows(inside: Tensor) -> Tensor:
    """Indices of the true entries of (N,); a sixteenth of the rows under planning, where there are no values."""
    if only_shapes(inside):
        return torch.arange(-(-inside.shape[0] // PLANNED_TAIL), device=inside.device)
    return inside.nonzero().squeeze(1)
