"""Link matrices, Perron roots, block-diagonal batches, and which graphs a run sees."""

import inspect
import re
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from omegaconf import OmegaConf

from common.data.graph.module import (
    Graph,
    GraphDataModule,
    GraphSet,
    both_ways,
    link_matrix,
    perron_root,
    row_normalise,
)
from common.errors import UserError
from common.runtime.cli.check import check
from common.targets import resolve


def graph(nodes: int, seed: int, level: str = "graph") -> Graph:
    random = np.random.default_rng(seed)
    pairs = random.integers(0, nodes, size=(2 * nodes, 2))
    labels = 1 if level == "graph" else nodes
    return Graph(
        x=random.normal(size=(nodes, 3)).astype(np.float32),
        links=both_ways(pairs, nodes),
        label=random.integers(0, 4, size=labels),
        mask=np.ones(labels, dtype=bool),
    )


class Source:
    name, num_classes, splits = "toy", 4, ("train", "test")

    def __init__(self, count: int = 7):
        self.count = count

    def check(self) -> None:
        pass

    def load(self, split: str) -> list[Graph]:
        return [graph(3 + k, seed=k) for k in range(self.count)]


def test_symmetric_normalisation_of_three_nodes_by_hand():
    # 0 - 1 - 2: degrees with loops 2, 3, 2
    matrix = link_matrix(3, both_ways(np.array([[0, 1], [1, 2]]), 3), "symmetric").toarray()
    r = 1 / np.sqrt(6)
    np.testing.assert_allclose(matrix, [[1 / 2, r, 0], [r, 1 / 3, r], [0, r, 1 / 2]])


def test_links_go_from_source_to_target_and_row_sums_scale_both_sides():
    matrix = link_matrix(2, np.array([[0, 1]]), "symmetric").toarray()
    np.testing.assert_allclose(matrix, [[1 / 2, 1 / np.sqrt(2)], [0, 1]])
    np.testing.assert_array_equal(link_matrix(2, np.array([[0, 1]]), "none").toarray(), [[0, 1], [0, 0]])


def test_a_node_without_links_keeps_only_itself():
    assert link_matrix(1, np.zeros((0, 2), dtype=int), "symmetric").toarray() == [[1.0]]


def test_unknown_normalisation_is_named():
    with pytest.raises(UserError, match=r"data\.normalise .*Closest: symmetric"):
        link_matrix(1, np.zeros((0, 2), dtype=int), "symetric")


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 90), st.floats(0, 3), st.integers(0, 1000), st.booleans())
def test_perron_root_is_the_largest_eigenvalue(nodes, density, seed, directed):
    random = np.random.default_rng(seed)
    links = np.unique(random.integers(0, nodes, size=(int(density * nodes), 2)), axis=0)
    if not directed:
        links = both_ways(links, nodes)
    matrix = link_matrix(nodes, links, "none")
    dense = np.linalg.eigvals(matrix.toarray())
    # eigenvalues of Jordan blocks are only good to eps^(1/size) in the dense reference
    assert perron_root(matrix) == pytest.approx(np.abs(dense).max(initial=0), abs=2e-3 if directed else 1e-8)


def test_perron_root_of_a_chain_a_cycle_and_a_large_star():
    chain = np.array([[k, k + 1] for k in range(200)])
    assert perron_root(link_matrix(201, chain, "none")) == 0
    assert perron_root(link_matrix(201, chain, "symmetric")) == 1  # the last node has only its loop
    cycle = np.array([[k, (k + 1) % 300] for k in range(300)])  # 300 eigenvalues of modulus 1
    assert perron_root(link_matrix(300, cycle, "none")) == pytest.approx(1, abs=1e-6)
    star = both_ways(np.array([[0, k] for k in range(1, 401)]), 401)
    assert perron_root(link_matrix(401, star, "none")) == pytest.approx(20, abs=1e-8)


def test_symmetric_normalisation_has_radius_one():
    assert perron_root(link_matrix(150, graph(150, 3).links, "symmetric")) == pytest.approx(1, abs=1e-8)


def test_both_ways_drops_loops_and_doubles():
    links = both_ways(np.array([[2, 0], [0, 2], [1, 1], [0, 1], [0, 1]]), 3)
    assert links.tolist() == [[0, 1], [0, 2], [1, 0], [2, 0]]
    assert both_ways(np.zeros((0, 2)), 0).shape == (0, 2)


def test_row_normalise_leaves_empty_rows_empty():
    np.testing.assert_array_equal(row_normalise(np.array([[1.0, 3.0], [0.0, 0.0]])), [[0.25, 0.75], [0, 0]])


def test_a_batch_is_the_graphs_side_by_side():
    graphs = [graph(4, 0), graph(6, 1), graph(3, 2)]
    made = GraphSet(graphs, "symmetric", None)
    batch = made.collate([2, 0])
    outgoing = batch["outgoing"].to_dense()
    np.testing.assert_allclose(outgoing[:3, :3], link_matrix(3, graphs[2].links, "symmetric").toarray(), rtol=1e-6)
    np.testing.assert_allclose(outgoing[3:, 3:], link_matrix(4, graphs[0].links, "symmetric").toarray(), rtol=1e-6)
    assert not outgoing[:3, 3:].any() and not outgoing[3:, :3].any()
    assert torch.equal(batch["incoming"].to_dense(), outgoing.T)
    assert batch["owner"].tolist() == [0, 0, 0, 1, 1, 1, 1]
    assert batch["label"].tolist() == [graphs[2].label[0], graphs[0].label[0]]
    assert torch.equal(batch["x"], torch.from_numpy(np.concatenate([graphs[2].x, graphs[0].x])))
    assert batch["radius"].shape == () and batch["radius"] == pytest.approx(1, abs=1e-6)
    assert batch["incoming"].layout == torch.sparse_csr and batch["x"].dtype == torch.float32


