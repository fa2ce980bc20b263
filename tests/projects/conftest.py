"""Two real steps of an experiment, in this process, and a raw network that remembers what it was given."""

import csv
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from hydra import compose, initialize_config_dir

from common.nets.mlp import MLPDenoiser
from common.runtime.cli.launch import quiet, register_resolvers
from common.runtime.training.checkpoint import latest_complete
from common.runtime.training.weights import network_tensors
from common.runtime.verbs import fit
from common.runtime.verbs.assemble import assemble

REPO = Path(__file__).resolve().parents[2]
TWO_STEPS = (
    "init.file=null", "needs=null", "table=[]", "evaluate=none", "trainer=cpu", "trainer.max_steps=2",
    "speed.threads=1", "trainer.log_every_n_steps=1", "schedule@project.schedule=constant", "plan.parameters=null",
    "callbacks.progress=null", "callbacks.pictures=null",
)  # fmt: skip


class SpyMLP(MLPDenoiser):
    """An MLP with weights off zero that records the arguments of every call."""

    def __init__(self, *, label_dim=0, augment_dim=0, dropout=0.0):
        super().__init__(img_resolution=4, in_channels=3, out_channels=3, width=16, depth=2, emb_channels=8,
                         label_dim=label_dim, augment_dim=augment_dim, dropout=dropout)  # fmt: skip
        torch.manual_seed(0)
        for parameter in self.parameters():
            torch.nn.init.normal_(parameter, std=0.2)
        self.calls = []

    def forward(self, x, noise_labels, class_labels=None, augment_labels=None, dropout_masks=None):
        self.calls.append(SimpleNamespace(
            x=x.detach(), noise_labels=noise_labels, class_labels=class_labels, augment_labels=augment_labels,
            masks=dropout_masks, grad=torch.is_grad_enabled(), training=self.training,
        ))  # fmt: skip
        return super().forward(x, noise_labels, class_labels, augment_labels, dropout_masks)


@pytest.fixture(scope="session")
def spy():
    return SpyMLP


@pytest.fixture(scope="session")
def composed():
    """composed(experiment, folder, *overrides) -> the configuration of a run of two steps in `folder`."""

    def build(experiment: str, folder: Path, *overrides: str):
        register_resolvers()
        quiet()
        with initialize_config_dir(str(REPO / "conf"), version_base="1.3"):
            return compose("config", [
                f"+experiment={experiment}", *TWO_STEPS, f"run.experiment={experiment}", "run.name=x",
                f"run.dir={folder}", f"paths.outputs={folder.parent}", f"paths.cache={folder.parent}/cache", *overrides,
            ])  # fmt: skip

    return build


@pytest.fixture(scope="session")
def two_steps(composed):
    """two_steps(experiment, folder, *overrides) -> (weights before, weights after, logged rows)."""

    def run(experiment: str, folder: Path, *overrides: str):
        cfg = composed(experiment, folder, *overrides)
        if "noise" in (cfg.callbacks or {}):
            cfg.callbacks.noise.batches = 2  # a measurement after training, 200 batches in the experiments
        before = assemble(cfg, training=True, measuring=False).module.net.state_dict()
        fit.fit_task(cfg)
        with open(folder / "metrics.csv", newline="") as file:
            rows = [row for row in csv.DictReader(file) if row.get("train/loss")]
        after = network_tensors(latest_complete(folder / "checkpoints"), "raw")
        return before, after, rows

    return run
