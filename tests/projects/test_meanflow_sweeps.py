"""The papers' ablations as sweeps: every job composes, builds and steps; its published number stands beside it."""

from functools import cache
from pathlib import Path

import pytest
from hydra import compose, initialize_config_dir
from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
from hydra.core.override_parser.overrides_parser import OverridesParser
from omegaconf import OmegaConf

from common.runtime.cli.check import check
from common.runtime.cli.explain import read_schema
from common.runtime.cli.launch import open_sections, register_resolvers
from common.runtime.cli.sweep import published_number, split_override
from common.runtime.verbs.plan import fake_training_step

CONF = Path(__file__).resolve().parents[2] / "conf"
SWEEPS = {path.stem: OmegaConf.load(path).hydra for kind in ("meanflow", "imf")
          for path in sorted((CONF / "sweep").glob(f"{kind}_*.yaml"))}  # fmt: skip
TINY = {"meanflow_omega": "meanflow_tiny_classes", "imf_heads": "imf_tiny_guided", "imf_interval": "imf_tiny_guided"}


def jobs(name: str) -> list[list[str]]:
    """The overrides of every job, split as Hydra does."""
    words = [f"{key}={value}" for key, value in SWEEPS[name].sweeper.params.items()]
    return BasicSweeper.split_arguments(OverridesParser.create().parse_overrides(words), None)[0]


@cache
def composed(experiment: str, *words: str):
    register_resolvers()
    with initialize_config_dir(str(CONF), version_base="1.3"):
        return compose("config", overrides=[f"+experiment={experiment}", f"run.experiment={experiment}", *words])


def base(name: str) -> str:
    """The published experiment whose ablation it is."""
    return "imf_imagenet_b_ablation" if name.startswith("imf") else "meanflow_imagenet_b4"


@pytest.mark.parametrize("name", SWEEPS)
def test_the_same_words_work_over_the_published_and_the_tiny_experiment(name):
    schema = open_sections(read_schema(CONF))
    for experiment in (base(name), TINY.get(name, "meanflow_tiny")):
        projects = [OmegaConf.to_yaml(composed(experiment, *words).project, resolve=True) for words in jobs(name)]
        assert len(set(projects)) == len(projects) >= 2, "every job trains something else"
        for words in jobs(name):
            check(composed(experiment, *words), schema=schema)


@pytest.mark.parametrize("name", ["meanflow_embeddings", "imf_heads"])
def test_jobs_that_change_network_or_rule_take_a_step(name):
    for words in jobs(name):
        _, flops, _ = fake_training_step(composed(TINY.get(name, "meanflow_tiny"), *words), images=4)
        assert flops > 0


@pytest.mark.parametrize("name", SWEEPS)
def test_every_job_has_its_own_published_number(name):
    published = {key: float(value) for key, value in SWEEPS[name].callbacks.sweep_table.published.items()}
    found = [published_number(dict(map(split_override, words)), published) for words in jobs(name)]
    assert sorted(found) == sorted(published.values())


def test_the_published_setting_is_one_of_the_jobs():
    """61.06, the default of B/4, is the job that changes nothing."""
    plain = OmegaConf.to_yaml(composed("meanflow_imagenet_b4").project, resolve=True)
    for name in (n for n in SWEEPS if n.startswith("meanflow")):
        published = SWEEPS[name].callbacks.sweep_table.published
        projects = [(words, composed("meanflow_imagenet_b4", *words).project) for words in jobs(name)]
        same = [words for words, project in projects if OmegaConf.to_yaml(project, resolve=True) == plain]
        assert [published_number(dict(map(split_override, words)), published) for words in same] == [61.06], name
