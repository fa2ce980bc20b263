"""MeanFlow end to end: samples, augmentation, labels and shapes out of range, gradients, real steps."""

from functools import partial

import pytest
import torch

from common.data.images.augment import EdmAugment
from common.diffusion.sample import AverageVelocitySteps, FlowEuler, ImageNoise
from common.diffusion.time import LogitNormal, OrderThenMask
from common.errors import UserError
from common.losses.meanflow import MeanFlowLoss
from common.nets.average_velocity import AverageVelocity
from common.nets.dit import DiT
from common.runtime.training.context import RunContext
from projects.meanflow.module import MeanFlow


def module(net, *, equal=0.5, label_drop=None, augment=None, **loss) -> MeanFlow:
    made = MeanFlow(
        net=net, loss=MeanFlowLoss(**loss), augment=augment, label_drop=label_drop,
        time=OrderThenMask(base=LogitNormal(mean=-0.4), equal=equal),
        optimizer=partial(torch.optim.Adam, lr=1e-3), schedule=None,
    )  # fmt: skip
    made.context = RunContext(seed=5)
    return made.train()


def small(label_dim: int = 0) -> DiT:
    torch.manual_seed(0)
    net = DiT(img_resolution=4, in_channels=3, patch_size=2, width=16, depth=1, num_heads=2, label_dim=label_dim)
    with torch.no_grad():
        for p in net.parameters():
            p.add_(0.1 * torch.randn_like(p))
    return net


def batch(n: int, classes: int = 3) -> dict:
    generator = torch.Generator().manual_seed(1)
    image = torch.randn(n, 3, 4, 4, generator=generator)
    return {"image": image, "label": torch.arange(n) % classes, "position": torch.arange(n)}


def test_one_step_and_flow_matching_samples():
    """One step is e - u(e, 1, 0); velocities for flow matching come from r = t."""
    net = small(label_dim=3)
    made = module(net)
    labels = torch.tensor([2, 0])
    image = made.generate(torch.arange(2), sampler=AverageVelocitySteps(), seed=3, labels=labels)
    z = ImageNoise(seed=3, indices=torch.arange(2), shape=(3, 4, 4)).z
    with torch.no_grad():
        expected = z - net(z, torch.ones(2), torch.zeros(2), class_labels=labels)
        torch.testing.assert_close(image, expected)
        velocity = net(z, torch.ones(2), torch.ones(2), class_labels=labels)
    flow = made.generate(torch.arange(2), sampler=FlowEuler(steps=1), seed=3, labels=labels)
    torch.testing.assert_close(flow, z - velocity)
    assert not torch.allclose(flow, image) and net.training


def test_latents_of_another_shape_and_labels_out_of_range_are_one_sentence():
    made = module(small(label_dim=3))
    with pytest.raises(UserError, match=r"takes images of shape \(batch, 3, 4, 4\), got \(\d, 4, 4, 4\)"):
        made.training_step({**batch(2), "image": torch.zeros(2, 4, 4, 4)}, 0)
    with pytest.raises(UserError, match=r"class labels must lie in 0\.\.2 .*got 7"):
        made.training_step({**batch(2), "label": torch.tensor([0, 7])}, 0)
    with pytest.raises(UserError, match=r"class labels must lie in 0\.\.2 .*got 3"):
        made.generate(torch.arange(1), sampler=AverageVelocitySteps(), seed=0, labels=torch.tensor([3]))


def test_augmented_images_and_their_labels_reach_the_network(spy):
    raw = spy(augment_dim=9)
    made, given = module(AverageVelocity(model=raw, times=["t"]), augment=EdmAugment(p=0.5)), batch(16)
    made.training_step(given, 0)
    _, labels = made.augment(given["image"].clone(), made.draws().generator("augment"))
    assert torch.equal(raw.calls[-1].augment_labels, labels) and labels.abs().sum() > 0
    made.generate(torch.arange(2), sampler=AverageVelocitySteps(), seed=0)
    assert raw.calls[-1].augment_labels is None


def test_the_gradient_reaches_every_weight_and_points_downhill():
    made, given = module(small(label_dim=3), power=0.0), batch(16)
    loss = made.training_step(given, 0)
    loss.backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for n, p in made.named_parameters() if "table" not in n)
    # the target moves with the weights: downhill is promised for flow matching alone
    made = module(small(label_dim=3), equal=1.0, power=0.0)
    loss = made.training_step(given, 0)
    loss.backward()
    with torch.no_grad():
        for p in made.parameters():
            p -= 1e-6 * p.grad
    assert made.training_step(given, 0) < loss


@pytest.mark.parametrize("experiment", ["meanflow_tiny", "meanflow_tiny_fm"])
def test_two_real_steps(experiment, two_steps, tmp_path):
    runs = [two_steps(experiment, tmp_path / name, f"seed={seed}") for name, seed in (("a", 3), ("b", 3), ("c", 4))]
    before, after, _ = runs[0]
    assert before.keys() == after.keys()
    assert all(torch.isfinite(value).all() for value in after.values())
    assert any(not torch.equal(before[name], after[name]) for name in after)
    squared = [[float(row["train/squared_u"]) for row in rows] for _, _, rows in runs]
    assert len(squared[0]) == 2 and squared[0] == squared[1] != squared[2]
    assert all(torch.equal(after[name], runs[1][1][name]) for name in after)
    # a fresh network returns 0: |e - x|^2 is about 64 (1 + |x|^2 per pixel), whatever the share of r < t
    assert 80 < squared[0][0] < 130
