"""What is logged of the solvers during training, and drawn at the end."""

import csv

import numpy as np
import pytest
import torch
from PIL import Image

from common.deq.grads import OneStep
from common.deq.layer import DEQ
from common.deq.solvers import Picard
from common.runtime.training.checkpoint import list_checkpoints
from common.runtime.training.solver_health import SolverHealth, SolverTotals, draw_solver, equilibria, residual_curve
from common.runtime.verbs import fit


def rows(folder):
    with open(folder / "metrics.csv", newline="") as file:
        return list(csv.DictReader(file))


def test_logged_at_the_interval_and_drawn_at_the_end(toy_config, tmp_path, with_callbacks):
    """The training solve is reported, though an evaluation solves with the same layer between the steps."""
    from lightning.pytorch import Callback

    class Watch(Callback):
        def __init__(self):
            self.seen = []

        def on_before_backward(self, trainer, pl_module, loss):
            solution = pl_module.net.deq.solution
            self.seen.append(
                (solution.evaluations.float().mean(), solution.residual_rel.mean(), solution.steps.clone())
            )

    watch = Watch()
    with_callbacks(watch)
    folder = tmp_path / "run"
    fit.fit_task(toy_config(
        folder, "trainer.max_steps=6", "trainer.log_every_n_steps=3", "evaluate.every_n_steps=3",
        "project.net.deq.solver.tol=1.0e-5", "project.net.deq.eval_factor=0.04", "evaluate.spectral_radius=true",
    ))  # fmt: skip
    logged = [row for row in rows(folder) if row["train/nfe"]]
    assert [row["step"] for row in logged] == ["3", "6"]
    for row, (nfe, residual, _) in zip(logged, (watch.seen[2], watch.seen[5]), strict=True):
        assert float(row["train/nfe"]) == pytest.approx(float(nfe)) and nfe > 3
        assert float(row["train/residual"]) == pytest.approx(float(residual)) and float(row["train/converged"]) == 1.0
    assert float(rows(folder)[-1]["test/nfe"]) == 2.0 and float(rows(folder)[-1]["test/converged"]) < 1
    picture = np.asarray(Image.open(folder / "pictures/solver.png"))
    assert picture.shape[0] > 600, "four panels: curve, steps, evaluations, spectral radius"
    state = torch.load(list_checkpoints(folder / "checkpoints")[0], weights_only=True)["callbacks"]["SolverHealth"]
    counted = torch.cat([watch.seen[2][2], watch.seen[5][2]]).tolist()
    assert state["steps"] == {steps: counted.count(steps) for steps in sorted(set(counted))}
    assert len(state["curve"]) >= 4 and all(low <= middle <= high for low, middle, high in state["curve"])
    assert state["curve"][-1][2] <= 1e-5 < state["curve"][0][0]


def test_the_backward_solve_is_logged_where_there_is_one(toy_config, tmp_path):
    words = ("trainer.max_steps=1", "project.net.deq.grad.solver.max_iter=7", "project.net.deq.grad.solver.tol=1.0e-12")
    fit.fit_task(toy_config(tmp_path / "run", *words, choose=("grad@deq.grad=implicit",)))
    row = rows(tmp_path / "run")[0]
    assert float(row["train/backward_nfe"]) == 7.0 and 0 < float(row["train/backward_residual"]) < 1


def test_silent_for_networks_without_an_equilibrium(composed, tmp_path):
    folder = tmp_path / "run"
    fit.fit_task(composed(folder, "trainer.max_steps=2"))
    state = torch.load(list_checkpoints(folder / "checkpoints")[0], weights_only=True)
    assert not any("SolverHealth" in name for name in state["callbacks"])
    assert not (folder / "pictures/solver.png").exists() and "train/nfe" not in rows(folder)[0]


def test_totals_are_those_of_every_solve_in_the_block():
    linear = torch.nn.Linear(3, 3)
    torch.nn.init.eye_(linear.weight)
    linear.weight.data *= 0.5
    net = torch.nn.ModuleDict({"deq": DEQ(solver=Picard(max_iter=40, tol=1e-4), grad=OneStep()), "cell": linear})
    assert equilibria(net) == [net["deq"]] and equilibria(linear) == []
    net.eval()
    with torch.no_grad(), SolverTotals(net) as totals:
        solutions = []
        for count in (2, 5):
            net["deq"](lambda z: linear(z), torch.randn(count, 3))
            solutions.append(net["deq"].solution)
    net["deq"](lambda z: linear(z), torch.randn(4, 3))  # outside
    total, count = totals.sums["nfe"]
    assert int(count) == 7 and float(total) == sum(float(s.evaluations.sum()) for s in solutions)
    total, count = totals.sums["converged"]
    assert int(count) == float(total) == 7
    with SolverTotals(linear) as totals:
        linear(torch.randn(1, 3))
    assert totals.sums == {}


def test_the_curve_leaves_out_what_is_not_finite():
    nan, inf = float("nan"), float("inf")
    relative = torch.tensor([[1.0, 0.5, nan], [0.8, inf, nan], [0.2, 0.1, nan]])
    expected = [[0.2, 0.8, 1.0], [0.1, 0.1, 0.5]]
    for found, wanted in zip(residual_curve(relative), expected, strict=True):
        assert found == pytest.approx(wanted)
    assert residual_curve(torch.zeros(3, 0)) == []


def test_panels_without_data_are_left_out(tmp_path):
    many = draw_solver(
        tmp_path / "all.png", curve=[[0.1, 0.2, 1.0], [1e-5, 1e-4, 1e-3]], steps={3: 10, 5: 2},
        logged={"train/nfe": ([1, 2], [4.0, 5.0]), "val/spectral_radius": ([1], [0.5]), "train/loss": ([1], [1])},
    )  # fmt: skip
    few = draw_solver(tmp_path / "few.png", curve=[], steps={3: 10}, logged={})
    assert Image.open(many).height > 1.8 * Image.open(few).height


def test_nothing_is_read_between_the_intervals(toy):
    """Off the log interval the callback keeps no solution and computes nothing."""
    health = SolverHealth(folder="x")
    net = torch.nn.ModuleDict({"deq": DEQ(solver=Picard(), grad=OneStep())})

    class Module:
        pass

    class Trainer:
        global_step, log_every_n_steps, is_global_zero = 0, 5, True

    module, trainer = Module(), Trainer()
    module.net = net
    net["deq"].solution = object()
    health.on_fit_start(trainer, module)
    for trainer.global_step in (0, 1, 2, 3):
        health.on_before_backward(trainer, module, None)
        assert health._seen == []
    trainer.global_step = 4
    health.on_before_backward(trainer, module, None)
    assert health._seen == [net["deq"].solution]