def test_the_radius_of_a_batch_is_the_largest_or_the_one_given():
    graphs = [graph(5, 0), graph(40, 1)]
    made = GraphSet(graphs, "none", None)
    assert made.collate([0, 1])["radius"] == pytest.approx(max(made.radii))
    assert made.radii[0] != made.radii[1]
    assert GraphSet(graphs, "none", 2.0).collate([0, 1])["radius"] == 2


def test_a_batch_handed_out_twice_is_not_spoiled_by_its_user():
    made = GraphSet([graph(4, 0)], "none", 1.0)
    made.collate([0]).clear()
    assert "x" in made.collate([0])


def first(module: GraphDataModule, count: int) -> list[list[int]]:
    """Node counts of the first batches: toy graph k has 3 + k nodes."""
    stream = iter(module.train_dataloader())
    return [torch.bincount(next(stream)["owner"]).tolist() for _ in range(count)]


def test_the_order_depends_on_seed_and_position_alone():
    one = first(GraphDataModule(source=Source(), batch_size=3, seed=5), 8)
    assert one == first(GraphDataModule(source=Source(), batch_size=3, seed=5), 8)
    assert one != first(GraphDataModule(source=Source(), batch_size=3, seed=6), 8)
    seen = [size for batch in one for size in batch]
    assert sorted(seen[:7]) == sorted(seen[7:14]) == [3, 4, 5, 6, 7, 8, 9]  # every graph once per epoch
    assert first(GraphDataModule(source=Source(), batch_size=3, shuffle=False), 3) == [[3, 4, 5], [6, 7, 8], [9, 3, 4]]


def trainer(processed: int = 0, rank: int = 0, world: int = 1) -> SimpleNamespace:
    total = SimpleNamespace(processed=processed)
    return SimpleNamespace(
        accumulate_grad_batches=1,
        overfit_batches=0,
        global_rank=rank,
        world_size=world,
        distributed_sampler_kwargs={"rank": rank, "num_replicas": world},
        fit_loop=SimpleNamespace(epoch_loop=SimpleNamespace(batch_progress=SimpleNamespace(total=total))),
    )


def test_a_restart_goes_on_where_the_run_stopped():
    straight = first(GraphDataModule(source=Source(), batch_size=2, seed=1), 9)
    stopped = GraphDataModule(source=Source(), batch_size=2, seed=1)
    stopped.trainer = trainer(processed=5)
    resumed = GraphDataModule(source=Source(), batch_size=2, seed=1)
    resumed.trainer = trainer(processed=5)
    resumed.load_state_dict(stopped.state_dict())
    assert first(resumed, 4) == straight[5:]


def test_two_processes_share_the_batch_of_one():
    joint = first(GraphDataModule(source=Source(), batch_size=4, seed=2), 3)
    shares = []
    for rank in (0, 1):
        module = GraphDataModule(source=Source(), batch_size=4, seed=2)
        module.trainer = trainer(rank=rank, world=2)
        shares.append(first(module, 3))
    assert [a + b for a, b in zip(*shares)] == joint


def test_evaluation_shows_every_graph_once():
    module = GraphDataModule(source=Source(), eval_batch_size=3)
    batches = module.eval_batches("test")
    assert len(batches) == 3
    assert [torch.bincount(b["owner"]).tolist() for b in batches] == [[3, 4, 5], [6, 7, 8], [9]]


@pytest.mark.parametrize(
    "options, sentence",
    [
        ({"batch_size": 0}, r"data\.batch_size must be a whole number >= 1"),
        ({"eval_batch_size": 0}, r"data\.eval_batch_size must be a whole number >= 1"),
        ({"normalise": "row"}, r"data\.normalise must be one of"),
        ({"radius": 0.0}, r"data\.radius must be > 0"),
    ],
)
def test_refusals(options, sentence):
    with pytest.raises(UserError, match=sentence):
        GraphDataModule(source=Source(), **options)


def test_unknown_split_is_named():
    with pytest.raises(UserError, match=r"no split 'tset'\. Closest: test"):
        GraphDataModule(source=Source()).eval_batches("tset")


@pytest.mark.parametrize("name", ["chains", "cora", "citeseer", "ppi", "tu"])
def test_configuration_is_the_signature_and_every_number_has_a_comment(repo, name):
    file = repo / "conf" / "data" / f"{name}.yaml"
    config = OmegaConf.create({"seed": 0, "paths": {"data": "somewhere"}, "data": OmegaConf.load(file)})
    check(config)
    assert resolve(config.data._target_) is GraphDataModule
    assert set(config.data) - {"_target_"} == set(inspect.signature(GraphDataModule).parameters)
    source = resolve(config.data.source._target_)
    assert set(config.data.source) - {"_target_"} == set(inspect.signature(source).parameters)
    for line in file.read_text().splitlines():
        if not re.match(r"\s*(_target_|source:$|#|root: \$\{data\.root\})", line.strip()):
            assert "  # " in line, line
