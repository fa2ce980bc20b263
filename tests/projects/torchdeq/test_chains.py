"""The chains are the authors' ones, and only their first nodes know the class."""

import numpy as np
import pytest

from common.data.graph.module import link_matrix
from common.errors import UserError
from projects.torchdeq.chains import Chains


def test_the_default_split_is_that_of_the_authors_code():
    # first nodes and sum of node numbers of each split, as `load_citation_chain` of the IGNN code draws them
    recorded = {
        "train": ([39, 56, 80, 85, 100, 103], 4119),
        "val": ([10, 12, 13, 14, 21, 30], 19988),
        "test": ([1, 3, 6, 9, 11, 16], 41176),
    }
    for split, (start, total) in recorded.items():
        nodes = Chains().load(split)[0].mask.nonzero()[0]
        assert nodes[:6].tolist() == start and nodes.sum() == total
    assert [int(Chains().load(split)[0].mask.sum()) for split in Chains.splits] == [20, 100, 200]


def test_only_the_first_node_of_a_chain_carries_its_class():
    chains = Chains(classes=3, chains=2, length=5, features=4, train_nodes=5, val_nodes=5, test_nodes=5)
    graph = chains.load("train")[0]
    assert graph.x.shape == (30, 4) and graph.label.tolist() == [0] * 10 + [1] * 10 + [2] * 10
    heads = np.arange(0, 30, 5)
    np.testing.assert_array_equal(graph.x[heads].argmax(1), graph.label[heads])
    assert np.count_nonzero(graph.x) == 6
    assert len(graph.links) == 6 * 4 and all(b == a + 1 and b % 5 for a, b in graph.links)


def test_a_class_arrives_after_as_many_hops_as_the_node_is_far():
    chains = Chains(classes=2, chains=1, length=6, features=2, train_nodes=1, val_nodes=1, test_nodes=1)
    graph = chains.load("train")[0]
    links = link_matrix(12, graph.links, "none").T.toarray()
    x = graph.x
    for hop in range(1, 6):
        x = links @ x
        assert x[hop, 0] == 1 and x[6 + hop, 1] == 1 and np.count_nonzero(x) == 2


def test_splits_do_not_overlap_and_noise_is_seeded():
    masks = [Chains(noise=0.1).load(split)[0].mask for split in Chains.splits]
    assert sum(masks).max() == 1
    np.testing.assert_array_equal(Chains(noise=0.1).load("val")[0].x, Chains(noise=0.1).load("train")[0].x)
    assert (Chains(noise=0.1, seed=1).load("val")[0].x != Chains(noise=0.1).load("val")[0].x).any()


@pytest.mark.parametrize(
    "options, sentence",
    [
        ({"length": 1}, r"data\.source\.length must be a whole number >= 2, got 1"),
        ({"classes": 200}, r"data\.source\.features must be a whole number >= 200, got 100"),
        ({"train_nodes": 300}, r"is 600, but there are 2 classes x 20 chains x 10 = 400 nodes"),
    ],
)
def test_refusals(options, sentence):
    with pytest.raises(UserError, match=sentence):
        Chains(**options)
