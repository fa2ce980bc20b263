"""iMF end to end: guidance as a condition, its draws and bounds; the loss through the module; real steps."""

from functools import partial

import pytest
import torch

from common.diffusion.sample import AverageVelocitySteps
from common.diffusion.time import GuidanceInterval, LabelDrop, LogitNormal, OrderThenMask, PowerOmega
from common.errors import UserError
from common.losses.meanflow import ImprovedMeanFlowLoss
from common.nets.mit import MiT
from common.runtime.training.context import RunContext
from projects.imf.module import ImprovedMeanFlow


def small(label_dim: int = 3) -> MiT:
    torch.manual_seed(0)
    sizes = dict(img_resolution=4, in_channels=3, patch_size=2, width=16, depth=2, num_heads=2, head_depth=1, v_depth=1)
    net = MiT(**sizes, label_dim=label_dim)
    with torch.no_grad():
        for p in net.parameters():
            p.add_(0.1 * torch.randn_like(p))
    return net


def module(net, *, omega=None, interval=None, label_drop=None, **loss) -> ImprovedMeanFlow:
    made = ImprovedMeanFlow(
        net=net, loss=ImprovedMeanFlowLoss(**loss), label_drop=label_drop, omega=omega, interval=interval,
        time=OrderThenMask(base=LogitNormal(mean=-0.4), equal=0.5),
        optimizer=partial(torch.optim.Adam, lr=1e-3), schedule=None,
    )  # fmt: skip
    made.context = RunContext(seed=5)
    return made.train()


GUIDED = {"omega": PowerOmega(), "interval": GuidanceInterval(), "label_drop": LabelDrop(p=0.3)}


def batch(n: int) -> dict:
    generator = torch.Generator().manual_seed(1)
    image = torch.randn(n, 3, 4, 4, generator=generator)
    return {"image": image, "label": torch.arange(n) % 3, "position": torch.arange(n)}


def test_the_modules_draws_reach_the_loss():
    made, given = module(small(), **GUIDED), batch(12)
    got = made.training_step(given, 0)
    x, draws = given["image"], made.draws()
    pair = lambda sampler: lambda n, generator: torch.stack(sampler(n, generator), 1)
    t, r = draws.apply("t", pair(made.time), 12).unbind(1)
    t_min, t_max = draws.apply("interval", pair(made.interval), 12).unbind(1)
    omega = draws.apply("omega", made.omega, 12)
    assert omega.min() >= 1 and omega.max() <= 8 and omega.std() > 0.5
    expected = made.loss(
        made.net, x, t, r, draws.normal("eps", x), class_labels=torch.eye(3)[given["label"]],
        dropped=draws.apply("drop", made.label_drop, 12), omega=omega, t_min=t_min, t_max=t_max,
    ).loss.mean()  # fmt: skip
    assert torch.equal(got, expected)
    got.backward()
    assert all(p.grad is not None for p in made.parameters())


def test_guidance_is_given_at_test_time_inside_the_trained_range():
    made = module(small(), **GUIDED)
    one = lambda **more: made.generate(torch.arange(3), sampler=AverageVelocitySteps(**more), seed=0)
    free, guided = one(omega=1.0), one(omega=8.0)
    assert guided.isfinite().all() and not torch.allclose(free, guided)
    assert torch.equal(one(), free)  # not given: the network's own default is no guidance
    with pytest.raises(UserError, match=r"omega must lie in the trained range 1 to 8, got 10\.5"):
        one(omega=10.5)
    with pytest.raises(UserError, match="trained without it"):
        module(small()).generate(torch.arange(3), sampler=AverageVelocitySteps(omega=2.0), seed=0)


def test_latents_of_another_shape_are_one_sentence():
    with pytest.raises(UserError, match=r"takes images of shape \(batch, 3, 4, 4\), got \(\d, 4, 8, 8\)"):
        module(small(), **GUIDED).training_step({**batch(2), "image": torch.zeros(2, 4, 8, 8)}, 0)


def test_two_real_steps(two_steps, tmp_path):
    before, after, rows = two_steps("imf_tiny", tmp_path / "run")
    assert all(torch.isfinite(value).all() for value in after.values())
    assert any(not torch.equal(before[name], after[name]) for name in after)
    assert 80 < float(rows[0]["train/squared_u"]) < 130  # |e - x|^2 of a fresh network
