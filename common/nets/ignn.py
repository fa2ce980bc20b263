"""Implicit graph neural networks (IGNN: Gu et al., "Implicit Graph Neural Networks", NeurIPS 2020).

Notation of the paper: X (m, N) states, columns are nodes; A (N, N) links, A[i, j] from i to j. Here rows are nodes:

    X = phi(W X A + b(U))            the paper's equilibrium
    Z = phi(A^T (Z W^T) + b(U)),     Z (N, m) = X^T: the same one, as written below

with W inside the ball ||W||_inf <= kappa / lambda_pf(A) (`project_rows`), on which the map is a contraction: the
equilibrium exists, is unique, and plain iteration finds it. b(U) = A^T (U Omega_1^T) + U Omega_2^T.

To a solver a graph is ONE sample, state (1, N, m): nodes are coupled, none can leave before the others. Several graphs
travel as one block-diagonal graph, hence as one sample too (see `common.data.graph.module`); they stop together.
"""

import copy
import math
from abc import ABC, abstractmethod

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from common import limits
from common.deq.layer import DEQ
from common.deq.layers import apply_norm
from common.errors import UserError

NORMS = ("none", "weight", "spectral")
STARTS = ("input", "zeros")
PROJECTIONS = ("auto", "parameter", "straight", "exact")


def propagate(x: Tensor, incoming: Tensor, outgoing: Tensor) -> Tensor:
    """A^T x (N, m) of x (N, m): the sum over the nodes that link to each node.

    incoming  A^T (N, N), sparse (CSR or COO) or dense
    outgoing  A (N, N) in the same layout: the backward multiplies by it instead of transposing `incoming` every time

    Differentiable in x any number of times, forward and backward mode; the links are constants. Half-precision x is
    multiplied in the precision of the links.
    """
    if incoming.layout == torch.strided:
        return incoming @ x
    links = _Links(incoming, outgoing)
    if x.dtype.itemsize < incoming.dtype.itemsize:
        return _SparseProduct.apply(x.to(incoming.dtype), links).to(x.dtype)
    return _SparseProduct.apply(x, links)


class _Links:
    """A matrix and its transpose, hidden from torch.func: it wraps every tensor it is given, and cannot wrap sparse."""

    def __init__(self, matrix: Tensor, transposed: Tensor):
        self.matrix, self.transposed = matrix, transposed

    @property
    def turned(self) -> "_Links":
        return _Links(self.transposed, self.matrix)


class _SparseProduct(torch.autograd.Function):
    """matrix @ x; its backward is the product with the transpose."""

    @staticmethod
    def forward(x, links):
        return torch.sparse.mm(links.matrix, x)

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.links = inputs[1]

    @staticmethod
    def backward(ctx, gradient):
        return _SparseProduct.apply(gradient, ctx.links.turned), None

    @staticmethod
    def jvp(ctx, tangent, _):
        return _SparseProduct.apply(tangent, ctx.links)


def project_rows(weight: Tensor, bound: Tensor | float) -> Tensor:
    """The nearest matrix (2-norm) to `weight` (m, n) among those with ||.||_inf = max row sum of |.| <= bound.

    Exact: every row on its own is projected onto the l1 ball by soft thresholding at the level alpha found from the
    sorted row (Duchi et al. 2008, figure 1); rows inside the ball stay as they are, bit for bit. Differentiable almost
    everywhere, alpha included. bound: number > 0, or a tensor () of one.
    """
    # Row w with sum |w| > bound: sign(w) max(|w| - alpha, 0), where alpha makes the result sum to the bound. If the k
    # largest entries survive, alpha_k = (their sum - bound) / k; k is the largest with |w|_(k) > alpha_k.
    size = weight.abs()
    falling = size.sort(dim=1, descending=True).values
    rank = torch.arange(1, weight.shape[1] + 1, device=weight.device, dtype=weight.dtype)
    levels = (falling.cumsum(1) - bound) / rank  # alpha if exactly the `rank` largest entries survive
    last = (falling > levels).sum(1, keepdim=True).clamp(min=1) - 1
    alpha = levels.gather(1, last).clamp(min=0)
    return torch.where(alpha > 0, weight.sign() * (size - alpha).clamp(min=0), weight)


