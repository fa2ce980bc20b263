"""pMF's toy: distances from the plane and discrepancies inside it have known answers; the narrow network learns."""

from dataclasses import replace
from functools import partial

import pytest
import torch

from common.diffusion.sample import AverageVelocitySteps
from common.diffusion.time import LogitNormal, MaskThenOrder
from common.losses.meanflow import ImprovedMeanFlowLoss
from common.nets.mlp import MLPDenoiser
from common.nets.two_head import TwoHeadVelocity
from common.runtime.training.context import RunContext
from projects.pmf.embedded_plane import EmbeddedCurve
from projects.pmf.lift import BANDWIDTHS, EmbeddedCurveMeanFlow, mmd2, off_plane


def made(dimension: int, prediction: str = "x") -> EmbeddedCurveMeanFlow:
    torch.manual_seed(0)
    sizes = dict(img_resolution=1, in_channels=dimension, out_channels=dimension, width=32, depth=1, num_times=2)
    module = EmbeddedCurveMeanFlow(
        net=TwoHeadVelocity(model=MLPDenoiser(**sizes), prediction=prediction),
        loss=ImprovedMeanFlowLoss(head="boundary", t_floor=0.05),
        time=MaskThenOrder(base=LogitNormal(mean=-0.4, std=1.0)), noise_scale=1.0,
        optimizer=partial(torch.optim.Adam, lr=2e-3), schedule=None,
    )  # fmt: skip
    module.context = RunContext(sampler=AverageVelocitySteps())
    return module


def test_distance_from_the_plane():
    data = EmbeddedCurve(dimension=6)
    points = data.points("test", 0, 4)["image"].flatten(1)
    assert off_plane(points, data.plane).max() < 1e-5
    away = torch.linalg.svd(data.plane)[0][:, 2]  # a unit vector at right angles to the plane
    torch.testing.assert_close(off_plane(points + 3 * away, data.plane), torch.full((4,), 3.0))


def test_discrepancy_of_two_points_and_of_equal_sets():
    one, two = torch.tensor([[0.0, 0.0]]), torch.tensor([[0.6, 0.8]])
    kernel = sum(torch.tensor(-0.5 / h**2).exp() for h in BANDWIDTHS) / len(BANDWIDTHS)
    torch.testing.assert_close(mmd2(one, two), (2 - 2 * kernel).double())
    x = torch.randn(50, 2, generator=torch.Generator().manual_seed(0))
    assert abs(mmd2(x, x.flip(0))) < 1e-12
    far = mmd2(x, x + 100)
    assert mmd2(x, x + 0.5) < far and far < 2


def test_a_sampler_of_the_data_itself_is_at_the_floor():
    """Metrics of generated = real points: 0 off the plane, mmd as between two sets of real points."""
    data, module = EmbeddedCurve(dimension=16, eval_batch_size=500, test_count=1000), made(16)
    module.generate = lambda indices, *, sampler, seed: data.points("train", int(indices[0]), len(indices))["image"]
    sums: dict = {}
    for batch in data.eval_batches("test"):
        for name, (total, count) in module.evaluation_step(batch).items():
            before = sums.get(name, (0.0, 0.0))
            sums[name] = (before[0] + float(total), before[1] + count)
    found = module.finalise({name: total / count for name, (total, count) in sums.items()})
    assert found["off_plane"] < 1e-5
    assert found["mmd_floor"] / 2 < found["mmd"] < 2 * found["mmd_floor"] < 0.2
    assert found["off_plane_noise"] == pytest.approx(14**0.5 / 1.35, rel=0.1)  # 14 more dimensions, |data| about 1.35


@pytest.mark.parametrize("prediction, near", [("x", True), ("u", False)])
def test_a_narrow_network_removes_the_noise_only_if_it_predicts_x(prediction, near):
    """32 units, 128 dimensions: an image of low dimension is soon learned, most of a velocity cannot be expressed."""
    module, data = made(128, prediction), EmbeddedCurve(dimension=128, batch_size=64, eval_batch_size=200)
    optimizer = module.configure_optimizers()
    module.train()
    for batch, step in zip(data.train_dataloader(), range(50)):
        module.context = replace(module.context, seed=step)
        optimizer.zero_grad()
        module.training_step(batch, 0).backward()
        optimizer.step()
    batch = next(data.eval_batches("test"))
    found = module.evaluation_step(batch)
    total, noise = found["off_plane"][0], found["off_plane_noise"][0]
    assert (total < 0.3 * noise) if near else (total > 0.6 * noise)


def test_the_picture_is_written(tmp_path):
    data, module = EmbeddedCurve(dimension=8), made(8)
    (path,) = module.preview(data, tmp_path / "step-1", samples=4, seed=0)
    assert path.name == "step-1.png" and path.stat().st_size > 3000
