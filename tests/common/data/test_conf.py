"""conf/data: every file fits the signatures it names, both ways, and explains every key."""

import inspect
import re

import pytest
from omegaconf import OmegaConf

from common.data.images import ImageDataModule
from common.runtime.check import check, locate

NAMES = ("digits", "cifar10", "mnist", "fashion_mnist", "imagenet64", "imagenet", "folder")


def keys(node):
    return set(node) - {"_target_"}


@pytest.mark.parametrize("name", NAMES)
def test_keys_are_the_signature(repo, name):
    data = OmegaConf.load(repo / "conf" / "data" / f"{name}.yaml")
    config = OmegaConf.create({"seed": 0, "paths": {"data": "somewhere"}, "data": data})
    check(config)
    assert locate(config.data._target_) is ImageDataModule
    assert keys(config.data) == set(inspect.signature(ImageDataModule).parameters)
    source = locate(config.data.source._target_)
    assert keys(config.data.source) == set(inspect.signature(source).parameters)
    made = source(**{key: config.data.source[key] for key in keys(config.data.source)})
    for fact in ("name", "num_classes", "channels", "resolution", "splits"):
        assert hasattr(made, fact)
    if "root" in config.data.source:
        config.data.root = "elsewhere"
        assert config.data.source.root == "elsewhere"


@pytest.mark.parametrize("name", NAMES)
def test_every_number_has_a_comment(repo, name):
    for line in (repo / "conf" / "data" / f"{name}.yaml").read_text().splitlines():
        if re.match(r"\s*(_target_|source|seed|#|root: \$\{data\.root\}|name: \w+$)", line.strip()):
            continue
        assert "  # " in line, line
