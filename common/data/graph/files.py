"""Graph data sets read from files: Cora and Citeseer, PPI, and the TU collection."""

import json
from pathlib import Path

import numpy as np

from common import limits
from common.archives import open_npz
from common.data.graph.module import Graph, both_ways, row_normalise
from common.data.source import UNREADABLE, check_split, find_folder
from common.errors import UserError

CITATION_CLASSES = {"cora": 7, "citeseer": 6}
PPI_FILES = {"train": "train", "val": "valid", "test": "test"}  # split -> prefix of its files


class Planetoid:
    """Citation graphs with the Planetoid split: 20 training nodes per class, 500 for val, 1000 for test.

    Layout: `<root>/graph/<name>.npz` (or `<root>/<name>.npz`) with `edges` (E, 2), the 0/1 features as CSR
    (`feat_indptr`, `feat_indices`, `num_features`), `labels`, `train_idx`, `val_idx`, `test_idx`; made from the files
    of kimiyoung/planetoid with loops and doubles removed. Features are divided by their row sums.

    name  "cora" (2708 nodes, 1433 features, 7 classes) or "citeseer" (3327, 3703, 6)

    Raises UserError for another name.
    """

    splits = ("train", "val", "test")

    def __init__(self, *, name: str, root: str):
        self.name = limits.choice("data.source.name", name, CITATION_CLASSES, hint="Set data=cora or data=citeseer.")
        self.root = root
        self.num_classes = CITATION_CLASSES[name]

    def _file(self) -> Path:
        file = f"{self.name}.npz"
        fix = f"Set data.root=<folder that holds graph/{file}>."
        return find_folder(self.root, ["graph", ""], file, self.name, fix) / file

    def check(self) -> None:
        self._file()

    def load(self, split: str) -> list[Graph]:
        """The one graph; the splits differ in the mask alone. Nodes without a label (-1) count in no split."""
        check_split(split, self.splits, self.name)
        path = self._file()
        try:
            with open_npz(path) as file:
                labels = file["labels"].astype(np.int64)
                indptr, columns = file["feat_indptr"].astype(np.int64), file["feat_indices"].astype(np.int64)
                x = np.zeros((len(labels), int(file["num_features"])), dtype=np.float32)
                edges, chosen = file["edges"], file[f"{split}_idx"]
        except UNREADABLE as error:
            raise UserError(f"{path} cannot be read: {error}. Put the file there again.") from error
        x[np.repeat(np.arange(len(labels)), np.diff(indptr)), columns] = 1
        mask = np.zeros(len(labels), dtype=bool)
        mask[chosen] = True
        return [
            Graph(
                x=row_normalise(x),
                links=both_ways(edges, len(labels)),
                label=np.maximum(labels, 0),
                mask=mask & (labels >= 0),
            )
        ]


