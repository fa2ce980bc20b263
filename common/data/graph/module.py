"""The data module of every graph experiment: one graph, or several side by side as one block-diagonal graph.

Nodes are rows. A link matrix A holds the weight of the link source -> target at A[source, target]; nodes receive A^T x.
Every batch carries both matrices in torch's CSR format, so that neither the product nor its backward transposes.

Graphs of different sizes in one batch become ONE block-diagonal graph (no padding: a batch costs its links, not the
square of its largest graph). For an equilibrium solver such a batch is one sample: nodes are coupled, rows are not.

Which graphs a run sees depends on (seed, graphs seen so far) and on nothing else, as in `common.data.images.module`.
"""

import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from scipy import sparse
from scipy.sparse import csgraph
from scipy.sparse.linalg import eigs, eigsh
from torch import Tensor

from common import limits
from common.data.restart import RestartingDataModule
from common.data.sampler import EvalSampler, StatelessSampler, check_batch_size
from common.data.source import check_split

KEPT_BATCHES = 32  # collated batches kept in memory: all 20 training graphs of PPI, every full-batch graph


@dataclass(frozen=True)
class Graph:
    """One graph as read from its files.

    x       (N, F) float32 node features
    links   (E, 2) int64 ordered pairs (source, target), each once; an undirected link is two of them
    label   int64 (N,) classes of nodes, float32 (N, C) zeros and ones of nodes, or int64 (1,) class of the graph
    mask    bool, one per label: which of them count in this split
    """

    x: np.ndarray
    links: np.ndarray
    label: np.ndarray
    mask: np.ndarray


class GraphSource(Protocol):
    """Where graphs lie and how they are read. Making one touches no file; `check` and `load` do."""

    name: str
    num_classes: int
    splits: tuple[str, ...]

    def check(self) -> None:
        """Cheap look whether the files are there. Raises UserError: what was looked for, where, and the fix."""

    def load(self, split: str) -> list[Graph]:
        """The graphs of the split. Raises UserError naming the missing or damaged file."""


def link_matrix(nodes: int, links: np.ndarray, normalise: str) -> sparse.csr_matrix:
    """A (N, N) float64 of the ordered `links` (E, 2).

    normalise  "none": A as it is, weight 1 per link (IGNN on PPI)
               "symmetric": (D + I)^-1/2 (A + I) (D + I)^-1/2 with D the row sums of A, also for directed graphs
                            (IGNN's chains; Kipf & Welling, arXiv 1609.02907, equation 2)

    Raises UserError for another word.
    """
    limits.choice("data.normalise", normalise, ("symmetric", "none"), hint="Set data.normalise=symmetric.")
    matrix = sparse.coo_matrix((np.ones(len(links)), (links[:, 0], links[:, 1])), shape=(nodes, nodes)).tocsr()
    if normalise == "none":
        return matrix
    matrix = matrix + sparse.eye_array(nodes, format="csr")
    scale = sparse.diags_array(np.asarray(matrix.sum(1)).ravel() ** -0.5)  # row sums are >= 1: every node has its loop
    return sparse.csr_matrix(scale @ matrix @ scale)


def perron_root(matrix: sparse.csr_matrix) -> float:
    """Spectral radius of a matrix (N, N) with entries >= 0; 0 for one without a cycle.

    A non-negative matrix is block-triangular over its strongly connected components and its radius is the largest of
    theirs. Inside a component the dominant eigenvalue of A + I is real and simple (Perron-Frobenius), so an iterative
    solver finds it, where on the whole matrix of a directed graph it meets Jordan blocks.
    """
    count, owner = csgraph.connected_components(matrix, directed=True, connection="strong")
    loops = matrix.diagonal()
    best = float(loops.max(initial=0.0))
    sizes = np.bincount(owner, minlength=count)
    order = np.argsort(owner, kind="stable")
    starts = np.concatenate([[0], np.cumsum(sizes)])
    for component in np.flatnonzero(sizes > 1):
        nodes = order[starts[component] : starts[component + 1]]
        block = matrix[nodes][:, nodes]
        if block.sum(1).max() > best:  # the largest row sum bounds the radius
            best = max(best, _irreducible_radius(block))
    return best


