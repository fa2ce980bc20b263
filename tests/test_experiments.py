"""Every experiment file: composes, passes the check, builds without storage, has the published size, and steps once."""

from pathlib import Path

import pytest
import torch
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf

from common.runtime.check import check, read_schema
from common.runtime.launch import open_sections, register_resolvers
from common.runtime.plan import fake_training_step, micro_batch, raw_parameters, world_size

CONF = Path(__file__).resolve().parent.parent / "conf"
EXPERIMENTS = sorted(p.stem for p in (CONF / "experiment").glob("*.yaml"))


def composed(name: str, *overrides: str):
    register_resolvers()
    with initialize_config_dir(str(CONF), version_base="1.3"):
        return compose("config", overrides=[f"+experiment={name}", f"run.experiment={name}", *overrides])


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_experiment_composes_checks_and_steps(name):
    cfg = composed(name)
    check(cfg, schema=open_sections(read_schema(CONF)))
    for needed in (cfg.needs or {}).values():
        assert needed.experiment in EXPERIMENTS
    assert micro_batch(cfg.data.batch_size, world_size(cfg), cfg.trainer.accumulate_grad_batches) >= 1
    # two samples are enough for shapes and gradients; the count of parameters does not depend on them
    module, flops, kept = fake_training_step(cfg, images=2)
    assert raw_parameters(module) == cfg.plan.parameters
    assert flops > 0 and kept > 0
    idle = [n for n, p in module.raw.named_parameters() if p.requires_grad and p.grad is None]
    assert [n for n in idle if not n.startswith(tuple(module.idle_parameters))] == []


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_experiment_header_says_how_to_run_it(name):
    lines = (CONF / "experiment" / f"{name}.yaml").read_text().splitlines()
    assert lines[0] == "# @package _global_"
    assert f"# python -m projects.run +experiment={name}" in lines[:4], "the command stands in the header"


def test_published_values_of_the_sheet():
    """The table of ect.md section 4, read from the composed configurations."""
    cfg = composed("ect_cifar10")
    assert (cfg.data.batch_size, cfg.trainer.max_steps) == (128, 200_000)
    assert cfg.project.optimizer._target_ == "torch.optim.RAdam" and cfg.project.optimizer.lr == 1e-4
    loss = cfg.project.loss
    assert (loss.q, loss.k, loss.b, loss.c, loss.weight, loss.adj) == (2, 8, 1, 0, "inverse_gap", "sigmoid")
    assert (cfg.project.time.mean, cfg.project.time.std) == (-1.1, 2.0)
    assert (cfg.project.steps_per_stage, cfg.project.stages) == (25_000, 8)
    assert cfg.project.net.model.dropout == 0.2 and cfg.ema.profiles.ema.decay == 0.9999
    assert list(cfg.evaluate.samplers.two_step.mids) == [0.821]

    cfg = composed("ect_cifar10_1hour")
    assert (cfg.project.loss.q, cfg.project.stages, cfg.ema.profiles.ema.decay) == (256, 1, 0.9993)

    for size, lr, dropout in (("s", 1e-3, 0.4), ("m", 9e-4, 0.5), ("l", 8e-4, 0.5), ("xl", 7e-4, 0.5)):
        cfg = composed(f"ect_imagenet64_{size}")
        assert cfg.project.optimizer.lr == pytest.approx(lr) and list(cfg.project.optimizer.betas) == [0.9, 0.99]
        assert (cfg.project.loss.q, cfg.project.loss.c, cfg.project.loss.weight) == (4, 0.06, "snrpk")
        assert (cfg.project.time.mean, cfg.project.time.std) == (-0.8, 1.6)
        assert (cfg.trainer.max_steps, cfg.project.steps_per_stage, cfg.project.stages) == (100_000, 25_000, 4)
        assert (cfg.project.net.model.dropout, cfg.project.net.model.dropout_res) == (dropout, 16)
        assert list(cfg.evaluate.samplers.two_step.mids) == [1.526]
        assert cfg.project.schedule.reference == 2000

    cfg = composed("edm_cifar10")
    assert (cfg.data.batch_size, cfg.trainer.max_steps) == (512, 390_625)
    assert (cfg.project.optimizer.lr, cfg.project.schedule.warmup, cfg.project.augment.p) == (1e-3, 10_000_000, 0.12)
    assert (cfg.project.time.mean, cfg.project.time.std, cfg.project.net.model.dropout) == (-1.2, 1.2, 0.13)
    assert cfg.ema.profiles.ema.images == 500_000

    edm2 = (("xs", 0.012, 1024), ("s", 0.010, 1024), ("m", 0.009, 2048), ("l", 0.008, 1024), ("xl", 0.007, 640))
    for size, lr, mimg in edm2:
        cfg = composed(f"edm_imagenet64_edm2_{size}")
        assert cfg.project.optimizer.lr == lr
        assert cfg.trainer.max_steps * cfg.data.batch_size == mimg * 2**20
        assert cfg.project.schedule.reference == 35_000 * 2048 and cfg.project.loss.uncertainty is True


def test_wrong_key_inside_an_experiment_file_is_found(tmp_path):
    cfg = composed("ect_cifar10")
    OmegaConf.set_struct(cfg, False)
    cfg.project.loss.qq = 3.0
    with pytest.raises(ValueError, match=r"project\.loss\.qq .*Closest: q"):
        check(cfg, schema=open_sections(read_schema(CONF)))


def test_fake_step_allocates_no_parameters():
    module, _, _ = fake_training_step(composed("ect_cifar10"), images=2)
    assert all(isinstance(p, torch._subclasses.FakeTensor) for p in module.parameters())
