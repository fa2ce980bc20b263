"""IGNN's chain experiment: can a network carry a class from the first node of a chain to the last?"""

import numpy as np

from common import limits
from common.data.graph.module import Graph, row_normalise
from common.data.source import check_split
from common.errors import UserError


class Chains:
    """Directed chains of nodes; only the first node of a chain knows the chain's class, every node must tell it.

    IGNN (Gu et al., NeurIPS 2020), section 6; the defaults are the authors' file `load_citation_chain`: 2 classes x 20
    chains x 10 nodes, 100 features, no noise, 20 / 100 / 200 nodes for train / val / test, drawn by RandomState(42).
    A node k steps down the chain is classified by k steps of message passing and by no fewer.

    classes    classes, each with its own indicator feature, >= 2
    chains     chains per class, >= 1
    length     nodes per chain, >= 2; links go from each node to the next
    features   features per node, >= classes
    noise      all features carry uniform noise in [-noise, noise]
    train_nodes, val_nodes, test_nodes   nodes drawn for each split, over all chains
    seed       of noise and split

    Rows of the features are divided by their sum, as in the authors' code. Raises UserError for sizes out of range.
    """

    splits = ("train", "val", "test")

    def __init__(
        self,
        *,
        classes: int = 2,
        chains: int = 20,
        length: int = 10,
        features: int = 100,
        noise: float = 0.0,
        train_nodes: int = 20,
        val_nodes: int = 100,
        test_nodes: int = 200,
        seed: int = 42,
    ):
        least_values = {
            "classes": (classes, 2),
            "chains": (chains, 1),
            "length": (length, 2),
            "features": (features, classes),
            "train_nodes": (train_nodes, 1),
            "val_nodes": (val_nodes, 1),
            "test_nodes": (test_nodes, 1),
        }
        for field, (value, least) in least_values.items():
            limits.whole(f"data.source.{field}", value, least=least)
        nodes, wanted = classes * chains * length, train_nodes + val_nodes + test_nodes
        if wanted > nodes:
            raise UserError(
                f"data.source.train_nodes + val_nodes + test_nodes is {wanted}, but there are {classes} classes x "
                f"{chains} chains x {length} = {nodes} nodes. Lower them or set data.source.chains higher."
            )
        self.name = f"chains-{length}"
        self.num_classes = classes
        self.chains = chains
        self.length = length
        self.features = features
        self.noise = noise
        self.sizes = dict(zip(self.splits, (train_nodes, val_nodes, test_nodes)))
        self.seed = seed

    def check(self) -> None:
        """Nothing can be missing: the chains are generated."""

    def load(self, split: str) -> list[Graph]:
        """One graph of classes * chains * length nodes; the splits differ in the mask alone."""
        check_split(split, self.splits, self.name)
        random = np.random.RandomState(self.seed)  # numpy promises that this stream never changes
        shape = (self.num_classes, self.chains, self.length, self.features)
        x = random.uniform(-self.noise, self.noise, size=shape)
        for label in range(self.num_classes):
            x[label, :, 0, label] += 1
        nodes = np.arange(np.prod(shape[:3]))
        order = nodes.copy()
        random.shuffle(order)
        start = 0
        for name, size in self.sizes.items():
            if name == split:
                chosen = order[start : start + size]
            start += size
        return [
            Graph(
                x=row_normalise(x.reshape(-1, self.features)).astype(np.float32),
                links=np.stack([nodes[:-1], nodes[1:]], 1)[nodes[1:] % self.length != 0],
                label=nodes // (self.chains * self.length),
                mask=np.isin(nodes, chosen),
            )
        ]