class Ppi:
    """Protein interactions in 24 tissues: 20 graphs to train on, 2 for val, 2 for test, 121 labels a node, any at once.

    Layout of the archive ppi.zip (GraphSAGE's data in DGL's and PyG's packing): `<root>/ppi/` (or `<root>/PPI/raw/`)
    with, for split s in train, valid, test: `s_graph.json` (node-link: "links" of "source" and "target" numbers),
    `s_feats.npy` (N, 50), `s_labels.npy` (N, 121) zeros and ones, `s_graph_id.npy` (N,).

    Zitnik & Leskovec 2017 (arXiv 1707.04638); inductive: val and test graphs are never seen in training.
    """

    name = "ppi"
    num_classes = 121
    splits = ("train", "val", "test")

    def __init__(self, *, root: str):
        self.root = root

    def _folder(self) -> Path:
        fix = "Unpack https://data.dgl.ai/dataset/ppi.zip into <data.root>/ppi, or set data.root=<folder of ppi/>."
        return find_folder(self.root, ["ppi", "PPI/raw", ""], "train_graph.json", "PPI", fix)

    def check(self) -> None:
        folder = self._folder()
        for split in PPI_FILES.values():
            for ending in ("graph.json", "feats.npy", "labels.npy", "graph_id.npy"):
                if not (folder / f"{split}_{ending}").is_file():
                    raise UserError(
                        f"PPI is incomplete: {folder / f'{split}_{ending}'} is missing. Unpack ppi.zip again."
                    )

    def load(self, split: str) -> list[Graph]:
        check_split(split, self.splits, self.name)
        folder, part = self._folder(), PPI_FILES[split]
        try:
            links = json.loads((folder / f"{part}_graph.json").read_text(encoding="utf-8"))["links"]
            ends = np.array([(link["source"], link["target"]) for link in links], dtype=np.int64).reshape(-1, 2)
            x, labels, owner = (
                np.load(folder / f"{part}_{what}.npy", allow_pickle=False) for what in ("feats", "labels", "graph_id")
            )
            if not len(x) == len(labels) == len(owner) or (len(ends) and ends.max() >= len(x)):
                raise ValueError(f"{len(x)} feature rows, {len(labels)} label rows, {len(owner)} graph numbers")
        except (*UNREADABLE, TypeError) as error:
            raise UserError(
                f"PPI: the {part}_* files in {folder} cannot be read: {error}. Unpack ppi.zip again."
            ) from error
        return [
            Graph(
                x=x[nodes].astype(np.float32),
                links=links,
                label=labels[nodes].astype(np.float32),
                mask=np.ones(len(nodes), dtype=bool),
            )
            for nodes, links in _take_apart(owner, both_ways(ends, len(x)))
        ]


