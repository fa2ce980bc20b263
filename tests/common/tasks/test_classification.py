"""Image classification: what the network sees, what is measured, what is shown; the published recipes."""

import inspect
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from hydra import compose, initialize_config_dir
from PIL import Image
from torch import nn

from common.data.images.augment import CropFlip
from common.data.images.digits import Digits
from common.data.images.module import ImageDataModule
from common.deq.correction import Correction
from common.deq.grads import Unrolled
from common.deq.layer import DEQ
from common.deq.solvers import Picard
from common.errors import UserError
from common.nets.conv_deq import ConvDEQ
from common.nets.mdeq import MDEQ
from common.runtime.cli.launch import register_resolvers
from common.runtime.training.context import RunContext
from common.runtime.training.module import evaluating
from common.tasks.classification import RIGHT, WRONG, ImageClassification, write_predictions

CONF = Path(__file__).resolve().parents[3] / "conf"


class Spy(nn.Module):
    """Takes the place of a network: remembers the images and answers with fixed logits."""

    img_channels, img_resolution, num_classes = 3, 4, 7

    def __init__(self, logits=None):
        super().__init__()
        self.deq, self.logits, self.seen = DEQ(), logits, []

    def outputs(self, x):
        self.seen.append(x)
        return [self.logits]

    def forward(self, x):
        return self.outputs(x)[-1]


def task(net, **change):
    options = dict(augment=None, mean=[0.4, 0.5, 0.6], std=[0.1, 0.2, 0.3], schedule=None, correction=None)
    return ImageClassification(net=net, optimizer=torch.optim.SGD, **options | change)


def digits_task(**change):
    torch.manual_seed(0)
    net = ConvDEQ(deq=DEQ(solver=Picard(max_iter=6), grad=Unrolled(steps=2), **change.pop("deq", {})), channels=8)
    return task(net, mean=[0.5], std=[0.5], **change)


def test_images_are_normalised_and_large_ones_cut_to_their_centre():
    net = Spy()
    images = torch.rand(2, 3, 6, 6) * 2 - 1
    seen = task(net).normalised(images)
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in ((0.4, 0.5, 0.6), (0.1, 0.2, 0.3)))
    torch.testing.assert_close(seen, ((images[:, :, 1:5, 1:5] + 1) / 2 - mean) / std)


def test_augmentation_is_for_training_and_a_function_of_the_step():
    images = torch.rand(4, 3, 4, 4) * 2 - 1
    batch = {"image": images, "label": torch.zeros(4, dtype=torch.int64)}
    net = Spy()
    module = task(net, augment=CropFlip(padding=2))
    for mode in (True, True, False):
        module.train(mode).outputs(batch)
    first, again, plain = net.seen
    assert torch.equal(first, again) and not torch.equal(first, plain)
    assert torch.equal(plain, module.normalised(images))
    module.context = RunContext(seed=1)
    module.train().outputs(batch)
    assert not torch.equal(first, net.seen[-1])


def test_measures_on_known_logits():
    logits = torch.tensor([[9.0, 8, 7, 6, 5, 4, 3]] * 4)
    label = torch.tensor([0, 1, 4, 6])  # right; in the first five twice; last
    batch = {"image": torch.zeros(4, 3, 4, 4), "label": label}
    found = task(Spy(logits)).eval().evaluation_step(batch)
    assert list(found) == ["loss", "top1", "top5"]  # a sweep minimises the first
    means = {name: float(total) / float(count) for name, (total, count) in found.items()}
    assert means["top1"] == 25 and means["top5"] == 75
    assert means["loss"] == pytest.approx(F.cross_entropy(logits, label).item())
    assert list(task(Spy(logits[:, :3])).eval().evaluation_step({**batch, "label": label % 3})) == ["loss", "top1"]


def test_the_loss_is_the_cross_entropy_of_the_states_as_weighted():
    module = digits_task(deq=dict(states=3), correction=Correction("exp", gamma=0.5)).train()
    batch = {"image": torch.rand(4, 1, 8, 8) * 2 - 1, "label": torch.tensor([1, 2, 3, 4])}
    loss = module.training_step(batch, 0)
    outputs = module.outputs(batch)
    parts = [F.cross_entropy(output, batch["label"]) for output in outputs]
    torch.testing.assert_close(loss, 0.25 * parts[0] + 0.5 * parts[1] + parts[2])
    loss.backward()
    assert all(p.grad is not None for p in module.net.parameters())


def test_a_few_steps_on_real_digits_lower_the_loss():
    data = ImageDataModule(source=Digits(), batch_size=64)
    module = digits_task().train()
    optimizer = torch.optim.Adam(module.parameters(), lr=5e-3)
    losses = []
    for _, batch in zip(range(20), data.train_dataloader()):
        loss = module.training_step(data.on_after_batch_transfer(batch, 0), 0)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert sum(losses[-3:]) < 0.85 * sum(losses[:3])  # 2.30 is chance


