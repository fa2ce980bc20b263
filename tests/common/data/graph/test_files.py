"""Real citation graphs, and small files in the documented layouts of PPI and the TU collection."""

import json

import numpy as np
import pytest

from common.data.graph.files import Planetoid, Ppi, TuDataset
from common.data.graph.module import GraphDataModule
from common.errors import UserError


def test_cora(data_folder):
    data_folder("graph")
    root = str(data_folder("graph").parent)
    graphs = {split: Planetoid(name="cora", root=root).load(split)[0] for split in Planetoid.splits}
    train = graphs["train"]
    assert train.x.shape == (2708, 1433) and train.links.shape == (2 * 5278, 2)
    assert {split: int(graph.mask.sum()) for split, graph in graphs.items()} == {"train": 140, "val": 500, "test": 1000}
    assert np.bincount(train.label[train.mask]).tolist() == [20] * 7
    np.testing.assert_allclose(train.x.sum(1), 1, rtol=1e-5)
    assert len(np.unique(train.links[:, 0] * 2708 + train.links[:, 1])) == 2 * 5278


def test_citeseer_leaves_unlabelled_nodes_out(data_folder):
    root = str(data_folder("graph").parent)
    graphs = [Planetoid(name="citeseer", root=root).load(split)[0] for split in Planetoid.splits]
    assert graphs[0].x.shape == (3327, 3703) and [int(g.mask.sum()) for g in graphs] == [120, 500, 1000]
    assert graphs[0].label.min() == 0 and graphs[0].label.max() == 5
    assert sum(g.mask for g in graphs).max() == 1


def test_planetoid_refusals(tmp_path):
    with pytest.raises(UserError, match=r"data\.source\.name must be one of cora, citeseer, got 'cara'. Closest: cora"):
        Planetoid(name="cara", root=str(tmp_path))
    with pytest.raises(UserError, match=r"cora not found: looked for .*cora\.npz.*Set data\.root="):
        Planetoid(name="cora", root=str(tmp_path)).check()
    (tmp_path / "cora.npz").write_bytes(b"no archive")
    with pytest.raises(UserError, match=r"cora\.npz cannot be read"):
        Planetoid(name="cora", root=str(tmp_path)).load("train")


@pytest.fixture
def ppi(tmp_path):
    folder = tmp_path / "ppi"
    folder.mkdir()
    random = np.random.default_rng(0)
    for part, sizes in (("train", (4, 3)), ("valid", (2,)), ("test", (2, 2))):
        total = sum(sizes)
        np.save(folder / f"{part}_feats.npy", random.normal(size=(total, 50)))
        np.save(folder / f"{part}_labels.npy", random.integers(0, 2, size=(total, 121)))
        np.save(folder / f"{part}_graph_id.npy", np.repeat(np.arange(len(sizes)) + 7, sizes))
        links = [{"source": 0, "target": 1}, {"source": 1, "target": 0}, {"source": total - 1, "target": total - 2}]
        links.append({"source": 1, "target": 1})
        (folder / f"{part}_graph.json").write_text(json.dumps({"directed": False, "links": links, "nodes": []}))
    return tmp_path


def test_ppi_graphs_are_cut_apart(ppi):
    source = Ppi(root=str(ppi))
    source.check()
    train = source.load("train")
    assert [len(g.x) for g in train] == [4, 3] and [len(g.x) for g in source.load("val")] == [2]
    stored = np.load(ppi / "ppi" / "train_feats.npy")
    np.testing.assert_allclose(train[1].x, stored[4:].astype(np.float32))
    assert train[0].links.tolist() == [[0, 1], [1, 0]] and train[1].links.tolist() == [[1, 2], [2, 1]]
    assert train[0].label.shape == (4, 121) and train[0].label.dtype == np.float32
    batch = next(iter(GraphDataModule(source=source, eval_batch_size=2, normalise="none").eval_batches("train")))
    assert batch["label"].shape == (7, 121) and batch["radius"] == pytest.approx(1)


def test_ppi_refusals(ppi, tmp_path):
    (ppi / "ppi" / "valid_labels.npy").unlink()
    with pytest.raises(UserError, match=r"PPI is incomplete: .*valid_labels\.npy is missing"):
        Ppi(root=str(ppi)).check()
    with pytest.raises(UserError, match=r"PPI not found: looked for .*ppi\.zip"):
        Ppi(root=str(tmp_path / "elsewhere")).check()
    np.save(ppi / "ppi" / "test_feats.npy", np.zeros((9, 50)))
    with pytest.raises(UserError, match=r"the test_\* files .* 9 feature rows, 4 label rows"):
        Ppi(root=str(ppi)).load("test")


