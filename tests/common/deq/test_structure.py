from collections import OrderedDict, namedtuple

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils import _pytree as pytree

from common.deq.structure import Layout, take_rows
from common.errors import UserError

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
Pair = namedtuple("Pair", "h c")

leaves = st.tuples(st.lists(st.integers(0, 3), max_size=3), st.sampled_from(DTYPES))
trees = st.recursive(
    leaves.map(lambda leaf: ("leaf", *leaf)),
    lambda inner: st.one_of(
        st.lists(inner, min_size=1, max_size=3),
        st.lists(inner, min_size=1, max_size=3).map(lambda parts: ("tuple", parts)),
        st.dictionaries(st.sampled_from("abcd"), inner, min_size=1, max_size=3),
        st.tuples(inner, inner).map(lambda parts: ("pair", parts)),
    ),
    max_leaves=5,
)


def build(tree, batch: int):
    """A state from a drawn description; leaf shapes are (batch, ...)."""
    if isinstance(tree, dict):
        return {key: build(part, batch) for key, part in tree.items()}
    if isinstance(tree, list):
        return [build(part, batch) for part in tree]
    if tree[0] == "leaf":
        return torch.randn(batch, *tree[1]).to(tree[2])
    parts = [build(part, batch) for part in tree[1]]
    return Pair(*parts) if tree[0] == "pair" else tuple(parts)


def reversed_keys(tree):
    if isinstance(tree, dict):
        return {key: reversed_keys(tree[key]) for key in reversed(tree)}
    if isinstance(tree, Pair):
        return Pair(*map(reversed_keys, tree))
    return type(tree)(map(reversed_keys, tree)) if isinstance(tree, list | tuple) else tree


@settings(deadline=None, max_examples=80)
@given(tree=trees, batch=st.integers(0, 4))
def test_round_trip(tree, batch):
    z = build(tree, batch)
    layout = Layout.of(z)
    flat = layout.pack(z)
    leaves, spec = pytree.tree_flatten(z)
    assert flat.shape == (batch, sum(leaf[0].numel() if batch else layout.widths[i] for i, leaf in enumerate(leaves)))
    assert flat.dtype in (torch.float32, torch.float64)
    assert flat.dtype == torch.float64 or all(leaf.dtype != torch.float64 for leaf in leaves), "nothing is narrowed"
    back, back_spec = pytree.tree_flatten(layout.unpack(flat))
    assert back_spec == spec
    for a, b in zip(leaves, back, strict=True):
        assert a.dtype == b.dtype and a.shape == b.shape and torch.equal(a, b)
    assert torch.equal(layout.pack_image(reversed_keys(z), batch), flat), "the keys of a dict come in any order"


@settings(deadline=None, max_examples=40)
@given(tree=trees, batch=st.integers(1, 4), data=st.data())
def test_rows(tree, batch, data):
    z = build(tree, batch)
    rows = torch.tensor(data.draw(st.lists(st.integers(0, batch - 1), unique=True, max_size=batch)), dtype=torch.int64)
    layout = Layout.of(z)
    part = take_rows(z, rows)
    assert torch.equal(layout.pack(part), layout.pack(z)[rows]), "row b of the matrix is sample b"
    unpacked = pytree.tree_leaves(layout.unpack(layout.pack(z)[rows]))
    assert all(torch.equal(a, b) for a, b in zip(unpacked, pytree.tree_leaves(part), strict=True))


def test_layout_of_known_cases():
    z = {"h": torch.arange(6.0).reshape(2, 3), "c": (torch.tensor([10.0, 11.0], dtype=torch.float16),)}
    layout = Layout.of(z)
    expected = torch.tensor([[0.0, 1, 2, 10], [3, 4, 5, 11]])
    assert torch.equal(layout.pack(z), expected) and layout.widths == (3, 1)
    assert layout.unpack(expected)["c"][0].shape == (2,) and layout.unpack(expected)["c"][0].dtype == torch.float16
    scalar = Layout.of(torch.tensor(3.0))
    assert scalar.pack(torch.tensor(3.0)).shape == (1, 1) and scalar.unpack(torch.tensor([[4.0]])).shape == ()
    assert take_rows((torch.arange(3), "x", None), torch.tensor([2])) == (torch.tensor([2]), "x", None)


