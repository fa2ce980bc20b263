"""conf/data: every file fits the signatures it names, both ways, and explains every key."""

import inspect
import re

import pytest
from omegaconf import OmegaConf

from common.data.images.module import ImageDataModule
from common.data.latents.module import LatentDataModule
from common.runtime.cli.check import check
from common.targets import resolve

PIXELS = ("digits", "cifar10", "mnist", "fashion_mnist", "imagenet64", "imagenet", "imagenet256", "folder")
LATENTS = ("imagenet_latents256",)
NAMES = (*PIXELS, *LATENTS)


def keys(node):
    return set(node) - {"_target_"}


@pytest.mark.parametrize("name", NAMES)
def test_keys_are_the_signature(repo, name):
    data = OmegaConf.load(repo / "conf" / "data" / f"{name}.yaml")
    config = OmegaConf.create({"seed": 0, "paths": {"data": "somewhere"}, "data": data})
    check(config)
    kind = LatentDataModule if name in LATENTS else ImageDataModule
    assert resolve(config.data._target_) is kind
    assert keys(config.data) == set(inspect.signature(kind).parameters)
    source = resolve(config.data.source._target_)
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


def test_variants_of_imagenet_for_generation(repo):
    """Sizes, preparation and normalisation; the numbers are those of the authors' code (latent scale and moments)."""
    from hydra import compose, initialize_config_dir

    def data(name):
        with initialize_config_dir(str(repo / "conf"), version_base="1.3"):
            return compose("config", overrides=[f"data={name}", "project=meanflow"]).data

    for side in (256, 512):
        pixels = data(f"imagenet{side}").source
        assert (pixels.resolution, pixels.fit, pixels.num_classes, pixels.channels) == (side, "adm", 1000, 3)
    scaled, standard = data("imagenet_latents256"), data("imagenet_latents256_standard")
    for latents in (scaled, standard):
        assert (latents.source.resolution, latents.source.channels, latents.reference.fit) == (32, 4, "adm")
        assert latents.reference.resolution == 256 and latents.xflip
    assert 1 / scaled.source.std == pytest.approx(0.18215, rel=1e-15) and scaled.source.mean == 0
    assert list(standard.source.mean) == [0.86488, -0.27787343, 0.21616915, 0.3738409]
    assert list(standard.source.std) == [4.85503674, 5.31922414, 3.93725398, 3.9870003]
