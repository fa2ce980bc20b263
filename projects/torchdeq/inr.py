"""DEQ-INR: a network that is the signal, trained on its points; as an equilibrium, and its explicit counterparts.

z = 0                                              # one state per point of the signal
for each step, over all points x with value y:
    z = solve z = f(z, u(x)) from the last step's z, without autograd
    z_k = three differentiable steps of f from stop(z)
    minimise mean((H z_k + h - y)^2)
"""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from common import limits
from common.errors import UserError
from common.runtime.training.equilibrium import EquilibriumModule
from common.runtime.training.module import ResearchModule
from projects.torchdeq.inr_show import draw, write_gif, write_wav
from projects.torchdeq.signals import Signal

CHUNK = 65_536  # points per pass when a whole signal is reconstructed


class SignalTask:
    """Interface: what both modules below make of a signal. Needs `net`: coordinates (B, d) -> values (B, C)."""

    reads = "signals"
    unit = "points"

    def criterion(self, output: Tensor, batch: dict) -> Tensor:
        """Mean squared error of values (B, C) in [-1, 1]."""
        return F.mse_loss(output, batch["value"])

    def evaluation_step(self, batch: dict) -> dict[str, tuple[Tensor, Tensor]]:
        """`mse`: squared error of values clamped to [-1, 1], in units of the full range 2, and the number of values."""
        self.check_fit(batch)
        error = (self.net(batch["coords"]).clamp(-1, 1) - batch["value"]) / 2
        return {"mse": (error.double().square().sum(), torch.tensor(float(error.numel())))}

    def finalise(self, means: dict[str, float]) -> dict[str, float]:
        """`mse`, then `psnr` = -10 log10 mse in dB: the peak is the full range of the signal."""
        mse = torch.tensor(means["mse"], dtype=torch.float64).clamp_min(1e-20)
        return {**means, "psnr": float(-10 * mse.log10())}

    def fake_batch(self, samples: int) -> dict[str, Tensor]:
        """`coords` (N, d), `value` (N, C), `index` (N,)."""
        return {
            "coords": torch.zeros(samples, self.net.in_features),
            "value": torch.zeros(samples, self.net.out_features),
            "index": torch.zeros(samples, dtype=torch.int64),
        }

    def reconstruct(self, signal: Signal) -> Tensor:
        """The network's values (*grid, C) on the whole grid of the signal, on the CPU."""
        coordinates = signal.coordinates().flatten(0, -2)
        parts = [self.net(part.to(self.device)).float().cpu() for part in coordinates.split(CHUNK)]
        return torch.cat(parts).reshape(signal.values.shape)

    @torch.no_grad()
    def show(self, data, folder: Path, *, samples: int, seed: int) -> list[Path]:
        """`reconstruction.png` beside original and error; of a sound also the .wav, of a clip also a .gif of both.

        There is one signal and nothing is drawn at random: `samples` and `seed` do not matter.
        """
        folder, signal = Path(folder), data.signal
        values = self.reconstruct(signal)
        written = [draw(signal, values, folder / "reconstruction.png")]
        if signal.kind == "audio":
            written.append(write_wav(folder / "reconstruction.wav", values, signal.rate))
        if signal.kind == "video":
            written.append(write_gif(folder / "reconstruction.gif", signal, values))
        return written

    @torch.no_grad()
    def preview(self, data, stem: Path, *, samples: int, seed: int) -> list[Path]:
        """The picture of `show` as `<stem>.png`."""
        return [draw(data.signal, self.reconstruct(data.signal), Path(stem).with_suffix(".png"))]

    def check_fit(self, batch: dict) -> None:
        """Raises UserError when the network is of other dimensions: broadcasting would compare them without a word."""
        for key, name in (("coords", "in_features"), ("value", "out_features")):
            wanted, found = getattr(self.net, name), batch[key].shape[1]
            if wanted != found:
                raise UserError(
                    f"the signal has {found} {key} per point. Set project.net.{name}={found}, not {wanted}."
                )


