"""Each word for `logger=` builds its loggers, and they keep what is logged, without a network."""

import pytest
from hydra import compose, initialize_config_dir
from hydra.utils import instantiate
from omegaconf import OmegaConf, open_dict

from common.runtime.cli.check import check
from common.runtime.cli.launch import quiet, register_resolvers
from common.runtime.verbs import fit


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


def test_a_continued_run_goes_on_in_the_same_wandb_run_and_holds_no_step_twice(repo, tmp_path):
    """TensorBoard adds an event file at every start; readers skip what an older file holds of later steps."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    register_resolvers()
    quiet()

    def run(steps: int, *words: str) -> None:
        with initialize_config_dir(str(repo / "conf"), version_base="1.3"):
            fit.fit_task(compose("config", [
                "+experiment=edm_tiny", "evaluate=none", "callbacks.pictures=null", "callbacks.progress=null",
                "logger=many", "logger.wandb.offline=true", "speed.threads=1", "project.net.model.width=16",
                "plan.parameters=null", "trainer.log_every_n_steps=1", f"trainer.max_steps={steps}",
                "callbacks.checkpoints.every_n_steps=2", "run.experiment=toy", "run.name=x",
                f"run.dir={tmp_path}/run", *words,
            ]))  # fmt: skip

    run(5)
    for path in (tmp_path / "run/checkpoints").glob("step-00000005*"):
        path.unlink()  # as if killed before it was written
    run(6)
    seen = EventAccumulator(str(tmp_path / "run/tensorboard")).Reload()
    assert [event.step for event in seen.Scalars("train/loss")] == [1, 2, 3, 4, 5, 6]
    files = [path.name for path in (tmp_path / "run/wandb").glob("offline-run-*")]
    assert len({name.rpartition("-")[2] for name in files}) == 1, "one id: both go into one run"


@pytest.fixture(autouse=True)
def silent_wandb(monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
