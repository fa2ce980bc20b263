"""How far each gradient rule points from the exact gradient, measured on a trained equilibrium of real digits."""

from collections.abc import Callable, Mapping
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from common.deq.grads import Gradient
from common.deq.layer import DEQ
from common.deq.solve import solve
from common.deq.solvers import Picard
from common.errors import UserError
from common.runtime.training.equilibrium import EquilibriumModule
from common.runtime.training.figures import COLOURS, new_figure, save_figure
from projects.phantom_grad.method import exact_direction

CONVERGED = Picard(max_iter=2000, tol=1e-13)  # in double: the point where the exact gradient is taken


class TanhDEQ(nn.Module):
    """Classifier with the equilibrium z = tanh(W z + U x): small enough for a dense (I - J)^-1.

    deq          equilibrium layer
    inputs       numbers per sample, flattened
    width        d, dimension of the state
    num_classes  classes
    gain         spectral norm of W at the start
    """

    def __init__(self, *, deq: DEQ, inputs: int = 64, width: int = 128, num_classes: int = 10, gain: float = 0.9):
        super().__init__()
        self.inputs = nn.Linear(inputs, width)
        self.cell = TanhCell(width=width, gain=gain)
        self.head = nn.Linear(width, num_classes)
        self.deq = deq

    def outputs(self, x: Tensor) -> list[Tensor]:
        """Logits (B, num_classes) of each state; x (B, ...) with `inputs` numbers per sample."""
        u = self.inputs(x.flatten(1))
        return [self.head(z) for z in self.deq(self.cell, torch.zeros_like(u), (u,))]

    def forward(self, x: Tensor) -> Tensor:
        return self.outputs(x)[-1]


class TanhCell(nn.Module):
    """f(z, u) = tanh(W z + u), (B, d) each."""

    def __init__(self, *, width: int, gain: float):
        super().__init__()
        weight = torch.empty(width, width).normal_()
        self.weight = nn.Parameter(weight * gain / torch.linalg.matrix_norm(weight, 2))

    def forward(self, z: Tensor, u: Tensor) -> Tensor:
        return torch.tanh(z @ self.weight.T + u)


class Directions(EquilibriumModule):
    """Trains a `TanhDEQ`; its evaluation compares dL/dW by every rule with the exact gradient of the same batch.

    net    `TanhDEQ`
    rules  name -> gradient rule compared; metrics <name>_cosine, <name>_error (relative) and <name>_scale (norm over
           the exact norm) are means over the batches, at the exact equilibrium, in double precision
    optimizer, schedule, correction   see `EquilibriumModule`
    """

    reads = "images"
    unit = "images"

    def __init__(
        self,
        *,
        net: TanhDEQ,
        rules: Mapping[str, Gradient],
        optimizer: Callable,
        schedule: Callable | None,
        correction: Callable | None,
    ):
        super().__init__(net=net, optimizer=optimizer, schedule=schedule, correction=correction)
        for name, rule in rules.items():
            if rule.replaces_solver or rule.needs_solver_state:
                raise UserError(
                    f"project.rules.{name} needs the solve itself, but rules are compared at a given equilibrium. "
                    f"Take {type(rule).__name__} out."
                )
        self.rules = dict(rules)

    def outputs(self, batch: dict) -> list[Tensor]:
        return self.net.outputs(batch["image"])

    def criterion(self, output: Tensor, batch: dict) -> Tensor:
        """Mean cross-entropy of logits (B, num_classes)."""
        return F.cross_entropy(output, batch["label"])

    def evaluation_step(self, batch: dict) -> dict[str, tuple]:
        """`loss`, `top1` (percent) and the three numbers of each rule."""
        logits, label = self.outputs(batch)[-1], batch["label"]
        count = float(len(label))
        found = {
            "loss": (F.cross_entropy(logits, label, reduction="sum"), count),
            "top1": (100 * (logits.argmax(1) == label).sum(), count),
        }
        for name, (cosine, error, scale) in self.compare(batch).items():
            found |= {f"{name}_cosine": (cosine, 1.0), f"{name}_error": (error, 1.0), f"{name}_scale": (scale, 1.0)}
        return found

    @torch.enable_grad()
    def compare(self, batch: dict) -> dict[str, tuple[float, float, float]]:
        """Rule -> (cosine, relative error, relative norm) of dL/dW against the exact one."""
        weight = self.net.cell.weight.detach().double().requires_grad_()
        head = lambda z: F.linear(z, self.net.head.weight.detach().double(), self.net.head.bias.detach().double())
        with torch.no_grad():
            u = self.net.inputs(batch["image"].flatten(1)).double()
        cell = lambda z, u: torch.tanh(z @ weight.T + u)
        z = solve(cell, torch.zeros_like(u), (u,), solver=CONVERGED).z.detach()
        loss_of = lambda state: F.cross_entropy(head(state), batch["label"])

        leaf = z.clone().requires_grad_()
        (grad,) = torch.autograd.grad(loss_of(leaf), leaf)
        slope = 1 - z**2
        rows = exact_direction((slope.unsqueeze(2) * weight).detach(), grad)
        exact = (rows * slope).T @ z
        found = {}
        for name, rule in self.rules.items():
            (phantom,) = torch.autograd.grad(loss_of(rule.attach(cell, z, (u,))[-1]), weight)
            found[name] = (
                float(F.cosine_similarity(phantom.flatten(), exact.flatten(), dim=0)),
                float((phantom - exact).norm() / exact.norm()),
                float(phantom.norm() / exact.norm()),
            )
        return found

    def fake_batch(self, samples: int) -> dict[str, Tensor]:
        """`image` (N, inputs), `label` (N,), `position` (N,)."""
        return {
            "image": torch.empty(samples, self.net.inputs.in_features),
            "label": torch.zeros(samples, dtype=torch.int64),
            "position": torch.zeros(samples, dtype=torch.int64),
        }

    def show(self, data, folder: Path, *, samples: int, seed: int) -> list[Path]:
        """`directions.png`: cosine and relative error of each rule, one bar each, on `samples` test images."""
        images, labels = data.images("test").take(
            torch.randperm(len(data.images("test")), generator=torch.Generator().manual_seed(seed))[:samples].numpy()
        )
        batch = {"image": images.float().to(self.device) / 127.5 - 1, "label": labels.to(self.device)}
        rows = self.compare(batch)
        figure, axes = new_figure()
        names = list(rows)
        for offset, column, label in ((-0.2, 0, "cosine to the exact gradient"), (0.2, 1, "relative error")):
            heights = [rows[name][column] for name in names]
            axes.bar([at + offset for at in range(len(names))], heights, 0.4, label=label, color=COLOURS[column])
        axes.set_xticks(range(len(names)), [name.replace("_", " ") for name in names], rotation=30, ha="right")
        figure.legend(loc="outside upper center", ncols=2, frameon=False)
        path = Path(folder) / "directions.png"
        save_figure(figure, path)
        return [path]
