"""Networks with an equilibrium: the loss of their states, and every verb of the runtime for a module without images."""

import csv
import inspect
import json
import re
import signal
from pathlib import Path

import pytest
import torch
from hydra import compose, initialize_config_dir
from lightning.pytorch import Callback
from omegaconf import OmegaConf

from common.deq.correction import Correction
from common.deq.grads import OneStep, Unrolled
from common.deq.layer import DEQ
from common.deq.regular import JacobianPenalty
from common.deq.solvers import Picard
from common.errors import UserError
from common.runtime.cli.check import check
from common.runtime.training.checkpoint import list_checkpoints
from common.runtime.training.guard import Interrupted
from common.runtime.verbs import fit
from common.runtime.verbs.assemble import assemble
from common.runtime.verbs.export import write_export
from common.runtime.verbs.plan import make_plan, raw_parameters
from common.runtime.verbs.sample import sample_task
from common.runtime.verbs.test import test_task as run_test_task
from common.targets import resolve
from common.weights.export import load

CONF = Path(__file__).resolve().parents[4] / "conf"
EVERYTHING = (
    "evaluate.every_n_steps=3", "evaluate.curve_samples=20", "trainer.log_every_n_steps=2",
    "callbacks.pictures={_target_: common.runtime.training.callbacks.SampleGrid, folder: '${run.dir}/pictures',"
    " every_n_steps: 4, samples: 5}",
)  # fmt: skip


def rows(folder):
    with open(folder / "metrics.csv", newline="") as file:
        return [{k: v for k, v in row.items() if not k.startswith("perf/")} for row in csv.DictReader(file)]


def newest(folder):
    return torch.load(list_checkpoints(folder / "checkpoints")[0], weights_only=True)


@pytest.fixture(scope="module")
def straight(toy_config, tmp_path_factory):
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("straight") / "run"
    fit.fit_task(toy_config(folder, "trainer.max_steps=20", *EVERYTHING))
    return folder


def module(toy, *, correction=None, **deq):
    torch.manual_seed(0)
    layer = DEQ(**{"solver": Picard(max_iter=30, tol=1e-6), "grad": OneStep()} | deq)
    made = toy.Task(net=toy.Net(deq=layer), optimizer=torch.optim.Adam, schedule=None, correction=correction)
    made.logged = {}
    made.log = lambda name, value, **options: made.logged.update({name: value})
    return made.train()


# The training step ----------------------------------------------------------------------------------------------------


def test_the_loss_is_that_of_the_last_state_or_the_weighted_sum(toy):
    batch = toy.Data().sample(0, 16)
    few = Picard(max_iter=3)
    plain = module(toy, states=3, solver=few)
    plain.net.drop.dropout = 0.0
    losses = [plain.criterion(output, batch).detach() for output in plain.outputs(batch)]
    assert len(losses) == 3 and len({float(loss) for loss in losses}) == 3
    assert float(plain.training_step(batch, 0).detach()) == pytest.approx(float(losses[-1]))
    weighted = module(toy, states=3, solver=few, correction=Correction("exp", gamma=0.5))
    weighted.net.drop.dropout = 0.0
    expected = 0.25 * losses[0] + 0.5 * losses[1] + losses[2]
    assert float(weighted.training_step(batch, 0).detach()) == pytest.approx(float(expected), rel=1e-5)


def test_the_penalty_is_added_and_logged_with_the_solver(toy):
    batch = toy.Data().sample(0, 16)
    without, penalised = module(toy), module(toy, penalty=JacobianPenalty(weight=3.0))
    for made in (without, penalised):
        made.net.drop.dropout = 0.0
    loss = float(without.training_step(batch, 0).detach())
    total = float(penalised.training_step(batch, 0).detach())
    penalty = float(penalised.logged["train/penalty"])
    assert penalty > 0 and total == pytest.approx(loss + penalty)
    assert "train/penalty" not in without.logged and not without.logged["train/loss"].isnan()
    assert 1 < float(without.logged["train/nfe"]) <= 30 and float(without.logged["train/residual"]) <= 1e-6


def test_every_parameter_gets_a_gradient_and_the_masks_change_with_each_step(toy):
    made, batch = module(toy, grad=Unrolled(steps=3)), toy.Data().sample(0, 16)
    made.training_step(batch, 0).backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in made.net.parameters())

    def step(seed: int) -> float:
        torch.manual_seed(seed)
        return float(made.training_step(batch, 0).detach())

    # not to the bit: each step moves the singular vectors of the spectral norm a little nearer
    assert step(3) == pytest.approx(step(3), rel=1e-5), "masks come from torch's global stream"
    assert step(3) != pytest.approx(step(4), rel=1e-3), "another dropout mask"


