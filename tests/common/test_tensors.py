import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch._subclasses.fake_tensor import FakeTensorMode

from common.tensors import (
    append_dims,
    detach,
    is_channels_last,
    known_to_host,
    like_layout,
    mean_over_processes,
    only_shapes,
    select_rows,
)


@settings(deadline=None, max_examples=40)
@given(shape=st.lists(st.integers(1, 4), min_size=1, max_size=5))
def test_one_number_per_sample_multiplies_its_sample(shape):
    x, value = torch.rand(shape), torch.rand(shape[0])
    expected = torch.stack([sample * number for sample, number in zip(x, value)])
    assert torch.equal(x * append_dims(value, x), expected)
    assert torch.equal(append_dims(append_dims(value, x), x), append_dims(value, x))


def test_one_number_per_channel():
    x, value = torch.rand(2, 3, 4, 5), torch.rand(3)
    assert torch.equal(x * append_dims(value, x, dim=1), torch.einsum("bchw,c->bchw", x, value))
    assert append_dims(value, torch.ones(0, 3), dim=1).shape == (3,)


def test_a_scalar_serves_all_samples():
    value = torch.tensor(2.0)
    assert append_dims(value, torch.ones(3, 4)) is value


def test_only_shapes_of_meta_and_fake_tensors():
    x = torch.ones(2)
    assert not only_shapes(x) and known_to_host(x)
    for value in (x.to("meta"), FakeTensorMode().from_tensor(x)):
        assert only_shapes(value) and only_shapes(x, value) and not known_to_host(value)
    with FakeTensorMode():
        assert only_shapes() and only_shapes(torch.ones(2))
    assert not only_shapes()


def test_nothing_is_read_while_compiling():
    seen = []

    def f(x):
        seen.append(known_to_host(x))
        return x + 1

    torch.compile(f, backend="eager", fullgraph=False)(torch.ones(2))
    assert seen == [False]


@pytest.mark.parametrize("count", [None, 4])
def test_rows_keep_their_memory_layout(count):
    x = torch.randn(4, 3, 5, 5).to(memory_format=torch.channels_last)
    rows = torch.tensor([2, 0])
    picked = select_rows(x, rows, count)
    assert is_channels_last(picked) and torch.equal(picked, x[rows])
    plain = select_rows(x.contiguous(), rows, count)
    assert plain.is_contiguous() and not is_channels_last(plain) and torch.equal(plain, x[rows])


def test_rows_of_a_structure():
    x, shared, scalar = torch.arange(6.0).reshape(3, 2), torch.ones(1, 2), torch.tensor(7)
    tree = {"x": x, "masks": (x + 1, None), "shared": [shared, scalar], "word": "x"}
    picked = select_rows(tree, torch.tensor([2]), 3)
    assert torch.equal(picked["x"], x[2:]) and torch.equal(picked["masks"][0], x[2:] + 1)
    assert picked["masks"][1] is None and picked["word"] == "x"
    assert picked["shared"][0] is shared and picked["shared"][1] is scalar
    assert select_rows(x[:1], torch.tensor([], dtype=torch.long), 1).shape == (1, 2), "a batch of one is never cut"
    assert select_rows(x[:1], torch.tensor([], dtype=torch.long)).shape == (0, 2)


def test_rows_carry_the_gradient():
    x = torch.ones(3, 2, requires_grad=True)
    select_rows((x,), torch.tensor([1, 1]))[0].sum().backward()
    assert torch.equal(x.grad, torch.tensor([[0.0, 0], [2, 2], [0, 0]]))


def test_layout_follows_the_other_tensor():
    last = torch.randn(2, 3, 4, 4).to(memory_format=torch.channels_last)
    assert is_channels_last(like_layout(torch.randn(2, 3, 4, 4), last))
    assert like_layout(last, last) is last
    assert like_layout(last, torch.randn(2, 3, 4, 4)).is_contiguous()
    assert not is_channels_last(torch.randn(2, 1, 4, 4)) and not is_channels_last(torch.randn(3, 4))


def test_detached_structures_are_constants():
    x = torch.ones(2, requires_grad=True)
    found = detach({"a": (x * 2, None), "b": "word"})
    assert not found["a"][0].requires_grad and torch.equal(found["a"][0], torch.full((2,), 2.0))
    assert found["a"][1] is None and found["b"] == "word"


def test_mean_over_processes(monkeypatch):
    value = torch.tensor([2.0, 4.0])
    assert mean_over_processes(value) is value
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 3)
    others = torch.tensor([1.0, 8.0])  # sum of two other processes
    monkeypatch.setattr(torch.distributed, "all_reduce", lambda own: own.add_(others))
    assert mean_over_processes(value).tolist() == [1.0, 4.0]
