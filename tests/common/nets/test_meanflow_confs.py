"""conf/net/{meanflow,dit,mit,pmf}_*.yaml: they build, say every option, and have the count their first line states."""

import inspect
import re
from pathlib import Path

import pytest
import torch
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf

from common.runtime.cli.launch import register_resolvers
from common.targets import resolve
from common.weights.build import build

CONF = Path(__file__).resolve().parents[3] / "conf"
NAMES = sorted(p.stem for kind in ("meanflow", "dit", "mit", "pmf") for p in (CONF / "net").glob(f"{kind}_*.yaml"))


def composed(name: str) -> dict:
    register_resolvers()
    with initialize_config_dir(str(CONF), version_base="1.3"):
        return OmegaConf.to_container(compose(f"net/{name}").net, resolve=True)


def says_every_option(config: dict) -> None:
    known = set(inspect.signature(resolve(config["_target_"])).parameters)
    assert set(config) - {"_target_"} == known
    if isinstance(config.get("model"), dict):
        says_every_option(config["model"])


@pytest.mark.parametrize("name", NAMES)
def test_configuration_builds_the_network_it_describes(name):
    config = composed(name)
    says_every_option(config)
    with torch.device("meta"):
        net = build(config)
    first_line = (CONF / "net" / f"{name}.yaml").read_text().splitlines()[0]
    stated = [int(number.replace(",", "")) for number in re.findall(r"\d+(?:,\d{3})+", first_line)]
    if stated:
        assert sum(p.numel() for p in net.parameters()) == stated[0]
    if len(stated) == 2:  # to train, to generate
        with torch.device("meta"):
            net = build(config | {"v_depth": None if name.startswith("pmf") else 0})
        assert sum(p.numel() for p in net.parameters()) == stated[1]


def test_all_published_sizes_are_there():
    assert {"meanflow_unet", "dit_s4", "dit_b4", "dit_b2", "dit_m2", "dit_l2", "dit_xl2"} < set(NAMES)
    assert {"mit_b", "mit_m", "mit_l", "mit_xl"} < set(NAMES)
    assert {f"pmf_{size}{patch}" for size in "blh" for patch in (16, 32)} < set(NAMES)