@pytest.fixture
def tu(tmp_path):
    """12 graphs of 2 + k % 2 nodes: paths; node labels 5 and 7, one attribute."""
    folder = tmp_path / "TOY"
    folder.mkdir()
    sizes = [2 + k % 2 for k in range(12)]
    starts = np.concatenate([[0], np.cumsum(sizes)])
    pairs = [(a + 1, a + 2) for s, n in zip(starts, sizes) for a in range(s, s + n - 1)]
    lines = [f"{a}, {b}" for a, b in pairs] + [f"{b}, {a}" for a, b in pairs]
    (folder / "TOY_A.txt").write_text("\n".join(lines))
    (folder / "TOY_graph_indicator.txt").write_text(
        "\n".join(str(k + 1) for k, n in enumerate(sizes) for _ in range(n))
    )
    (folder / "TOY_graph_labels.txt").write_text("\n".join("-1" if k < 6 else "1" for k in range(12)))
    (folder / "TOY_node_labels.txt").write_text("\n".join("5" if a % 2 else "7" for a in range(sum(sizes))))
    (folder / "TOY_node_attributes.txt").write_text("\n".join(f"{a}.5" for a in range(sum(sizes))))
    return tmp_path


def test_tu_graphs_features_and_classes(tu):
    source = TuDataset(name="TOY", root=str(tu), folds=3)
    source.check()
    graphs, labels = source._graphs()
    assert labels.tolist() == [0] * 6 + [1] * 6
    assert [len(g.x) for g in graphs] == [2, 3] * 6
    assert graphs[1].links.tolist() == [[0, 1], [1, 0], [1, 2], [2, 1]]
    assert graphs[0].x.tolist() == [[0, 0, 1], [1, 0, 0]]  # labels 7, 5: columns 5, 6, 7
    assert TuDataset(name="TOY", root=str(tu), folds=3, attributes=True)._graphs()[0][1].x[0].tolist() == [2.5, 0, 0, 1]


def test_tu_without_features_takes_degrees(tu):
    for ending in ("labels", "attributes"):
        (tu / "TOY" / f"TOY_node_{ending}.txt").unlink()
    assert TuDataset(name="TOY", root=str(tu), folds=3)._graphs()[0][1].x.tolist() == [[1], [2], [1]]


def test_tu_folds_are_stratified_and_cover_everything(tu):
    seen = []
    for fold in range(3):
        source = TuDataset(name="TOY", root=str(tu), folds=3, fold=fold)
        train, test = source.load("train"), source.load("test")
        assert len(train) == 8 and sorted(int(g.label[0]) for g in test) == [0, 0, 1, 1]
        seen += [tuple(g.x.ravel()) + (int(g.label[0]),) for g in test]
    assert sorted(seen) == sorted(tuple(g.x.ravel()) + (int(g.label[0]),) for g in source._graphs()[0])


def test_tu_refusals(tu, tmp_path):
    with pytest.raises(UserError, match=r"data\.source\.fold must be a whole number >= 0 and <= 9, got 10"):
        TuDataset(name="TOY", root=str(tu), fold=10)
    with pytest.raises(UserError, match=r"COX2 not found: looked for .*COX2_A\.txt.*chrsmrrs"):
        TuDataset(name="COX2", root=str(tu)).check()
    with pytest.raises(UserError, match=r"TOY has 2 classes, data\.source\.num_classes is 3"):
        TuDataset(name="TOY", root=str(tu), num_classes=3, folds=3).load("train")
    with pytest.raises(UserError, match=r"too few for data\.source\.folds=10"):
        TuDataset(name="TOY", root=str(tu)).load("train")
    (tu / "TOY" / "TOY_A.txt").write_text("1, 99\n")
    with pytest.raises(UserError, match="a link names node 99 of 30"):
        TuDataset(name="TOY", root=str(tu), folds=3).load("train")
    (tu / "TOY" / "TOY_A.txt").write_text("1, x\n")
    with pytest.raises(UserError, match=r"TOY in .* cannot be read"):
        TuDataset(name="TOY", root=str(tu), folds=3).load("train")
    (tu / "TOY" / "TOY_graph_labels.txt").unlink()
    with pytest.raises(UserError, match="TOY is incomplete"):
        TuDataset(name="TOY", root=str(tu), folds=3).check()
