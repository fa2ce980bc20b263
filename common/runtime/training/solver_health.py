"""Solver statistics of a network with equilibrium layers: logged in training, drawn at its end."""

from collections.abc import Mapping
from pathlib import Path
from typing import cast

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor, nn

from common.deq.layer import DEQ
from common.runtime.training.context import logging_interval
from common.runtime.training.figures import COLOURS, read_curves, running_mean, save_figure, wide
from common.runtime.training.logger import MetricsCSV
from common.runtime.training.module import ResearchModule


def equilibria(net: nn.Module) -> list[DEQ]:
    """The equilibrium layers of a network, in order."""
    return [part for part in net.modules() if isinstance(part, DEQ)]


class SolverTotals:
    """Sums over every solve of a network's equilibria inside the `with` block; nothing is read from the device.

    with SolverTotals(net) as totals:
        ...
    totals.sums   {nfe, residual, converged: (sum over samples, samples)}; empty without equilibria
    """

    def __init__(self, net: nn.Module):
        self.layers = equilibria(net)
        self.sums: dict[str, tuple[Tensor, int]] = {}

    def __enter__(self) -> "SolverTotals":
        self._hooks = [layer.register_forward_hook(self._add) for layer in self.layers]
        return self

    def __exit__(self, *exception) -> None:
        for hook in self._hooks:
            hook.remove()

    def _add(self, layer: DEQ, inputs, states) -> None:
        for name, values in per_sample(layer.solution).items():
            total, count = self.sums.get(name, (values.new_zeros((), dtype=torch.float64), 0))
            self.sums[name] = (total + values.double().sum(), count + len(values))


def per_sample(solution) -> dict[str, Tensor]:
    """What is reported of a solve, each (B,): evaluations of the map, relative residual, whether it converged."""
    return {"nfe": solution.evaluations, "residual": solution.residual_rel, "converged": solution.converged}


def _means(parts: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    return {name: torch.cat([part[name].float() for part in parts]).mean() for name in parts[0]}


class SolverHealth(Callback):
    """Logs `train/nfe`, `train/residual`, `train/converged` and draws `<folder>/solver.png` when training ends.

    nfe        evaluations of the map per sample in the training forward, mean over the batch
    residual   relative residual ||f(z) - z|| / ||f(z)|| of the states returned, mean over the batch
    converged  share of the samples that reached the solver's tolerance, 0..1
    backward_nfe, backward_residual   the same of the backward solve, for gradient rules that have one
    The picture: residual against solver step of the last logged batch (median and range over its samples), how many
    steps the samples of all logged batches took, and nfe and spectral radius over training where they were logged.

    Works for every module whose network holds a `common.deq.layer.DEQ` (several: their batches count together);
    logs nothing for others. It reads the device only at the micro-batch that ends a logged optimiser step.
    """

    def __init__(self, *, folder: str):
        self.folder = Path(folder)
        self._layers: list[DEQ] = []
        self._seen: list = []  # Solutions of the current training forward
        self._done = -1
        self.steps: dict[int, int] = {}  # solver steps -> samples
        self.curve: list[list[float]] = []  # per evaluation: [smallest, median, largest] relative residual

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._layers = equilibria(cast(ResearchModule, pl_module).net)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._done = trainer.global_step

    def on_before_backward(self, trainer: Trainer, pl_module: LightningModule, loss: Tensor) -> None:
        # now, because an evaluation between two steps solves with the same layers
        if self._layers and (trainer.global_step + 1) % logging_interval(trainer) == 0:
            self._seen = [layer.solution for layer in self._layers if layer.solution is not None]

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, outputs, batch, batch_idx) -> None:
        solutions, step = self._seen, trainer.global_step
        if (
            not solutions or step % logging_interval(trainer) or step == self._done
        ):  # the others: inside an accumulated step
            return
        self._done, self._seen = step, []
        parts = [per_sample(solution) for solution in solutions]
        pl_module.log_dict({f"train/{name}": mean for name, mean in _means(parts).items()})
        reports = [found for layer in self._layers if (found := getattr(layer.grad, "report", None)) is not None]
        if reports:
            backward = _means([per_sample(report) for report in reports])
            pl_module.log_dict({f"train/backward_{name}": backward[name] for name in ("nfe", "residual")})
        if trainer.is_global_zero:
            for steps in torch.cat([solution.steps for solution in solutions]).tolist():
                self.steps[steps] = self.steps.get(steps, 0) + 1
            self.curve = residual_curve(solutions[-1].residual_trace[1])

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if not self._layers or not trainer.is_global_zero or not self.steps:
            return
        csv = next((logger.path for logger in trainer.loggers if isinstance(logger, MetricsCSV)), None)
        logged = read_curves(csv) if csv is not None and csv.is_file() else {}
        draw_solver(self.folder / "solver.png", curve=self.curve, steps=self.steps, logged=logged)

    def state_dict(self) -> dict:
        """Histogram and curve: a continued run draws the whole of it. Empty for networks without equilibria."""
        if not self.steps:
            return {}
        return {"steps": dict(sorted(self.steps.items())), "curve": self.curve}

    def load_state_dict(self, state_dict: dict) -> None:
        self.steps = {int(key): int(value) for key, value in state_dict["steps"].items()}
        self.curve = state_dict["curve"]


