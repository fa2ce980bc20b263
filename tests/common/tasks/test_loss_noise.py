"""The noise of two losses at one state: by hand, on equal draws, and where theory says that they are one loss."""

from functools import partial
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from common.diffusion.time import LogitNormal, OrderThenMask
from common.errors import UserError
from common.losses.meanflow import ImprovedMeanFlowLoss, MeanFlowLoss
from common.runtime.training.context import RunContext
from common.runtime.training.seeding import Draws
from common.tasks.loss_noise import LossNoise, Moments
from projects.meanflow.module import MeanFlow

LOSSES = {"meanflow": MeanFlowLoss(power=0), "imf": ImprovedMeanFlowLoss(power=0, head="boundary")}


class Scale(nn.Module):
    """u = a z + b (t - r)."""

    img_channels, img_resolution, label_dim = 1, 2, 0

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Parameter(torch.tensor(0.3)), nn.Parameter(torch.tensor(-0.8))

    def forward(self, z, t, r):
        return self.a * z + self.b * (t - r).view(-1, 1, 1, 1)


class Data:
    """Eight batches; the loader's hooks do nothing."""

    def train_dataloader(self):
        generator = torch.Generator().manual_seed(0)
        return [{"image": torch.randn(16, 1, 2, 2, generator=generator), "label": None} for _ in range(8)]

    def on_before_batch_transfer(self, batch, index):
        return batch

    transfer_batch_to_device = on_after_batch_transfer = lambda self, batch, *_: batch


def measured(equal: float, batches: int = 8, losses=None) -> tuple[dict, MeanFlow]:
    module = MeanFlow(
        net=Scale(), loss=MeanFlowLoss(), time=OrderThenMask(base=LogitNormal(mean=-0.4, std=1.0), equal=equal),
        label_drop=None, augment=None, optimizer=partial(torch.optim.Adam, lr=1e-3), schedule=None,
    )  # fmt: skip
    module.context = RunContext(seed=7)
    module.eval()
    callback = LossNoise(losses=losses or LOSSES, batches=batches)
    callback.on_fit_end(SimpleNamespace(datamodule=Data()), module)
    return callback.results(), module


def test_equals_means_and_deviations_taken_by_hand():
    found, module = measured(equal=0.5)
    assert not module.training and module.net.a.grad is None
    values, gradients = [], []
    for number, batch in enumerate(Data().train_dataloader()):
        x, t, r, e, _ = module.inputs(batch, draws=Draws(seed=7, step=-1 - number))
        a, b = (p.detach().clone().requires_grad_() for p in (module.net.a, module.net.b))
        wide = lambda time: time.view(-1, 1, 1, 1)
        z, h = (1 - wide(t)) * x + wide(t) * e, wide(t - r)
        derivative = (a * (e - x) + b).detach()
        value = (a * z + b * h + h * derivative - (e - x)).square().flatten(1).sum(1).mean()
        values.append(value.detach())
        gradients.append(torch.stack(torch.autograd.grad(value, (a, b))))
    values, gradients = torch.stack(values), torch.stack(gradients)
    assert found["noise/meanflow_loss_mean"] == pytest.approx(values.mean().item(), rel=1e-5)
    assert found["noise/meanflow_loss_std"] == pytest.approx(values.std().item(), rel=1e-4)
    assert found["noise/meanflow_gradient_norm"] == pytest.approx(gradients.mean(0).norm().item(), rel=1e-4)
    assert found["noise/meanflow_gradient_std"] == pytest.approx(gradients.var(0).sum().sqrt().item(), rel=1e-4)
    assert found["noise/imf_loss_mean"] != pytest.approx(found["noise/meanflow_loss_mean"], rel=1e-3)


def test_both_losses_are_flow_matching_where_r_is_t():
    found, _ = measured(equal=1.0)
    for what in ("loss_mean", "loss_std", "gradient_norm", "gradient_std"):
        assert found[f"noise/imf_{what}"] == pytest.approx(found[f"noise/meanflow_{what}"], rel=1e-6)
    assert found["noise/imf_gradient_std"] > 0


def test_nothing_is_drawn_where_the_network_is_conditioned_on_the_guidance():
    callback = LossNoise(losses=LOSSES)
    callback.on_fit_end(None, SimpleNamespace(omega=object()))
    assert callback.results() == {}


def test_a_parameter_without_gradient_and_one_gradient_alone():
    moments = Moments(Scale())
    moments.add((torch.tensor(3.0), None))
    assert moments.summary() == {"norm": 3.0, "std": 0.0}
    with pytest.raises(UserError, match="batches of the loss noise must be a whole number >= 2, got 1"):
        LossNoise(losses=LOSSES, batches=1)