class Inr(SignalTask, EquilibriumModule):
    """An equilibrium network fitted to one signal by mean squared error.

    reuse        each step starts the solve from the last state of its points instead of zero ((Implicit)^2, fixed-point
                 reuse). Costs one state per training point, kept in checkpoints; one process only
    reuse_steps  solver steps from a reused state: 0 leaves the gradient steps alone to go on, as the zoo's
                 `skip_solver`; null: as many as the solver needs
    net          `projects.torchdeq.inr_networks.EquilibriumInr`
    optimizer, schedule, correction   see `EquilibriumModule`
    """

    def __init__(
        self,
        *,
        net: nn.Module,
        reuse: bool,
        reuse_steps: int | None,
        optimizer: Callable,
        schedule: Callable | None,
        correction: Callable | None,
    ):
        super().__init__(net=net, optimizer=optimizer, schedule=schedule, correction=correction)
        if reuse_steps is not None:
            limits.whole("project.reuse_steps", reuse_steps, hint="Set 0 as TorchDEQ's zoo does, or null.")
        if reuse and net.deq.grad.replaces_solver:
            raise UserError("project.reuse needs a solver; an unrolled network starts at zero. Set it to false.")
        if reuse and reuse_steps is not None and len(net.deq.positions) > 1:
            raise UserError(
                "project.reuse_steps cuts the solve short of the states that project.net.deq.states asks for. "
                "Set project.reuse_steps=null or project.reuse=false."
            )
        self.reuse = reuse
        self.reuse_steps = reuse_steps
        self.state: Tensor | None = None  # (training points, width): the last state of every point; None: none yet

    def on_fit_start(self) -> None:
        if self.reuse and self.trainer.world_size > 1:
            raise UserError("project.reuse keeps the states of one process only. Set project.reuse=false for several.")

    def outputs(self, batch: dict) -> list[Tensor]:
        """Values (B, C) of every state; in training with `reuse` from the last state of these points."""
        self.check_fit(batch)
        if not (self.training and self.reuse) or self._trainer is None:
            return self.net.outputs(batch["coords"])
        if self.state is None:
            states = self.net.states(batch["coords"])
            count = len(self.trainer.datamodule.points("train")[0])
            self.state = states[-1].new_zeros(count, self.net.width)
        else:
            self.state = self.state.to(batch["coords"].device)
            states = self._continue(batch["coords"], self.state[batch["index"]])
        self.state[batch["index"]] = states[-1].detach()
        return [self.net.head(z) for z in states]

    def _continue(self, coords: Tensor, z0: Tensor) -> list[Tensor]:
        solver = self.net.deq.solver
        if self.reuse_steps is not None:
            self.net.deq.solver = replace(solver, max_iter=self.reuse_steps)
        try:
            return self.net.states(coords, z0)
        finally:
            self.net.deq.solver = solver

    def on_save_checkpoint(self, checkpoint: dict) -> None:
        if self.state is not None:
            checkpoint["inr_state"] = self.state.cpu()

    def on_load_checkpoint(self, checkpoint: dict) -> None:
        self.state = checkpoint.get("inr_state")


class ExplicitInr(SignalTask, ResearchModule):
    """An explicit network (SIREN, Fourier features) fitted to one signal by mean squared error: the baseline.

    net  `projects.torchdeq.inr_networks.Siren` or `FourierFeatureMLP`;  optimizer, schedule   see `ResearchModule`
    """

    def __init__(self, *, net: nn.Module, optimizer: Callable, schedule: Callable | None):
        super().__init__(net=net, optimizer=optimizer, schedule=schedule)

    def training_step(self, batch: dict, batch_idx: int) -> Tensor:
        """Loss of one micro-batch; logs `train/loss`."""
        self.check_fit(batch)
        loss = self.criterion(self.net(batch["coords"]), batch)
        self.log("train/loss", loss, prog_bar=True)
        return loss
