"""The order of images: a permutation per epoch, the same stream from any start and for any number of processes."""

from itertools import islice

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from common.data.sampler import EvalSampler, StatelessSampler, epoch_order
from common.errors import UserError

fast = settings(deadline=None, max_examples=50)
ORDER_0_0 = [4, 3, 11, 10, 8, 0, 5, 9, 6, 7, 1, 2]
ORDER_7_3 = [1, 7, 5, 8, 9, 2, 3, 11, 10, 0, 6, 4]
sizes, seeds = st.integers(1, 60), st.integers(0, 2**40)


def stream(count, **kwargs):
    batches = list(islice(StatelessSampler(**kwargs), count))
    return [draw for batch in batches for draw in batch]


@fast
@given(size=sizes, seed=seeds, epoch=st.integers(0, 10**6))
def test_every_epoch_is_a_permutation_of_its_own(size, seed, epoch):
    order = epoch_order(seed, epoch, size)
    assert sorted(order.tolist()) == list(range(size))
    np.testing.assert_array_equal(order, epoch_order(seed, epoch, size))


def test_epochs_and_seeds_differ():
    orders = {tuple(epoch_order(seed, epoch, 50)) for seed in range(4) for epoch in range(4)}
    assert len(orders) == 16


def test_the_order_never_changes_between_versions():
    assert epoch_order(0, 0, 12).tolist() == ORDER_0_0
    assert epoch_order(7, 3, 12).tolist() == ORDER_7_3


@fast
@given(size=sizes, batch=st.integers(1, 25), seed=seeds, shuffle=st.booleans())
def test_stream_is_one_permutation_after_the_other(size, batch, seed, shuffle):
    draws = stream(3 * size // batch + 1, dataset_size=size, batch_size=batch, seed=seed, shuffle=shuffle)
    assert [position for _, position in draws] == list(range(len(draws)))
    for epoch in range(len(draws) // size):
        seen = [index for index, _ in draws[epoch * size : (epoch + 1) * size]]
        assert seen == (epoch_order(seed, epoch, size).tolist() if shuffle else list(range(size)))


@fast
@given(size=sizes, batch=st.integers(1, 25), seed=seeds, first=st.integers(0, 200), other=st.integers(1, 25))
def test_any_start_continues_the_same_stream(size, batch, seed, first, other):
    straight = stream((first + 100) // batch + 1, dataset_size=size, batch_size=batch, seed=seed)
    resumed = stream(100 // other, dataset_size=size, batch_size=other, seed=seed, start=first)
    assert resumed == straight[first : first + len(resumed)]


@fast
@given(size=sizes, share=st.integers(1, 8), world=st.integers(1, 5), seed=seeds, start=st.integers(0, 100))
def test_joint_batch_does_not_depend_on_the_number_of_processes(size, share, world, seed, start):
    common = dict(dataset_size=size, batch_size=share * world, seed=seed, start=start)
    alone = list(islice(StatelessSampler(**common), 5))
    ranks = [list(islice(StatelessSampler(**common, rank=rank, world_size=world), 5)) for rank in range(world)]
    for number, joint in enumerate(alone):
        assert [draw for rank in ranks for draw in rank[number]] == joint


def test_start_may_be_asked_anew_at_every_iteration():
    place = [0]
    sampler = StatelessSampler(dataset_size=9, batch_size=3, start=lambda: place[0])
    first = [next(iter(sampler)) for _ in range(2)]
    place[0] = 6
    assert first[0] == first[1] != next(iter(sampler))
    assert [position for _, position in next(iter(sampler))] == [6, 7, 8]


def test_it_is_endless_and_remembers_two_epochs_at_most():
    sampler = StatelessSampler(dataset_size=4, batch_size=3)
    with pytest.raises(TypeError):
        len(sampler)
    list(islice(sampler, 50))
    assert len(sampler._orders) == 2


def test_bad_sizes_are_refused_in_one_sentence():
    with pytest.raises(UserError, match=r"data\.batch_size must be a whole number >= 1, got 0"):
        StatelessSampler(dataset_size=4, batch_size=0)
    with pytest.raises(
        UserError,
        match=r"data\.batch_size must be a multiple of 3 \(the number of processes\), got 8\. Set data\.batch_size=6,",
    ):
        StatelessSampler(dataset_size=4, batch_size=8, world_size=3)
    with pytest.raises(UserError, match="at least 1 image"):
        StatelessSampler(dataset_size=0, batch_size=1)
    with pytest.raises(UserError, match="eval_batch_size must be a whole number >= 1, got 0"):
        EvalSampler(dataset_size=4, batch_size=0)


@fast
@given(size=sizes, batch=st.integers(1, 25), world=st.integers(1, 5))
def test_evaluation_takes_every_image_once(size, batch, world):
    ranks = [EvalSampler(dataset_size=size, batch_size=batch, rank=r, world_size=world) for r in range(world)]
    seen = sorted(index for rank in ranks for part in rank for index, _ in part)
    assert seen == list(range(size))
    assert all(len(rank) == len(list(rank)) for rank in ranks)