def _irreducible_radius(block: sparse.csr_matrix) -> float:
    if block.shape[0] <= 64:
        return float(np.abs(np.linalg.eigvals(block.toarray())).max())
    shifted = block + sparse.eye_array(block.shape[0], format="csr")
    start = np.ones(block.shape[0])  # ARPACK's own start is random
    if abs(block - block.T).sum() == 0:
        return float(eigsh(shifted, k=1, which="LA", v0=start, return_eigenvectors=False)[0]) - 1
    return float(np.abs(eigs(shifted, k=1, which="LM", v0=start, return_eigenvectors=False)[0])) - 1


def row_normalise(x: np.ndarray) -> np.ndarray:
    """Rows of x (N, F) divided by their sums; rows that sum to 0 become 0."""
    total = x.sum(1, keepdims=True)
    return np.divide(x, total, out=np.zeros_like(x), where=total != 0)


def both_ways(links: np.ndarray, nodes: int) -> np.ndarray:
    """Undirected pairs (E, 2) as ordered links (E', 2) int64: both directions, each once, no loops, sorted."""
    links = np.asarray(links, dtype=np.int64).reshape(-1, 2)
    links = links[links[:, 0] != links[:, 1]]
    codes = np.unique(np.concatenate([links[:, 0] * nodes + links[:, 1], links[:, 1] * nodes + links[:, 0]]))
    return np.stack(np.divmod(codes, max(nodes, 1)), axis=1)


def to_csr(matrix: sparse.csr_matrix) -> Tensor:
    """scipy CSR -> torch CSR, float32 with int32 indices (what the CPU's sparse kernels take without a copy)."""
    matrix.sort_indices()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Sparse CSR tensor support is in beta")
        return torch.sparse_csr_tensor(
            torch.from_numpy(matrix.indptr.astype(np.int32)),
            torch.from_numpy(matrix.indices.astype(np.int32)),
            torch.from_numpy(matrix.data.astype(np.float32)),
            size=matrix.shape,
            check_invariants=True,
        )


class GraphSet:
    """The graphs of one split with their link matrices; `collate` puts some of them side by side.

    radius  number for lambda_pf(A), or None to compute it per graph (`perron_root`)
    """

    def __init__(self, graphs: list[Graph], normalise: str, radius: float | None):
        self.graphs = graphs
        self.matrices = [link_matrix(len(g.x), g.links, normalise) for g in graphs]
        self.radii = [perron_root(matrix) if radius is None else radius for matrix in self.matrices]
        self._kept: dict[tuple[int, ...], dict[str, Tensor]] = {}

    def __len__(self) -> int:
        return len(self.graphs)

    def collate(self, indices: list[int]) -> dict[str, Tensor]:
        """The batch of `GraphDataModule` for these graphs; a recently made one is handed out again."""
        key = tuple(indices)
        if key not in self._kept:
            if len(self._kept) >= KEPT_BATCHES:
                self._kept.pop(next(iter(self._kept)))
            self._kept[key] = self._collate(indices)
        return dict(self._kept[key])

    def _collate(self, indices: list[int]) -> dict[str, Tensor]:
        graphs = [self.graphs[i] for i in indices]
        outgoing = sparse.csr_matrix(sparse.block_diag([self.matrices[i] for i in indices], format="csr"))
        return {  # the labels first: their number is what the runtime counts as the batch's samples
            "label": torch.from_numpy(np.concatenate([g.label for g in graphs])),
            "mask": torch.from_numpy(np.concatenate([g.mask for g in graphs])),
            "x": torch.from_numpy(np.concatenate([g.x for g in graphs])),
            "incoming": to_csr(sparse.csr_matrix(outgoing.T.tocsr())),
            "outgoing": to_csr(outgoing),
            "radius": torch.tensor(max(self.radii[i] for i in indices), dtype=torch.float32),
            "owner": torch.from_numpy(np.repeat(np.arange(len(graphs)), [len(g.x) for g in graphs])),
        }