def test_prediction_leaves_the_mode_alone(toy):
    made, batch = module(toy), toy.Data().sample(0, 5)
    answer = made.predict(batch)
    assert made.training and made.net.drop.training and not answer.requires_grad
    assert torch.equal(answer, made.predict(batch)), "no dropout"


def test_a_network_without_the_layer_is_refused(toy):
    with pytest.raises(UserError, match=r"project.net must keep its equilibrium layer as `deq`.*Linear has none"):
        toy.Task(net=torch.nn.Linear(1, 1), optimizer=torch.optim.Adam, schedule=None, correction=None)


# The verbs ------------------------------------------------------------------------------------------------------------


def test_a_run_leaves_metrics_pictures_and_an_export(straight, capsys):
    logged = rows(straight)
    last = logged[-1]
    assert [int(row["step"]) for row in logged if row["val/loss"]] == [3, 6, 9, 12, 15, 18]
    assert float(last["test/loss"]) > 0 and 0 <= float(last["test/error"]) <= 100
    assert float(last["test/nfe"]) > 1 and float(last["test/converged"]) == 1.0 and float(last["test/residual"]) <= 1e-3
    at_interval = [row for row in logged[1:] if int(row["step"]) % 2 == 0]
    assert all(row["train/nfe"] and row["train/residual"] and row["train/converged"] for row in at_interval)
    assert (straight / "pictures/solver.png").is_file()
    shown = sorted(p.relative_to(straight).as_posix() for p in (straight / "pictures").glob("step-*/answers.txt"))
    assert shown == [f"pictures/step-{n:08d}/answers.txt" for n in (4, 8, 12, 16, 20)]
    result = json.loads((straight / "result.json").read_text())
    assert result["objective"] == result["metrics"]["test/loss"]["value"]
    record = result["metrics"]["test/error"]["record"]
    assert (record["samples"], record["reference"], record["extractor"]) == (50, "Data/test", "none")


def test_the_export_is_the_averaged_network_without_a_sampler(straight, toy):
    exported = load(straight / "export")
    stored = newest(straight)
    for name, tensor in exported.net.state_dict().items():
        assert torch.equal(tensor, stored["averages"]["ema"].get(f"net.{name}", stored["state_dict"][f"net.{name}"]))
    assert exported.sampler is None and not exported.net.training
    with pytest.raises(UserError, match="exported without a sampler"):
        exported.sample(1)
    batch = toy.Data().sample(7, 12)
    found = " ".join(str(int(c)) for c in exported.net(batch["x"]).argmax(1))
    assert len(found.split()) == 12


def test_task_test_and_task_sample_read_the_checkpoint(straight, toy, toy_config, tmp_path, capsys):
    checkpoint = f"resume={list_checkpoints(straight / 'checkpoints')[0]}"
    objective = run_test_task(toy_config(tmp_path / "run", checkpoint))
    assert objective == pytest.approx(float(rows(straight)[-1]["test/loss"]), rel=1e-6)
    assert "test/error" in capsys.readouterr().out
    sample_task(toy_config(tmp_path / "run", checkpoint, "sample.seed=7"))
    out = capsys.readouterr().out
    path = tmp_path / "run/samples/seed7/answers.txt"
    assert f"shown: {path}" in out and "ema, step 20" in out
    exported = load(straight / "export")
    found = " ".join(str(int(c)) for c in exported.net(toy.Data().sample(7, 12)["x"]).argmax(1))
    assert path.read_text() == found
    with pytest.raises(UserError, match="nothing to show: Silent writes no pictures"):
        sample_task(toy_config(tmp_path / "run", checkpoint, f"project._target_={toy.HOME}.Silent"))


def test_the_plan_counts_the_network(toy, toy_config, tmp_path):
    cfg = toy_config(tmp_path / "run", "trainer.max_steps=7")
    plan = make_plan(cfg)
    made = module(toy)
    assert plan.parameters == raw_parameters(made) == sum(p.numel() for p in made.net.parameters())
    assert plan.flops_per_step > 0 and plan.activation_bytes > 0 and plan.images == 7 * 16


class Leave(Callback):
    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        if trainer.global_step == 13:
            signal.raise_signal(signal.SIGTERM)


