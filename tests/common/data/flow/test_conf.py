"""conf/data of flow: keys are the signatures', crops, sizes and weights the published ones."""

import inspect
import re

import pytest
from omegaconf import OmegaConf

from common.data.flow.module import FlowData
from common.runtime.cli.check import check
from common.runtime.verbs.assemble import instantiate
from common.targets import resolve

# name: (crop, batch, {training set: (weight, min_scale, max_scale, flip)}, evaluation sets); paper and released code
PUBLISHED = {
    "flying_chairs": ([368, 496], 12, {"chairs": (1, -0.1, 1.0, True)}, ["chairs"]),
    "flying_things": (
        [400, 720], 6, {"things_clean": (1, -0.4, 0.8, True), "things_final": (1, -0.4, 0.8, True)},
        ["sintel_clean", "sintel_final", "kitti"],
    ),
    "sintel": (
        [368, 768], 6,
        {
            "sintel_clean": (100, -0.2, 0.6, True), "sintel_final": (100, -0.2, 0.6, True),
            "kitti": (200, -0.3, 0.5, True), "hd1k": (5, -0.5, 0.2, True), "things_clean": (1, -0.2, 0.6, True),
        },
        ["sintel_clean", "sintel_final", "kitti"],
    ),
    "kitti": ([288, 960], 6, {"kitti": (1, -0.2, 0.4, False)}, ["kitti"]),
}  # fmt: skip
NAMES = (*PUBLISHED, "chairs_things", "synthflow")


def keys(node):
    return {key for key in node if key != "_target_"}


def composed(repo, name, root="nowhere"):
    data = OmegaConf.load(repo / "conf" / "data" / f"{name}.yaml")
    return OmegaConf.create({"seed": 0, "paths": {"data": root}, "data": data})


def targets(node):
    if OmegaConf.is_dict(node):
        if "_target_" in node:
            yield node
        for value in node.values():
            yield from targets(value)


@pytest.mark.parametrize("name", NAMES)
def test_keys_are_the_signature(repo, name):
    config = composed(repo, name)
    check(config)
    assert resolve(config.data._target_) is FlowData
    for node in targets(config.data):
        assert keys(node) == set(inspect.signature(resolve(node._target_)).parameters), node._target_
    data = instantiate(config.data)
    assert data.name == name and data.crop == tuple(config.data.crop)


@pytest.mark.parametrize("name", PUBLISHED)
def test_numbers_are_the_published_ones(repo, name):
    crop, batch, train, evaluation = PUBLISHED[name]
    config = composed(repo, name).data
    assert (config.crop, config.batch_size, list(config.evaluation)) == (crop, batch, evaluation)
    found = {
        key: (part.weight, part.augment.min_scale, part.augment.max_scale, part.augment.flip)
        for key, part in config.train.items()
    }
    assert found == train
    for key, part in config.train.items():
        assert part.augment._target_.endswith("SparseAugment" if key in ("kitti", "hd1k") else "DenseAugment")
        assert part.augment.photometric and part.augment.eraser


def test_one_word_changes_them(repo):
    config = composed(repo, "sintel")
    config.data.merge_with({"crop": [320, 448], "root": "elsewhere", "evaluation": {"kitti": None}})
    config.data.train.kitti.weight = config.data.train.hd1k.weight = 0  # C+T+S
    check(config)
    data = instantiate(config.data)
    assert set(data.train) == {"sintel_clean", "sintel_final", "things_clean"}
    assert data.train["sintel_clean"].augment.crop == [320, 448]
    assert data.train["things_clean"].source.root == "elsewhere" and data.splits == ("sintel_clean", "sintel_final")


@pytest.mark.parametrize("name", NAMES)
def test_every_number_has_a_comment(repo, name):
    plain = r"(_target_|source|seed|augment|#|root: \$|name: \w+$|split: \w+$|crop: \$|size: \$|train:|\w+:$)"
    for line in (repo / "conf" / "data" / f"{name}.yaml").read_text().splitlines():
        assert re.match(plain, line.strip()) or "  # " in line, line


def test_synthflow_trains_and_evaluates(repo, data_folder):
    data = instantiate(composed(repo, "synthflow", str(data_folder("flow").parent)).data)
    data.check()
    assert data.splits == ("held_out", "pairs_chairs", "pairs_middlebury", "pairs_sintel", "pairs_kitti")
    assert next(iter(data.train_dataloader()))["first"].shape == (8, 3, 96, 128)
    assert [len(data.pairs(split)) for split in data.splits] == [64, 3, 2, 1, 2]
