"""Every experiment file: composes, passes the check, builds without storage, has the published size, and steps once.

Sizes are counted at the published depth. The step is taken once per kind of network and loss, with few blocks and few
solver iterations: repeating a block finds nothing new. `make check` steps every experiment at the published depth.
"""

import hashlib
import json
import os
from pathlib import Path

import pytest
import torch
from hydra.utils import instantiate
from omegaconf import OmegaConf

from common.runtime.cli.check import check
from common.runtime.cli.explain import read_schema
from common.runtime.cli.launch import open_sections
from common.runtime.verbs.plan import fake_training_step, micro_batch, raw_parameters, world_size

CONF = Path(__file__).resolve().parent.parent / "conf"
EXPERIMENTS = sorted(p.stem for p in (CONF / "experiment").glob("*.yaml"))
# how often a repeated part runs in the shallow step, by its key: blocks of networks, iterations of solvers
AT_MOST = {
    "blocks": 1, "depth": 2, "head_depth": 1, "max_iter": 3, "num_blocks": 1, "rounds": 1, "states": 2, "steps": 2,
    "v_depth": 1,
}  # fmt: skip
STEP = ("_target_", "net", "loss", "perceptual", "correction")  # keys of a project that the code of its step depends on


@pytest.fixture(scope="session")
def schema():
    return open_sections(read_schema(CONF))


def shallow(node):
    """The plain tree with every count of `AT_MOST` cut down."""
    if isinstance(node, dict):
        return {k: min(v, AT_MOST[k]) if k in AT_MOST and type(v) is int else shallow(v) for k, v in node.items()}
    return [shallow(v) for v in node] if isinstance(node, list) else node


def kind(node):
    """The plain tree with the sign in place of every number: trees of one kind run the same code on other sizes.

    Of a list the distinct entries: four stages run the code of two.
    """
    if isinstance(node, dict):
        return {k: kind(v) for k, v in node.items()}
    if isinstance(node, list):
        return sorted({json.dumps(kind(v), sort_keys=True) for v in node})
    return (node > 0) - (node < 0) if type(node) in (int, float) else node


@pytest.fixture(scope="session")
def first_of_its_kind(tmp_path_factory, request):
    """first_of_its_kind(configuration) -> whether no process of this session has stepped one of this kind yet."""
    shared = tmp_path_factory.getbasetemp()
    shared = shared.parent if hasattr(request.config, "workerinput") else shared

    def claim(cfg) -> bool:
        tree = OmegaConf.to_container(cfg.project, resolve=True)
        step = kind({key: tree.get(key) for key in STEP})
        name = hashlib.sha256(json.dumps([step, cfg.trainer.precision], sort_keys=True).encode()).hexdigest()
        try:
            os.close(os.open(shared / f"stepped-{name}", os.O_CREAT | os.O_EXCL))
        except FileExistsError:
            return False
        return True

    return claim


def assert_steps(cfg):
    """One step on fake tensors: two samples are enough for shapes and gradients. Returns the module."""
    module, flops, kept = fake_training_step(cfg, images=2)
    assert flops > 0 and kept > 0
    idle = [n for n, p in module.raw.named_parameters() if p.requires_grad and p.grad is None]
    assert [n for n in idle if not n.startswith(tuple(module.idle_parameters))] == []
    return module


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_experiment_composes_checks_counts_and_steps(name, experiment_config, schema, first_of_its_kind):
    cfg = experiment_config(name)
    check(cfg, schema=schema)
    for needed in (cfg.needs or {}).values():
        assert needed.experiment in EXPERIMENTS
    assert micro_batch(cfg.data.batch_size, world_size(cfg), cfg.trainer.accumulate_grad_batches) >= 1
    with torch.device("meta"):
        module = instantiate(cfg.project, _convert_="all")
    assert raw_parameters(module) == cfg.plan.parameters
    if first_of_its_kind(cfg):
        fewer = cfg.copy()
        fewer.project = shallow(OmegaConf.to_container(cfg.project, resolve=True))
        assert_steps(fewer)


@pytest.mark.full
@pytest.mark.parametrize("name", EXPERIMENTS)
def test_experiment_steps_at_its_published_depth(name, experiment_config):
    cfg = experiment_config(name)
    assert raw_parameters(assert_steps(cfg)) == cfg.plan.parameters


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_experiment_header_says_how_to_run_it(name):
    lines = (CONF / "experiment" / f"{name}.yaml").read_text().splitlines()
    assert lines[0] == "# @package _global_"
    assert f"# python -m projects.run +experiment={name}" in lines[:4], "the command stands in the header"


def test_published_values_of_ect_and_edm(experiment_config):
    composed = experiment_config
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


def test_wrong_key_inside_an_experiment_file_is_found(experiment_config, schema):
    cfg = experiment_config("ect_cifar10")
    OmegaConf.set_struct(cfg, False)
    cfg.project.loss.qq = 3.0
    with pytest.raises(ValueError, match=r"project\.loss\.qq .*Closest: q"):
        check(cfg, schema=schema)


def test_fake_step_allocates_no_parameters(experiment_config):
    module, _, _ = fake_training_step(experiment_config("ect_tiny"), images=2)
    assert all(isinstance(p, torch._subclasses.FakeTensor) for p in module.parameters())