def assert_equal(a, b, where="checkpoint"):
    assert type(a) is type(b), where
    if isinstance(a, dict):
        assert list(a) == list(b), where
        for key in a:
            assert_equal(a[key], b[key], f"{where}.{key}")
    elif isinstance(a, list | tuple):
        assert len(a) == len(b), where
        for index, pair in enumerate(zip(a, b, strict=True)):
            assert_equal(*pair, f"{where}[{index}]")
    elif isinstance(a, torch.Tensor):
        assert a.dtype == b.dtype and torch.equal(a, b), where
    else:
        assert a == b, where


@pytest.mark.parametrize("accumulate", [1, 2])
def test_13_and_7_steps_are_20_steps_bit_for_bit(accumulate, straight, toy_config, tmp_path, monkeypatch):
    words = ("trainer.max_steps=20", f"trainer.accumulate_grad_batches={accumulate}", *EVERYTHING)
    whole, folder = straight, tmp_path / "run"
    if accumulate > 1:
        whole = tmp_path / "whole"
        fit.fit_task(toy_config(whole, *words))
    build = fit.build_trainer

    def leaving(run):
        trainer, averages = build(run)
        trainer.callbacks.insert(0, Leave())
        return trainer, averages

    with monkeypatch.context() as patch, pytest.raises(Interrupted):
        patch.setattr(fit, "build_trainer", leaving)
        fit.fit_task(toy_config(folder, *words))
    assert newest(folder)["global_step"] == 13
    fit.fit_task(toy_config(folder, *words))
    one, two = newest(whole), newest(folder)
    assert one["global_step"] == 20 and any("SolverHealth" in key for key in one["callbacks"])
    assert_equal(one, two)
    assert rows(whole) == rows(folder)
    for name in ("pictures/solver.png", "pictures/step-00000020/answers.txt", "export/model.safetensors"):
        assert (whole / name).read_bytes() == (folder / name).read_bytes(), name


# The configuration groups ---------------------------------------------------------------------------------------------

SOLVERS = sorted(p.stem for p in (CONF / "solver").glob("*.yaml"))
GRADS = sorted(p.stem for p in (CONF / "grad").glob("*.yaml"))


@pytest.mark.parametrize("folder", ["solver", "grad", "deq"])
def test_every_option_stands_in_its_file_with_the_value_of_the_signature(folder, toy_config, tmp_path):
    """Keys can be overridden without a plus, and a file that says something else than the class says so here."""
    different = {"implicit": {"solver"}, "newton_krylov": {"max_iter", "tol"}, "default": {"solver", "grad"}}
    variants = "_k?[0-9]|_recompute"  # a setting of its own on top of another file
    toy_config(tmp_path)  # registers resolvers
    for path in sorted((CONF / folder).glob("*.yaml")):
        with initialize_config_dir(str(CONF), version_base="1.3"):
            node = OmegaConf.to_container(compose(f"{folder}/{path.stem}")[folder])
        parameters = inspect.signature(resolve(node.pop("_target_"))).parameters
        assert set(node) == set(parameters), path
        if re.search(variants, path.stem):
            continue
        for name in set(node) - different.get(path.stem, set()):
            default = parameters[name].default
            assert node[name] == (list(default) if isinstance(default, tuple) else default), f"{path}: {name}"


@pytest.mark.parametrize(("solver", "grad"), [
    *((solver, "unrolled") for solver in SOLVERS), *(("broyden", grad) for grad in GRADS if grad != "unrolled"),
])  # fmt: skip
def test_every_solver_with_every_rule_by_configuration(solver, grad, toy, toy_config, tmp_path):
    """Composes, passes the check, steps once on real tensors and once on fake ones, and can be exported."""
    choose = (f"solver@deq.solver={solver}", f"grad@deq.grad={grad}")
    budget = ["project.net.deq.solver.max_iter=12"]
    if solver == "newton_krylov":
        budget = ["project.net.deq.solver.max_iter=5", "project.net.deq.solver.krylov=3"]
    cfg = toy_config(tmp_path / "run", *budget, choose=choose)
    check(cfg)
    run = assemble(cfg, training=True, measuring=True)
    run.module.training_step(run.data.sample(0, 16), 0).backward()
    assert all(p.grad is not None and torch.isfinite(p.grad).all() for p in run.module.net.parameters())
    assert make_plan(cfg).flops_per_step > 0
    exported = load(write_export(run, step=0, average="raw"))
    x = run.data.sample(1, 5)["x"]
    torch.testing.assert_close(exported.net(x), run.module.predict({"x": x, "label": None}))
