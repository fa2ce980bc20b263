"""Short hashes."""

import torch

from common.metrics.hashes import safe_name, short_hash, tensors_hash


def test_equal_content_equal_hash_whatever_the_order():
    a, b = torch.arange(3.0), torch.ones(2, 2)
    assert tensors_hash({"a": a, "b": b}, "x") == tensors_hash({"b": b.clone(), "a": a.t()}, "x")
    assert len(short_hash("a")) == 16


def test_every_part_counts():
    a = torch.arange(4.0)
    variants = [
        ({"a": a}, ()), ({"b": a}, ()), ({"a": a.double()}, ()), ({"a": a.view(2, 2)}, ()), ({"a": a + 1e-7}, ()),
        ({"a": a}, ("x",)), ({"a": a.to(torch.bfloat16)}, ()),
    ]  # fmt: skip
    assert len({tensors_hash(tensors, *extra) for tensors, extra in variants}) == len(variants)
    assert short_hash("ab", "c") != short_hash("a", "bc")


def test_safe_name():
    assert safe_name("cifar10/train[:500]") == "cifar10-train-500"
    assert safe_name("../..") == "unnamed"
