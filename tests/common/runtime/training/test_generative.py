"""The shared module: generation by image number, the optimiser recipe, the step counter."""

from functools import partial
from types import SimpleNamespace

import pytest
import torch

from common.diffusion.precond import EDMPrecond
from common.diffusion.sample import Heun, Multistep
from common.errors import UserError
from common.nets.mlp import MLPDenoiser
from common.runtime.training.context import RunContext
from common.runtime.training.generative import GenerativeModule, index_batches
from common.runtime.verbs import fit


def module(label_dim: int = 0, **options) -> GenerativeModule:
    torch.manual_seed(0)
    net = MLPDenoiser(img_resolution=4, in_channels=2, out_channels=2, label_dim=label_dim, width=8, depth=1)
    for parameter in net.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    return GenerativeModule(net=EDMPrecond(model=net), optimizer=partial(torch.optim.Adam, lr=1e-2), **options)


def test_an_image_depends_on_its_number_alone():
    made = module()
    sampler = Heun(steps=3, sigma_min=0.01, sigma_max=20.0, rho=7.0, churn=5.0, s_min=0.0, s_max=100.0, s_noise=1.0)
    whole = made.generate(torch.arange(7), sampler=sampler, seed=3)
    parts = [made.generate(indices, sampler=sampler, seed=3) for indices in (torch.tensor([4, 1]), torch.tensor([6]))]
    assert whole.shape == (7, 2, 4, 4)
    # A matrix product of another batch size may add in another order. States and images reach a few hundred here, one
    # unit in the last place of which is 3e-5; three Heun steps through random weights pass on some tens of them.
    torch.testing.assert_close(torch.cat(parts), whole[[4, 1, 6]], rtol=0, atol=2e-3)
    assert not torch.allclose(made.generate(torch.arange(7), sampler=sampler, seed=4), whole)


def test_generation_leaves_mode_gradients_and_streams_alone():
    made = module()
    made.net.train()
    torch.manual_seed(1)
    expected = torch.rand(2)
    torch.manual_seed(1)
    images = made.generate(torch.arange(2), sampler=Multistep(), seed=0)
    assert made.net.training and not images.requires_grad and torch.equal(torch.rand(2), expected)
    made.net.eval()
    made.generate(torch.arange(2), sampler=Multistep(), seed=0)
    assert not made.net.training


def test_latents_are_decoded_wherever_images_are_asked_for(tmp_path):
    made, sampler = module(), Multistep()
    latents = made.generate(torch.arange(3), sampler=sampler, seed=0)
    double = lambda z: z[:, :1].repeat_interleave(2, dim=2).repeat_interleave(2, dim=3)
    made.context = RunContext(sampler=sampler, decoder=double)
    images = made.generate(torch.arange(3), sampler=sampler, seed=0)
    assert images.shape == (3, 1, 8, 8) and torch.equal(images[..., ::2, ::2], latents[:, :1])
    (picture,) = made.preview(None, tmp_path / "step", samples=3, seed=0)
    assert picture.is_file() and not any("decoder" in name for name in made.state_dict())


def test_labels_are_drawn_by_number_or_given():
    made = module(label_dim=3)
    sampler = Multistep()
    drawn = made.generate(torch.arange(6), sampler=sampler, seed=0)
    assert torch.allclose(made.generate(torch.tensor([5]), sampler=sampler, seed=0), drawn[5:], atol=1e-5)
    given = [made.generate(torch.arange(6), sampler=sampler, seed=0, labels=torch.full((6,), c)) for c in range(3)]
    assert not torch.allclose(given[0], given[1])
    assert all(any(torch.allclose(drawn[i], g[i], atol=1e-5) for g in given) for i in range(6))
    assert torch.equal(made.one_hot(torch.tensor([2, 0])), torch.tensor([[0.0, 0, 1], [1, 0, 0]]))
    assert module().one_hot(torch.tensor([2])) is None
    for wrong in (3, -1):
        with pytest.raises(UserError, match=rf"class labels must lie in 0\.\.2 \(label_dim=3\), got {wrong}"):
            made.one_hot(torch.tensor([0, wrong]))


def test_index_batches_cover_every_number_once():
    batches = index_batches(10, 4, "sample")
    assert torch.equal(torch.cat(batches), torch.arange(10)) and [len(b) for b in batches] == [4, 4, 2]
    for samples, size, field in ((0, 4, "sample.samples"), (-1, 4, "sample.samples"), (4, 0, "sample.batch_size")):
        with pytest.raises(UserError, match=rf"{field} must be >= 1, got {min(samples, size)}"):
            index_batches(samples, size, "sample")


def test_the_optimizer_takes_trainable_parameters_and_the_schedule_steps():
    made = module(schedule=lambda step: 0.5**step)
    frozen = next(made.net.parameters())
    frozen.requires_grad_(False)
    recipe = made.configure_optimizers()
    held = [p for group in recipe["optimizer"].param_groups for p in group["params"]]
    assert len(held) == len(list(made.parameters())) - 1 and all(p is not frozen for p in held)
    assert recipe["lr_scheduler"]["interval"] == "step"
    scheduler = recipe["lr_scheduler"]["scheduler"]
    recipe["optimizer"].step()
    scheduler.step()
    assert recipe["optimizer"].param_groups[0]["lr"] == pytest.approx(0.5e-2)
    assert isinstance(module().configure_optimizers(), torch.optim.Adam)


def test_an_optimizer_that_refuses_its_options_is_one_sentence():
    made = module()
    made.make_optimizer = partial(torch.optim.Adam, lr=-1.0)
    with pytest.raises(UserError, match=r"project.optimizer cannot be built: Invalid learning rate: -1.0"):
        made.configure_optimizers()


def test_outside_a_trainer_draws_are_those_of_step_0_and_log_is_silent():
    made = module()
    assert made.micro_step == 0 and made.draws().step == 0
    made.log("train/loss", torch.tensor(1.0))


def test_the_micro_step_counts_over_restarts(composed, tmp_path, with_callbacks):
    from lightning.pytorch import Callback

    class Watch(Callback):
        def __init__(self):
            self.seen = []

        def on_before_backward(self, trainer, pl_module, loss) -> None:
            self.seen.append((trainer.global_step, pl_module.micro_step, pl_module.draws().step))

    watch = Watch()
    with_callbacks(watch)
    for steps in (2, 4):
        fit.fit_task(composed(tmp_path / "run", f"trainer.max_steps={steps}", "trainer.accumulate_grad_batches=2"))
    assert watch.seen == [(micro // 2, micro, micro) for micro in range(8)]


def test_classes_of_network_and_data_are_compared_before_training():
    data = lambda count: SimpleNamespace(name="mine", num_classes=count)
    module(label_dim=3).check_data(data(3))
    module(label_dim=3).check_data(data(2))  # as drawn from fewer of its classes
    module(label_dim=0).check_data(data(10))  # labels are left alone
    with pytest.raises(UserError, match="conditioned on 3 classes, but the pictures of mine are read without labels"):
        module(label_dim=3).check_data(data(0))
    with pytest.raises(UserError, match="conditioned on 3 classes, but mine has 4"):
        module(label_dim=3).check_data(data(4))