def residual_curve(relative: Tensor) -> list[list[float]]:
    """[smallest, median, largest] over the samples, per evaluation, of residuals (B, N); what is not finite is left
    out, and so are evaluations without a finite sample."""
    curve = []
    for column in relative.T.detach().float().cpu():
        finite = column[torch.isfinite(column)]
        if len(finite):
            curve.append([float(finite.min()), float(finite.median()), float(finite.max())])
    return curve


def draw_solver(
    path: Path, *, curve: list[list[float]], steps: Mapping[int, int], logged: Mapping[str, tuple[list, list]]
) -> Path:
    """One PNG of up to four panels; those without data are left out.

    curve   see `residual_curve`;  steps  solver steps -> samples
    logged  metric name -> (optimiser steps, values): `*/nfe` and `*/spectral_radius` are drawn
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    over_training = {
        label: {name: line for name, line in logged.items() if name.rpartition("/")[2] == key}
        for key, label in (("nfe", "evaluations per sample"), ("spectral_radius", "spectral radius"))
    }
    panels = [name for name, there in (("curve", curve), ("steps", steps), *over_training.items()) if there]
    figure = Figure(figsize=(7.2, 2.9 * -(-len(panels) // 2)), dpi=120, layout="constrained")
    FigureCanvasAgg(figure)
    for place, panel in enumerate(panels, start=1):
        axes = figure.add_subplot(-(-len(panels) // 2), min(2, len(panels)), place)
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
        if panel == "curve":
            low, median, high = zip(*curve, strict=True)
            evaluations = range(1, len(curve) + 1)
            axes.fill_between(evaluations, low, high, color=COLOURS[0], alpha=0.2, linewidth=0)
            axes.plot(evaluations, median, color=COLOURS[0], linewidth=1.6)
            if wide([*low, *high]):
                axes.set_yscale("log")
            axes.set_xlabel("evaluations of the map")
            axes.set_ylabel("relative residual")
        elif panel == "steps":
            axes.bar(list(steps), list(steps.values()), color=COLOURS[0], width=0.9)
            axes.set_xlabel("solver steps")
            axes.set_ylabel("samples")
        else:
            for colour, (name, (x, y)) in zip(COLOURS, over_training[panel].items(), strict=False):
                many = len(x) > 60
                shown = running_mean(y, len(y) // 25) if many else y
                marker = None if many else "o"
                axes.plot(x, shown, color=colour, linewidth=1.4, marker=marker, markersize=3, label=name)
            axes.legend(frameon=False, fontsize=7)
            axes.set_xlabel("optimiser step")
            axes.set_ylabel(panel)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    save_figure(figure, path)
    return path
