"""A small equilibrium network, its task and its data: the runtime with a module that generates no images.

Real product classes live in the repository; these stand under a made-up dotted path so that configurations name them.
"""

import sys
import types
from pathlib import Path

import lightning.pytorch as pl
import pytest
import torch
import torch.nn.functional as F
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf
from torch import nn

from common.deq.dropout import VariationalDropout
from common.deq.layer import DEQ
from common.deq.layers import apply_norm
from common.files import write_text
from common.runtime.cli.launch import quiet, register_resolvers
from common.runtime.training.equilibrium import EquilibriumModule

REPO = Path(__file__).resolve().parents[2]
HOME = "projects.made_up_by_the_tests"


class Cell(nn.Module):
    """tanh(W z + U x), its input dropped out with one mask per solve."""

    def __init__(self, width: int, inputs: int, norm: str):
        super().__init__()
        self.inner, self.outer = nn.Linear(width, width), nn.Linear(inputs, width)
        apply_norm(self, norm, skip="outer", learn_scale=False, target=0.9)
        self.inner.bias.data.normal_()

    def forward(self, z, x, mask):
        return torch.tanh(self.inner(z) + self.outer(x) * mask)


class Net(nn.Module):
    def __init__(self, *, deq: DEQ, width: int = 8, inputs: int = 4, classes: int = 3, norm: str = "spectral"):
        super().__init__()
        self.width, self.inputs = width, inputs
        self.deq, self.cell, self.drop = deq, Cell(width, inputs, norm), VariationalDropout(0.2)
        self.read = nn.Linear(width, classes)
        self.register_buffer("calls", torch.zeros(()))

    def outputs(self, x):
        if self.training:
            self.calls += 1
        z0 = x.new_zeros(len(x), self.width)
        return [self.read(z) for z in self.deq(self.cell, z0, (x, self.drop.mask_for(z0)))]

    def forward(self, x):
        return self.outputs(x)[-1]


class Task(EquilibriumModule):
    def outputs(self, batch):
        return self.net.outputs(batch["x"])

    def criterion(self, output, batch):
        return F.cross_entropy(output, batch["label"])

    def evaluation_step(self, batch):
        logits = self.outputs(batch)[-1]
        loss = F.cross_entropy(logits, batch["label"], reduction="sum")
        return {"loss": (loss, len(logits)), "right": ((logits.argmax(1) == batch["label"]).sum(), len(logits))}

    def finalise(self, means):
        return {"loss": means["loss"], "error": 100 * (1 - means["right"])}

    def fake_batch(self, samples):
        return {"x": torch.empty(samples, self.net.inputs), "label": torch.zeros(samples, dtype=torch.int64)}

    def show(self, data, folder, *, samples, seed):
        batch = data.sample(seed, samples)
        answers = [str(int(c)) for c in self.net(batch["x"]).argmax(1)]
        write_text(folder / "answers.txt", " ".join(answers))
        return [folder / "answers.txt"]


class Silent(Task):
    def show(self, data, folder, *, samples, seed):
        return []


class Data(pl.LightningDataModule):
    """Batch number p of a run depends on (seed, p) alone."""

    splits = ("train", "test")

    def __init__(self, *, batch_size: int = 16, seed: int = 0, test_samples: int = 50):
        super().__init__()
        self.batch_size, self.seed, self.test_samples = batch_size, seed, test_samples
        self.was_set_up = []

    def check(self):
        pass

    def setup(self, stage):
        self.was_set_up.append(stage)

    def sample(self, number: int, count: int):
        generator = torch.Generator().manual_seed(self.seed * 1000 + number)
        x = torch.randn(count, 4, generator=generator)
        return {"x": x, "label": x[:, :3].argmax(1)}

    def train_dataloader(self):
        return Endless(self)

    def eval_batches(self, split):
        whole = self.sample(10**6 + self.splits.index(split), self.test_samples)
        for start in range(0, self.test_samples, 20):
            yield {name: value[start : start + 20] for name, value in whole.items()}


class Endless:
    def __init__(self, data: Data):
        self.data = data

    def __iter__(self):
        trainer = self.data.trainer
        parts = 1 if trainer is None else trainer.accumulate_grad_batches
        number = 0 if trainer is None else trainer.fit_loop.epoch_loop.batch_progress.total.processed
        while True:
            yield self.data.sample(number, self.data.batch_size // parts)
            number += 1


@pytest.fixture(scope="session")
def toy():
    """The classes above, findable by dotted path below `toy.HOME`."""
    module = types.ModuleType(HOME)
    for kind in (Cell, Net, Task, Silent, Data):
        kind.__module__ = HOME
        setattr(module, kind.__name__, kind)
    module.HOME = HOME
    sys.modules[HOME] = module
    return module


@pytest.fixture(scope="session")
def toy_config(toy):
    """toy_config(folder, *overrides) -> configuration of a small run of `Task`, by the repository's own tree.

    choose    groups of the equilibrium layer: ("grad@deq.grad=implicit",)
    sections  whole sections to put in place of the toy's
    """

    def build(folder: Path, *overrides: str, choose: tuple[str, ...] = (), **sections):
        register_resolvers()
        quiet()
        with initialize_config_dir(str(REPO / "conf"), version_base="1.3"):
            base = compose("config", [
                "+experiment=edm_tiny", "evaluate=none", "run.experiment=toy", "run.name=x", f"run.dir={folder}",
                "speed.threads=1", "trainer.log_every_n_steps=1", "callbacks.progress=null", "callbacks.pictures=null",
                "plan.parameters=null", "ema.profiles.ema.decay=0.9", f"paths.outputs={folder.parent}",
            ])  # fmt: skip
            deq = compose("deq/default", list(choose))
            split = compose("evaluate/split")
        OmegaConf.set_struct(base, False)
        base.project = {
            "_target_": f"{HOME}.Task",
            "net": {"_target_": f"{HOME}.Net", "deq": deq.deq, "width": 8, "norm": "spectral"},
            "optimizer": {"_target_": "torch.optim.Adam", "_partial_": True, "lr": 1e-2},
            "schedule": None,
            "correction": None,
        }
        base.data = {"_target_": f"{HOME}.Data", "batch_size": 16, "seed": 0}
        base.evaluate = split.evaluate
        base.sample.samples = 12
        base.update(sections)
        base.merge_with_dotlist(list(overrides))
        OmegaConf.set_struct(base, True)
        return base

    return build
