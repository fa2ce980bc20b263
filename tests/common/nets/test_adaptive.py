"""common/nets/adaptive.py against a slow softmax over the whole vocabulary."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch._subclasses.fake_tensor import FakeTensorMode

from common.errors import UserError
from common.nets.adaptive import AdaptiveVocabulary


def made(vocabulary=23, width=8, cutoffs=(7, 15), divide=2, embed_width=None, std=0.5):
    return AdaptiveVocabulary(
        vocabulary=vocabulary, width=width, cutoffs=cutoffs, divide=divide, embed_width=embed_width, std=std
    )


CASES = [
    dict(),
    dict(cutoffs=(), divide=1),
    dict(cutoffs=(7,), divide=1),
    dict(cutoffs=(), divide=1, embed_width=4),
    dict(cutoffs=(1, 2, 22), divide=1),
]


@pytest.mark.parametrize("options", CASES)
def test_probabilities_sum_to_one_and_are_those_of_the_loss(options):
    words = made(**options)
    hidden, targets = torch.randn(4, 6, 8), torch.arange(24).reshape(4, 6) % 23
    log_probs = words.log_probs(hidden)
    assert log_probs.shape == (4, 6, 23)
    torch.testing.assert_close(log_probs.exp().sum(-1), torch.ones(4, 6))
    expected = -log_probs.gather(-1, targets.unsqueeze(-1)).squeeze(-1)
    torch.testing.assert_close(words.nll(hidden, targets), expected)


@pytest.mark.parametrize("options", CASES)
def test_embedding_is_the_row_of_the_cluster_projected_and_scaled(options):
    words = made(**options)
    tokens = torch.arange(23)
    found = words.embed(tokens)
    for token in range(23):
        cluster = max(i for i, first in enumerate(words.firsts) if token >= first)
        vector = words.tables[cluster][token - words.firsts[cluster]]
        if len(words.inward):
            vector = words.inward[cluster] @ vector
        torch.testing.assert_close(found[token], vector * 8**0.5)


def test_every_parameter_has_a_gradient_even_when_a_cluster_is_empty():
    words = made()
    targets = torch.zeros(2, 3, dtype=torch.int64)  # all in the first cluster
    (words.nll(torch.randn(2, 3, 8), targets).sum() + words.embed(targets).sum()).backward()
    assert all(p.grad is not None for p in words.parameters())
    assert words.tables[2].grad.abs().max() == 0


def test_ignored_targets_cost_nothing_and_send_no_gradient():
    words = made()
    hidden = torch.randn(2, 3, 8, requires_grad=True)
    targets = torch.tensor([[1, -1, 20], [-1, 9, -1]])
    loss = words.nll(hidden, targets)
    assert (loss == 0).equal(targets < 0)
    loss.sum().backward()
    assert (hidden.grad.abs().sum(-1) == 0).equal(targets < 0)


def test_tables_are_shared_and_projections_start_alike_in_the_tails():
    words = made()
    torch.testing.assert_close(words.outward[1], words.inward[1])
    assert not words.outward[0].equal(words.inward[0])
    before = words.embed(torch.tensor([3])), words.nll(torch.ones(1, 8), torch.tensor([3]))
    with torch.no_grad():
        words.tables[0][3] += 1
    after = words.embed(torch.tensor([3])), words.nll(torch.ones(1, 8), torch.tensor([3]))
    assert not before[0].equal(after[0]) and not before[1].equal(after[1])


def test_shapes_alone_suffice_for_planning():
    with FakeTensorMode():
        words = made()
        loss = words.nll(torch.empty(4, 6, 8), torch.zeros(4, 6, dtype=torch.int64)).mean()
        loss = loss + words.embed(torch.zeros(4, 6, dtype=torch.int64)).sum()
        loss.backward()
        assert all(p.grad is not None for p in words.parameters())


@settings(max_examples=25, deadline=None)
@given(st.data())
def test_any_clusters_normalise(data):
    vocabulary = data.draw(st.integers(2, 30))
    cutoffs = sorted(data.draw(st.sets(st.integers(1, vocabulary - 1), max_size=3)))
    divide = data.draw(st.sampled_from([1, 2]))
    words = made(vocabulary=vocabulary, cutoffs=cutoffs, divide=divide)
    total = words.log_probs(torch.randn(2, 8)).exp().sum(-1)
    torch.testing.assert_close(total, torch.ones(2))


@pytest.mark.parametrize(
    "options, text",
    [
        (dict(cutoffs=(7, 7)), "cutoffs must rise inside 1..22"),
        (dict(cutoffs=(23,)), "cutoffs must rise"),
        (dict(cutoffs=(0,)), "cutoffs must rise"),
        (dict(divide=8), "leaves no width"),
        (dict(vocabulary=0), "vocabulary must be"),
    ],
)
def test_refusals(options, text):
    with pytest.raises(UserError, match=text):
        made(**options)