class GraphCell(nn.Module):
    """The map whose fixed point is wanted, of one layer: no parameters of its own, so one cell serves all layers."""

    def forward(self, z: Tensor, b: Tensor, weight: Tensor, incoming: Tensor, outgoing: Tensor) -> Tensor:
        """relu(A^T (Z W^T) + b): z, b (1, N, m), weight (m, m), links (N, N) -> (1, N, m)."""
        return F.relu(propagate((z @ weight.T)[0], incoming, outgoing)[None] + b)


class ImplicitLayer(nn.Module):
    """Weights of one equilibrium: W (m, m), Omega_1 (m, p) and, with `self_term`, Omega_2 (m, p), for p -> m features.

    in_features, out_features   p, m
    kappa       radius of the ball times lambda_pf(A), in (0, 1); None leaves W unconstrained
    self_term   b also holds U Omega_2^T (the authors' node models; their graph model leaves it out)
    norm        "none", "weight" or "spectral" normalisation of all three (`common.deq.layers`)
    clip        upper limit of the factor the norm multiplies a weight with; None: none
    projection  "parameter": W itself is moved into the ball at every training forward (projected gradient descent; the
                backward comes before the next forward, else autograd refuses). Processes of one run keep equal W only
                for equal radii, as with normalised links
                "straight":  the layer uses the projected W, the gradient passes as if nothing had happened
                "exact":     the layer uses the projected W, the gradient is that of the projection
                "auto":      what the authors' code amounts to: "parameter" without norm, "straight" with one

    The authors' layer also holds a bias (m, 1) that enters nothing; it is not here. Initial values are uniform in
    +-1/sqrt(m), as there; a spectral norm with a limit starts from gains of 1, so that no weight exceeds norm 1.
    Raises UserError for a word or number out of range.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        *,
        kappa: float | None,
        self_term: bool,
        norm: str,
        clip: float | None,
        projection: str,
    ):
        super().__init__()
        if kappa is not None:
            limits.number("project.net.kappa", kappa, above=0, below=1, hint="Set project.net.kappa=0.95.")
        limits.choice("project.net.norm", norm, NORMS)
        limits.choice("project.net.projection", projection, PROJECTIONS)
        if projection == "parameter" and norm != "none":
            raise UserError(
                f"project.net.projection=parameter moves W itself, which norm={norm} recomputes from other parameters. "
                "Set project.net.projection=straight."
            )
        self.kappa = kappa
        self.projection = projection if projection != "auto" else ("parameter" if norm == "none" else "straight")
        self.w = nn.Linear(out_features, out_features, bias=False)
        self.omega_1 = nn.Linear(in_features, out_features, bias=False)
        self.omega_2 = nn.Linear(in_features, out_features, bias=False) if self_term else None
        for linear in self.children():
            nn.init.uniform_(linear.weight, -1 / math.sqrt(out_features), 1 / math.sqrt(out_features))
        if norm != "none":
            apply_norm(self, kind=norm, clip=clip)
        if norm == "spectral" and clip is not None:
            for linear in self.children():
                nn.init.ones_(linear.parametrizations.weight.original0)

    def weight(self, radius: Tensor) -> Tensor:
        """W (m, m) as used, inside the ball for links of Perron root `radius` ()."""
        weight = self.w.weight
        if self.kappa is None:
            return weight
        bound = self.kappa / radius
        if self.projection == "exact":
            return project_rows(weight, bound)
        with torch.no_grad():
            projected = project_rows(weight, bound)
            if self.projection == "parameter" and self.training:
                weight.copy_(projected)
                return weight
        return weight + (projected - weight).detach()  # the value of `projected`, the gradient of `weight`

    def inject(self, x: Tensor, incoming: Tensor, outgoing: Tensor) -> Tensor:
        """b(U) (1, N, m) of U = x (N, p)."""
        b = propagate(self.omega_1(x), incoming, outgoing)
        return (b if self.omega_2 is None else b + self.omega_2(x))[None]


class ImplicitGraphNetwork(nn.Module, ABC):
    """Abstract: implicit layers in_features -> widths[0] -> ..., each with a copy of the equilibrium solver `deq`.

    Inputs of `outputs` and `forward`, as `common.data.graph.module.GraphDataModule` makes them:
    x         (N, F) node features
    incoming  (N, N) A^T, sparse or dense;  outgoing  (N, N) A in the same layout
    radius    () Perron root of A
    owner     (N,) int64 graph of each node, 0..G-1
    graphs    G

    `deq` is the solver of the last layer; its `penalty_value` is the sum over the layers.
    start     the solvers start from "input" (b) or from "zeros"
    """

    level = "node"  # what a row of the logits is: "node" or "graph"

    def __init__(
        self, in_features: int, classes: int, widths: tuple[int, ...], *, deq: DEQ, start: str, kappa: float | None,
        self_term: bool, norm: str, clip: float | None, projection: str,
    ):  # fmt: skip
        super().__init__()
        limits.choice("project.net.start", start, STARTS)
        for field, value in (("in_features", in_features), ("classes", classes), ("hidden", widths[0])):
            limits.whole(f"project.net.{field}", value, least=1)
        self.in_features = in_features
        self.classes = classes
        self.start = start
        self.cell = GraphCell()
        self.layers = nn.ModuleList(
            ImplicitLayer(p, m, kappa=kappa, self_term=self_term, norm=norm, clip=clip, projection=projection)
            for p, m in zip((in_features, *widths[:-1]), widths)
        )
        # one solver per layer, so that each keeps the record of its own last solve
        self.deqs = nn.ModuleList(copy.deepcopy(deq) for _ in widths[:-1])
        self.deq = deq

    def forward(self, x, incoming, outgoing, radius, owner, graphs: int = 1) -> Tensor:
        """The last of `outputs`."""
        return self.outputs(x, incoming, outgoing, radius, owner, graphs)[-1]

    @abstractmethod
    def outputs(self, x, incoming, outgoing, radius, owner, graphs: int = 1) -> list[Tensor]:
        """Logits, one per state the solver returns for the last layer (training: several; evaluation: one)."""

    @abstractmethod
    def embed(self, x, incoming, outgoing, radius, owner, graphs: int = 1) -> Tensor:
        """What the classifier reads, one row per row of the logits (R, m)."""

    def equilibria(self, number: int, x: Tensor, incoming, outgoing, radius) -> list[Tensor]:
        """States Z (N, m) of layer `number` for features x (N, p): as many as its solver returns."""
        if number == 0 and x.shape[1] != self.in_features:
            raise UserError(
                f"project.net.in_features is {self.in_features}, but the data has {x.shape[1]} features per node. "
                f"Set project.net.in_features={x.shape[1]}."
            )
        layer, deq = self.layers[number], (*self.deqs, self.deq)[number]
        weight = layer.weight(radius)
        b = layer.inject(x, incoming, outgoing)
        step = lambda z, b: self.cell(z, b, weight, incoming, outgoing)
        states = deq(step, torch.zeros_like(b) if self.start == "zeros" else b, (b,))
        if deq is self.deq and deq.penalty_value is not None:
            deq.penalty_value = deq.penalty_value + sum(other.penalty_value for other in self.deqs)
        return [z[0] for z in states]


class IgnnSkip(ImplicitGraphNetwork):
    """IGNN for PPI: layers of widths 4h, 2h, 2h, h, classes, each with a linear skip, ELU between them.

    Y_{l+1} = elu(Z*_l(Y_l) + S_l Y_l), no ELU after the last, which gives the logits (N, classes).

    hidden  h;  the other parameters: see `ImplicitLayer` and `ImplicitGraphNetwork`
    """

    def __init__(
        self,
        in_features: int,
        classes: int,
        deq: DEQ,
        hidden: int = 256,
        kappa: float | None = 0.98,
        norm: str = "spectral",
        clip: float | None = 1.0,
        projection: str = "auto",
        start: str = "input",
    ):
        widths = (4 * hidden, 2 * hidden, 2 * hidden, hidden, classes)
        super().__init__(
            in_features, classes, widths, deq=deq, start=start, kappa=kappa, self_term=True, norm=norm, clip=clip,
            projection=projection,
        )  # fmt: skip
        self.skips = nn.ModuleList(nn.Linear(p, m) for p, m in zip((in_features, *widths[:-1]), widths))

    def embed(self, x, incoming, outgoing, radius, owner, graphs: int = 1) -> Tensor:
        """Input of the last layer (N, h)."""
        for number, skip in enumerate(self.skips[:-1]):
            x = F.elu(self.equilibria(number, x, incoming, outgoing, radius)[-1] + skip(x))
        return x

    def outputs(self, x, incoming, outgoing, radius, owner, graphs: int = 1) -> list[Tensor]:
        x = self.embed(x, incoming, outgoing, radius, owner)
        skip = self.skips[-1](x)
        return [z + skip for z in self.equilibria(len(self.skips) - 1, x, incoming, outgoing, radius)]


class IgnnNode(ImplicitGraphNetwork):
    """IGNN for chains and citation graphs: one layer, dropout, a linear classifier without bias; logits (N, classes).

    normalise  rows of Z are scaled to length 1 before the classifier (the chains model; off in the Amazon model)
    dropout    of Z, probability in training
    The other parameters: see `ImplicitLayer` and `ImplicitGraphNetwork`.
    """

    def __init__(
        self,
        in_features: int,
        classes: int,
        deq: DEQ,
        hidden: int = 16,
        kappa: float | None = 0.9,
        dropout: float = 0.5,
        normalise: bool = True,
        norm: str = "none",
        clip: float | None = None,
        projection: str = "auto",
        start: str = "zeros",
    ):
        super().__init__(
            in_features, classes, (hidden,), deq=deq, start=start, kappa=kappa, self_term=True, norm=norm, clip=clip,
            projection=projection,
        )  # fmt: skip
        self.normalise = normalise
        self.dropout = nn.Dropout(dropout)
        self.head = nn.Linear(hidden, classes, bias=False)

    def _states(self, x, incoming, outgoing, radius) -> list[Tensor]:
        states = self.equilibria(0, x, incoming, outgoing, radius)
        return [F.normalize(z, dim=1) for z in states] if self.normalise else states

    def embed(self, x, incoming, outgoing, radius, owner, graphs: int = 1) -> Tensor:
        return self._states(x, incoming, outgoing, radius)[-1]

    def outputs(self, x, incoming, outgoing, radius, owner, graphs: int = 1) -> list[Tensor]:
        return [self.head(self.dropout(z)) for z in self._states(x, incoming, outgoing, radius)]


class IgnnGraph(ImplicitGraphNetwork):
    """IGNN for classes of graphs: layers of equal width, sum over the nodes of a graph, a two-layer head; (G, classes).

    depth  implicit layers (3 in the authors' code), the other parameters: see `ImplicitLayer`, `ImplicitGraphNetwork`
    """

    level = "graph"

    def __init__(
        self,
        in_features: int,
        classes: int,
        deq: DEQ,
        hidden: int = 64,
        depth: int = 3,
        kappa: float | None = 0.9,
        dropout: float = 0.5,
        self_term: bool = False,
        norm: str = "none",
        clip: float | None = None,
        projection: str = "auto",
        start: str = "input",
    ):
        limits.whole("project.net.depth", depth, least=1, hint="Set project.net.depth=3.")
        super().__init__(
            in_features, classes, (hidden,) * depth, deq=deq, start=start, kappa=kappa, self_term=self_term, norm=norm,
            clip=clip, projection=projection,
        )  # fmt: skip
        self.dropout = nn.Dropout(dropout)
        self.hidden = nn.Linear(hidden, hidden)
        self.head = nn.Linear(hidden, classes)

    def _pooled(self, x, incoming, outgoing, radius, owner, graphs: int) -> list[Tensor]:
        states = [x]
        for number in range(len(self.layers)):
            states = self.equilibria(number, states[-1], incoming, outgoing, radius)
        return [z.new_zeros(graphs, z.shape[1]).index_add(0, owner, z) for z in states]

    def embed(self, x, incoming, outgoing, radius, owner, graphs: int = 1) -> Tensor:
        """Sums of the node states (G, m)."""
        return self._pooled(x, incoming, outgoing, radius, owner, graphs)[-1]

    def outputs(self, x, incoming, outgoing, radius, owner, graphs: int = 1) -> list[Tensor]:
        pooled = self._pooled(x, incoming, outgoing, radius, owner, graphs)
        return [self.head(self.dropout(F.relu(self.hidden(p)))) for p in pooled]