class GraphDataModule(RestartingDataModule):
    """Batches of whole graphs. With N nodes and G graphs in the batch:

    x         (N, F) float32        node features
    incoming  (N, N) float32 CSR    A^T: row j holds the links that end in node j
    outgoing  (N, N) float32 CSR    A
    radius    () float32            Perron root of A (the largest over the graphs)
    owner     (N,) int64            graph of each node, 0..G-1
    label     int64 (N,) classes of nodes, float32 (N, C) labels of nodes, or int64 (G,) classes of graphs
    mask      bool (N,) or (G,)     which labels count in this split

    source           Chains, Planetoid, Ppi or TuDataset (see `GraphSource`)
    batch_size       graphs per optimiser step over all processes and accumulated micro-batches, >= 1
    eval_batch_size  graphs per evaluation batch over all processes, >= 1
    normalise        "symmetric" or "none", see `link_matrix`
    radius           number taken for the Perron root instead of computing it; None: computed per graph
    seed, shuffle    order of the graphs
    root             data folder the source was given; kept for messages
    name             name in messages and beside numbers, None takes the source's

    Raises UserError for a bad batch size, and from `check`, `setup` and the loaders for missing or damaged files.
    """

    holds = "graphs"
    sampled = "graphs"

    def __init__(
        self,
        *,
        source: GraphSource,
        batch_size: int = 1,
        eval_batch_size: int = 1,
        normalise: str = "symmetric",
        radius: float | None = None,
        seed: int = 0,
        shuffle: bool = True,
        name: str | None = None,
        root: str | None = None,
    ):
        super().__init__()
        check_batch_size(batch_size, 1, "1")
        check_batch_size(eval_batch_size, 1, "1", field="data.eval_batch_size")
        if radius is not None:
            limits.number("data.radius", radius, above=0, hint="Set data.radius=null to have it computed.")
        link_matrix(1, np.zeros((0, 2), dtype=np.int64), normalise)
        self.source = source
        self.batch_size = batch_size
        self.eval_batch_size = eval_batch_size
        self.normalise = normalise
        self.radius = radius
        self.seed = seed
        self.shuffle = shuffle
        self.name = name or source.name
        self.root = root
        self._sets: dict[str, GraphSet] = {}

    @property
    def num_classes(self) -> int:
        return self.source.num_classes

    @property
    def splits(self) -> tuple[str, ...]:
        return self.source.splits

    def check(self) -> None:
        """Cheap look whether the files are there, before any work. Raises UserError saying what to do."""
        self.source.check()

    def graphs(self, split: str) -> GraphSet:
        """One split, read on first use. Raises UserError for an unknown split or damaged files."""
        check_split(split, self.splits, self.name)
        if split not in self._sets:
            self._sets[split] = GraphSet(self.source.load(split), self.normalise, self.radius)
        return self._sets[split]

    # Lightning -------------------------------------------------------------------------------------------------------

    def prepare_data(self) -> None:
        self.check()

    def setup(self, stage: str) -> None:
        if stage == "fit":
            self.graphs("train")
            self._check_shares()

    def train_dataloader(self) -> "GraphBatches":
        """Endless batches of this process, from `samples_seen()` on, at every start of an iteration."""
        graphs = self.graphs("train")
        return GraphBatches(graphs, self._train_sampler(len(graphs)))

    def eval_batches(self, split: str) -> "CountedGraphBatches":
        """This process's share of the split, every graph once over all processes, in stored order."""
        graphs = self.graphs(split)
        return CountedGraphBatches(graphs, self._eval_sampler(len(graphs), self.eval_batch_size))


class GraphBatches:
    """Endless batches. Not a DataLoader: sparse tensors neither travel through worker processes nor can be pinned."""

    def __init__(self, graphs: GraphSet, sampler: StatelessSampler | EvalSampler):
        self.graphs = graphs
        self.sampler = sampler

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        for draws in self.sampler:
            yield self.graphs.collate([index for index, _ in draws])


class CountedGraphBatches(GraphBatches):
    """`GraphBatches` with an end."""

    def __len__(self) -> int:
        return len(self.sampler)