class TuDataset:
    """One fold of a graph classification set of the TU collection (chrsmrrs.github.io/datasets).

    Layout: `<root>/<name>/` (or `<root>/TU/<name>/`, `<root>/<name>/raw/`) with the text files `<name>_A.txt`
    (1-based node pairs "i, j"), `<name>_graph_indicator.txt` (graph of each node, 1-based), `<name>_graph_labels.txt`,
    and where there are any `<name>_node_labels.txt`, `<name>_node_attributes.txt`.

    Features: node labels as indicators (one column per number from the smallest to the largest); with `attributes`
    the attributes before them; degrees where a set has neither.
    The folds are stratified by class and drawn once for all from `fold_seed`: "test" is fold number `fold`, "train"
    the others. (IGNN's code stratifies labels in stored order but picks graphs in shuffled order, so its folds are
    random ones; ours are what its call asks for.)

    name        folder and file prefix, e.g. "COX2" (467 graphs, 35 node labels), "PROTEINS" (1113 graphs, 3)
    fold        0..folds-1
    folds       number of parts, >= 2

    Raises UserError for a fold out of range, and from `check` and `load` for missing or damaged files.
    """

    splits = ("train", "test")

    def __init__(
        self,
        *,
        name: str,
        root: str,
        num_classes: int = 2,
        attributes: bool = False,
        fold: int = 0,
        folds: int = 10,
        fold_seed: int = 42,
    ):
        limits.whole("data.source.folds", folds, least=2, hint="Set data.source.folds=10.")
        limits.whole("data.source.fold", fold, most=folds - 1)
        self.name = name
        self.root = root
        self.num_classes = num_classes
        self.attributes = attributes
        self.fold = fold
        self.folds = folds
        self.fold_seed = fold_seed

    def _folder(self) -> Path:
        fix = (
            f"Unpack {self.name}.zip of https://chrsmrrs.github.io/datasets into <data.root>/{self.name}, "
            f"or set data.root=<folder of {self.name}/>."
        )
        return find_folder(
            self.root, [self.name, f"TU/{self.name}", f"{self.name}/raw"], f"{self.name}_A.txt", self.name, fix
        )

    def check(self) -> None:
        folder = self._folder()
        for ending in ("graph_indicator", "graph_labels"):
            if not (folder / f"{self.name}_{ending}.txt").is_file():
                raise UserError(
                    f"{self.name} is incomplete: {folder / f'{self.name}_{ending}.txt'} is missing. "
                    f"Unpack {self.name}.zip again."
                )

    def load(self, split: str) -> list[Graph]:
        check_split(split, self.splits, self.name)
        graphs, labels = self._graphs()
        if len(graphs) < self.folds or np.bincount(labels).max() < self.folds:
            raise UserError(
                f"{self.name} has {len(graphs)} graphs, too few for data.source.folds={self.folds}. Set fewer folds."
            )
        from sklearn.model_selection import StratifiedKFold

        deal = StratifiedKFold(n_splits=self.folds, shuffle=True, random_state=self.fold_seed)
        train, test = list(deal.split(np.zeros(len(labels)), labels))[self.fold]
        return [graphs[i] for i in (train if split == "train" else test)]

    def _graphs(self) -> tuple[list[Graph], np.ndarray]:
        """All graphs in stored order and their classes 0..C-1 (M,) int64."""
        folder = self._folder()
        try:
            owner = self._numbers(folder, "graph_indicator").astype(np.int64)[:, 0]
            classes = self._numbers(folder, "graph_labels").astype(np.int64)[:, 0]
            links = both_ways(self._numbers(folder, "A").astype(np.int64) - 1, len(owner))
            if len(links) and not 0 <= links.min() <= links.max() < len(owner):
                raise ValueError(f"a link names node {links.max() + 1} of {len(owner)}")
            x = self._features(folder, owner, links)
            _, labels = np.unique(classes, return_inverse=True)
            parts = _take_apart(owner, links)
            if len(parts) != len(labels) or len(x) != len(owner):
                raise ValueError(f"{len(owner)} nodes, {len(x)} feature rows, {len(parts)} of {len(labels)} graphs")
        except (*UNREADABLE, IndexError) as error:
            raise UserError(
                f"{self.name} in {folder} cannot be read: {error}. Unpack {self.name}.zip again."
            ) from error
        if labels.max() + 1 != self.num_classes:
            raise UserError(
                f"{self.name} has {labels.max() + 1} classes, data.source.num_classes is {self.num_classes}. "
                f"Set data.source.num_classes={labels.max() + 1}."
            )
        graphs = [
            Graph(
                x=x[nodes],
                links=own,
                label=labels[number : number + 1].astype(np.int64),
                mask=np.ones(1, dtype=bool),
            )
            for number, (nodes, own) in enumerate(parts)
        ]
        return graphs, labels

    def _features(self, folder: Path, owner: np.ndarray, links: np.ndarray) -> np.ndarray:
        parts = []
        if self.attributes and (folder / f"{self.name}_node_attributes.txt").is_file():
            parts.append(self._numbers(folder, "node_attributes"))
        if (folder / f"{self.name}_node_labels.txt").is_file():
            for column in self._numbers(folder, "node_labels").astype(np.int64).T:
                parts.append(np.eye(column.max() - column.min() + 1)[column - column.min()])
        if not parts:
            parts.append(np.bincount(links[:, 1], minlength=len(owner))[:, None])
        return np.concatenate(parts, axis=1).astype(np.float32)

    def _numbers(self, folder: Path, ending: str) -> np.ndarray:
        """The comma-separated numbers of one file, float64 (rows, columns)."""
        return np.loadtxt(folder / f"{self.name}_{ending}.txt", delimiter=",", ndmin=2)


def _take_apart(owner: np.ndarray, links: np.ndarray) -> list[tuple[np.ndarray, np.ndarray]]:
    """(node numbers (n,), links (e, 2) numbered 0..n-1) of each graph, graphs in ascending order of their number.

    owner (N,) graph number of each node, links (E, 2) over all nodes; links between two graphs are left out.
    """
    _, which = np.unique(owner, return_inverse=True)
    order = np.argsort(which, kind="stable")
    sizes = np.bincount(which)
    firsts = np.concatenate([[0], np.cumsum(sizes)])[:-1]
    place = np.empty(len(owner), dtype=np.int64)
    place[order] = np.arange(len(owner)) - np.repeat(firsts, sizes)
    links = links[which[links[:, 0]] == which[links[:, 1]]]
    graph = which[links[:, 0]]
    links = links[np.argsort(graph, kind="stable")]
    shares = np.split(place[links], np.cumsum(np.bincount(graph, minlength=len(sizes)))[:-1])
    return list(zip(np.split(order, firsts[1:]), shares))
