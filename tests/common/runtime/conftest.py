"""Small real runs of the runtime, in this process."""

from pathlib import Path

import pytest
import torch
from hydra import compose, initialize_config_dir

from common.runtime.cli.launch import quiet, register_resolvers
from common.runtime.verbs import fit

REPO = Path(__file__).resolve().parents[3]
SMALL = (
    "project.net.model.width=16", "project.net.model.depth=1", "speed.threads=1", "plan.parameters=null",
    "trainer.log_every_n_steps=1", "callbacks.progress=null", "callbacks.pictures=null", "data.batch_size=64",
    "evaluate=none", "schedule@project.schedule=constant",
)  # fmt: skip


@pytest.fixture(scope="session")
def composed():
    """composed(folder, *overrides, experiment=...) -> the configuration of a small run in `folder`."""

    def build(folder: Path, *overrides: str, experiment: str = "edm_tiny"):
        register_resolvers()
        quiet()
        with initialize_config_dir(str(REPO / "conf"), version_base="1.3"):
            return compose("config", [
                f"+experiment={experiment}", *SMALL, "run.experiment=toy", "run.name=x", f"run.dir={folder}",
                f"paths.outputs={folder.parent}", f"paths.cache={folder.parent}/cache", *overrides,
            ])  # fmt: skip

    return build


@pytest.fixture(scope="session")
def trained(composed, tmp_path_factory) -> Path:
    """Folder of an EDM run of 12 steps with three averages; look, do not change."""
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("trained") / "run"
    fit.fit_task(composed(
        folder, "trainer.max_steps=12",
        "ema.profiles.ema.decay=0.9",
        "+ema.profiles.half={_target_: common.diffusion.ema.HalfLife, images: 300, ramp: null}",
        "+ema.profiles.power={_target_: common.diffusion.ema.PowerFunction, std: 0.1}",
    ))  # fmt: skip
    return folder


@pytest.fixture
def with_callbacks(monkeypatch):
    """with_callbacks(callback, ...) -> runs of `fit_task` in this test get these callbacks, before all others."""

    def add(*callbacks) -> None:
        build = fit.build_trainer

        def build_with(run):
            trainer, averages = build(run)
            trainer.callbacks[:0] = callbacks
            return trainer, averages

        monkeypatch.setattr(fit, "build_trainer", build_with)

    return add
