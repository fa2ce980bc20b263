"""Each word for `logger=` builds its loggers, and they keep what is logged, without a network."""

import pytest
from hydra import compose, initialize_config_dir
from hydra.utils import instantiate
from omegaconf import OmegaConf, open_dict

from common.runtime.cli.check import check


@pytest.fixture
def loggers(repo, tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")

    def build(name: str) -> dict:
        with initialize_config_dir(str(repo / "conf/logger"), version_base="1.3"):
            nodes = compose(name)
        tree = OmegaConf.create({"run": {"dir": str(tmp_path), "experiment": "toy", "name": "seed0"}, "logger": nodes})
        with open_dict(tree):
            check(tree)
        return {key: instantiate(node, _convert_="all") for key, node in tree.logger.items()}

    return build


def test_csv_adds_nothing_to_the_metrics_file_every_run_writes(loggers):
    assert loggers("csv") == {}


def test_many_writes_tensorboard_events_and_an_offline_wandb_run(loggers, tmp_path):
    built = loggers("many")
    assert list(built) == ["tensorboard", "wandb"]
    for logger in built.values():
        logger.log_metrics({"train/loss": 0.5}, step=1)
        logger.save()
        logger.finalize("success")
    assert list((tmp_path / "tensorboard").glob("events.out.tfevents.*"))
    built["wandb"].experiment.finish()
    (run,) = (tmp_path / "wandb").glob("offline-run-*")
    assert list(run.glob("*.wandb"))