def test_pictures_show_drawn_test_images(tmp_path):
    module = digits_task()
    data = ImageDataModule(source=Digits())
    with evaluating(module):
        (first,) = module.show(data, tmp_path / "a", samples=5, seed=1)
        (again,) = module.show(data, tmp_path / "b", samples=5, seed=1)
        (other,) = module.show(data, tmp_path / "c", samples=5, seed=2)
        (step,) = module.preview(data, tmp_path / "step-00000010", samples=5, seed=1)
    assert first.read_bytes() == again.read_bytes() == step.read_bytes() != other.read_bytes()
    assert first.name == "predictions.png" and step.name == "step-00000010.png"


def test_frames_are_green_where_right_and_red_where_wrong(tmp_path):
    pixels = torch.full((3, 3, 4, 4), 255, dtype=torch.uint8)
    path = write_predictions(tmp_path / "p.png", pixels, [0, 1, 1], [0, 1, 0], ["cat", "dog"])
    colours = Image.open(path).convert("RGB").getcolors(maxcolors=1 << 16)
    counts = {colour: count for count, colour in colours}
    assert counts[RIGHT] == 2 * counts[WRONG] > 0


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(mean=[0.5]), r"project.mean and project.std must hold one number per channel \(3\), got 1 and 3"),
        (dict(std=[0.1, 0.0, 0.1]), "project.std must be > 0, got 0.0"),
    ],
)
def test_wrong_statistics_are_refused(change, message):
    with pytest.raises(UserError, match=message):
        task(Spy(), **change)


def composed(name):
    register_resolvers()
    with initialize_config_dir(str(CONF), version_base="1.3"):
        return compose("config", overrides=[f"+experiment={name}", f"run.experiment={name}"])


@pytest.mark.parametrize(
    ("name", "solver", "steps", "tau", "lr", "epochs", "augmented", "skip"),
    [
        ("phantom_grad_cifar10_small", "Broyden", 22, 0.5, 0.1, 50, False, ["fuse"]),
        ("phantom_grad_cifar10_large", "Broyden", 18, 0.5, 0.1, 220, True, ["fuse"]),
        ("phantom_grad_imagenet", "Broyden", 26, 0.6, 0.05, 100, True, ["fuse"]),
        ("torchdeq_mdeq_cifar10_small", "Broyden", 22, 0.5, 0.1, 50, False, []),
        ("torchdeq_mdeq_cifar10_large", "Broyden", 18, 0.7, 0.1, 220, True, []),
        ("torchdeq_mdeq_imagenet", "Picard", 26, 1.0, 0.05, 100, True, ["fuse", "post"]),
    ],
)
def test_published_recipes(name, solver, steps, tau, lr, epochs, augmented, skip):
    """Tables of phantom_grad.md and torchdeq.md, read from the composed configurations."""
    cfg = composed(name)
    deq, optimizer = cfg.project.net.deq, cfg.project.optimizer
    assert (deq.solver._target_.split(".")[-1], deq.solver.max_iter, deq.solver.stop) == (solver, steps, "abs")
    assert (deq.grad._target_.split(".")[-1], deq.grad.steps, deq.grad.tau) == ("Unrolled", 5, tau)
    if name.startswith("phantom_grad"):  # 1e-5 sqrt(numel) of the batch norm, per image
        sizes = zip(cfg.project.net.channels, range(8))
        side = cfg.project.net.img_resolution >> cfg.project.net.downsample
        numbers = sum(c * (side >> i) ** 2 for c, i in sizes)
        assert deq.solver.tol == pytest.approx(1e-5 * numbers**0.5, rel=1e-3)
    imagenet = "imagenet" in name
    assert (optimizer._target_, optimizer.lr, optimizer.momentum) == ("torch.optim.SGD", lr, 0.9)
    assert (optimizer.nesterov, optimizer.weight_decay) == (imagenet, 5e-5 if imagenet else 1e-4)
    assert optimizer.lr * cfg.project.schedule.final == pytest.approx(1e-6)
    per_epoch = (1_281_167 if imagenet else 50_000 + 127) // cfg.data.batch_size
    assert cfg.data.batch_size == 128 and cfg.trainer.max_steps == epochs * per_epoch
    assert (cfg.project.augment is not None) == augmented
    assert list(cfg.project.net.norm.skip) == skip and cfg.project.net.dropout == 0
    assert not cfg.ema.profiles and cfg.evaluate.average == "raw"


@pytest.mark.parametrize("name", ["mdeq_small", "mdeq_large", "mdeq_imagenet", "mdeq_tiny", "conv_deq"])
def test_net_files_name_every_option(name):
    register_resolvers()
    with initialize_config_dir(str(CONF), version_base="1.3"):
        cfg = compose("config", overrides=["+experiment=phantom_grad_cifar10_small", f"net@project.net={name}"])
    kind = ConvDEQ if name == "conv_deq" else MDEQ
    assert set(cfg.project.net) - {"_target_"} == set(inspect.signature(kind).parameters)
    assert cfg.project.net.deq.solver.max_iter == 22  # the layer is there, and the experiment's words reach it