def test_what_needs_no_copy_is_not_copied():
    z = torch.randn(3, 4, 5)
    layout = Layout.of(z)
    flat = layout.pack(z)
    assert flat.data_ptr() == z.data_ptr() and layout.unpack(flat).data_ptr() == z.data_ptr()
    strided = torch.randn(3, 5, 4).mT
    assert torch.equal(Layout.of(strided).unpack(Layout.of(strided).pack(strided)), strided)
    expanded = torch.randn(1, 4).expand(3, 4)
    assert torch.equal(Layout.of(expanded).pack(expanded), expanded)


def test_gradients_pass_through_both_ways():
    z = {"a": torch.randn(2, 3, requires_grad=True), "b": torch.randn(2, dtype=torch.float64, requires_grad=True)}
    layout = Layout.of(z)
    back = layout.unpack(layout.pack(z))
    (back["a"].sum() + 2 * back["b"].sum()).backward()
    assert torch.equal(z["a"].grad, torch.ones(2, 3)) and torch.equal(z["b"].grad, 2 * torch.ones(2).double())


@pytest.mark.parametrize(
    "z, message",
    [
        (torch.zeros(2, 3, dtype=torch.int64), "got torch.int64"),
        (torch.zeros(2, dtype=torch.complex64), "got torch.complex64"),
        ((), "got nothing"),
        (None, "got NoneType"),
        ("z", "got str"),
        ((torch.zeros(2), None), "got torch.float32, NoneType"),
        ((torch.zeros(2, 3), torch.zeros(3, 3)), r"got shapes \(2, 3\), \(3, 3\)"),
        ((torch.zeros(2), torch.zeros(())), r"got shapes \(2,\), \(\)"),
        ({"a": torch.zeros(())} | {"b": torch.zeros(())}, "same leading batch dimension"),
    ],
)
def test_states_that_are_none(z, message):
    with pytest.raises(UserError, match=message):
        Layout.of(z)


ONE, NESTED = torch.zeros(2, 3), {"a": torch.zeros(2, 3), "b": (torch.zeros(2, 1), torch.zeros(2))}


@pytest.mark.parametrize(
    "z, image, message",
    [
        (ONE, None, "fn returned None. Return the next state"),
        (NESTED, None, "fn returned None"),
        (ONE, (ONE,), r"fn returned \(tensor\), but z0 is tensor."),
        (ONE, 3.0, "fn returned float, but z0 is tensor"),
        (
            NESTED,
            ONE,
            r"fn returned tensor, but z0 is \{a: tensor, b: \(tensor, tensor\)\}. Return",
        ),
        (NESTED, {"a": ONE, "c": (ONE, ONE)}, r"fn returned \{a: tensor, c: \(tensor, tensor\)\}, but z0"),
        (NESTED, {"a": ONE, "b": [ONE, ONE]}, r"fn returned \{a: tensor, b: \[tensor, tensor\]\}, but"),
        (NESTED, {"a": ONE, "b": (ONE, None)}, r"\{a: tensor, b: \(tensor, NoneType\)\}, but"),
        (NESTED, {"a": ONE, "b": (ONE, (ONE,))}, r"\(tensor, \(tensor\)\)\}, but"),
        (ONE, torch.zeros(2, 4), r"changed the shape of the state: \(2, 3\) became \(2, 4\)"),
        (ONE, torch.zeros(1, 3), r"\(2, 3\) became \(1, 3\)"),
        (ONE, torch.zeros(2, 3, 1), r"\(2, 3\) became \(2, 3, 1\)"),
        (ONE, torch.zeros(()), r"\(2, 3\) became \(\)"),
        (torch.zeros(()), torch.zeros(1), r"\(\) became \(1,\)"),
        (NESTED, {"a": ONE, "b": (torch.zeros(2, 1), torch.zeros(2, 1))}, r"in tensor 2 of the state: \(2,\) became"),
    ],
)
def test_images_that_are_no_states(z, image, message):
    with pytest.raises(UserError, match=message):
        Layout.of(z).pack_image(image, 1 if z is not NESTED and z.dim() == 0 else 2)


def test_images_of_another_precision_are_states():
    assert Layout.of(ONE).pack_image(ONE.bfloat16(), 2).dtype == torch.float32
    ordered = OrderedDict(b=(torch.ones(2, 1), torch.ones(2)), a=torch.zeros(2, 3))
    assert torch.equal(Layout.of(NESTED).pack_image(ordered, 2), torch.tensor([[0.0, 0, 0, 1, 1]] * 2))
