"""Segmentation: the loss and its mean, sizes and mirror images, metrics, groups, bases, pictures, one real run."""

import functools
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hydra import compose, initialize_config_dir
from PIL import Image
from torch import nn

from common.errors import UserError
from common.ham.burger import Hamburger
from common.ham.decompose import NMF
from common.runtime.cli.launch import register_resolvers
from common.runtime.training.module import evaluating
from common.tasks.segmentation import Segmentation
from projects.hamburger.context import EMAttention

CONF = Path(__file__).resolve().parents[3] / "conf"
SGD = functools.partial(torch.optim.SGD, lr=0.1, weight_decay=1e-4)


class Colours(nn.Module):
    """Logits = a 1x1 convolution of the picture: what stands at a pixel depends on that pixel alone."""

    stride, align_corners, num_classes = 4, True, 3

    def __init__(self, heads: int = 1):
        super().__init__()
        torch.manual_seed(0)
        self.conv, self.heads, self.sizes = nn.Conv2d(3, 3, 1), heads, []

    def outputs(self, x):
        self.sizes.append(tuple(x.shape[2:]))
        return [self.conv(x) * (number + 1) for number in range(self.heads if self.training else 1)]

    def forward(self, x):
        return self.outputs(x)[0]


def task(net=None, **change):
    options = dict(
        crop=8, mean=[0.5, 0.5, 0.5], std=[0.5, 0.5, 0.5], class_weights=None, count_void=False, auxiliary_weight=0.4,
        scales=[1.0], flip=False, odd_sizes="pad", merge="logits", bias_lr=2.0, decay_norms=False, decay_biases=False,
        schedule=None,
    )  # fmt: skip
    return Segmentation(net=net or Colours(), optimizer=SGD, **options | change)


def pair(size=(8, 9), count=2):
    generator = torch.Generator().manual_seed(1)
    mask = torch.randint(0, 3, (count, *size), generator=generator)
    mask[0, :2] = 255
    return {"image": torch.rand(count, 3, *size, generator=generator) * 2 - 1, "mask": mask}


# Loss -----------------------------------------------------------------------------------------------------------------


def pixel_losses(module, batch):
    """Loss and mask of every pixel that has a class, one by one."""
    logits = module.net.conv(batch["image"]).permute(0, 2, 3, 1)
    known = batch["mask"] != 255
    return -logits[known].log_softmax(1)[range(int(known.sum())), batch["mask"][known]], batch["mask"][known]


def test_void_pixels_do_not_count_or_count_as_nothing():
    batch = pair()
    losses, _ = pixel_losses(task(), batch)
    torch.testing.assert_close(task().train().training_step(batch, 0), losses.mean())
    whole = task(count_void=True).train().training_step(batch, 0)
    torch.testing.assert_close(whole, losses.sum() / batch["mask"].numel())
    everything_void = {**batch, "mask": torch.full_like(batch["mask"], 255)}
    for weights in (None, [1.0, 2.0, 3.0]):
        assert task(class_weights=weights).train().training_step(everything_void, 0) == 0


def test_class_weights_as_torch_has_them():
    batch, weights = pair(), torch.tensor([1.0, 2.0, 5.0])
    module = task(class_weights=weights.tolist()).train()
    losses, labels = pixel_losses(module, batch)
    torch.testing.assert_close(module.training_step(batch, 0), (losses * weights[labels]).sum() / weights[labels].sum())
    expected = F.cross_entropy(module.net.conv(batch["image"]), batch["mask"], weights, ignore_index=255)
    torch.testing.assert_close(module.training_step(batch, 0), expected)


def test_class_weights_of_the_data_unless_given():
    for given, wanted in ((None, [3.0, 1.0, 1.0]), ([1.0, 1.0, 2.0], [1.0, 1.0, 2.0])):
        module = task(class_weights=given)
        data = SimpleNamespace(class_weights=lambda: torch.tensor([3.0, 1.0, 1.0]))
        module._trainer = SimpleNamespace(datamodule=data)
        module.on_fit_start()
        assert module.class_weights.tolist() == wanted
    module = task()
    module._trainer = SimpleNamespace(datamodule=SimpleNamespace(class_weights=lambda: None))
    module.on_fit_start()
    assert module.class_weights is None


def test_auxiliary_heads_have_their_weight():
    batch = pair()
    module = task(Colours(heads=3)).train()
    alone = [module.criterion(logits, batch["mask"]) for logits in module.net.outputs(batch["image"])]
    torch.testing.assert_close(module.training_step(batch, 0), alone[0] + 0.4 * (alone[1] + alone[2]))


def test_the_network_sees_normalised_images():
    module = task(mean=[0.4, 0.5, 0.6], std=[0.1, 0.2, 0.3])
    image = torch.rand(1, 3, 4, 4)
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in ((0.4, 0.5, 0.6), (0.1, 0.2, 0.3)))
    torch.testing.assert_close(module.normalised(image * 2 - 1), (image - mean) / std)


# Evaluation -----------------------------------------------------------------------------------------------------------


def test_sizes_are_padded_to_what_the_network_likes_and_cut_again():
    module = task().eval()
    image = pair((7, 10), 1)["image"]
    logits = module.predict(image)
    assert module.net.sizes == [(9, 13)], "1 modulo the stride, with corners aligned"
    torch.testing.assert_close(logits, module.net.conv(image))
    module.net.align_corners = False
    module.predict(image)
    assert module.net.sizes[-1] == (8, 12)


def test_odd_sizes_are_enlarged_or_kept_if_wanted():
    """Light-Ham is tested on pictures resized to a multiple of 32, the authors' mmsegmentation HamNet on any size."""
    image = pair((7, 10), 1)["image"]
    for choice, size in (("resize", (8, 12)), ("keep", (7, 10))):
        module = task(odd_sizes=choice).eval()
        module.net.align_corners = False
        logits = module.predict(image)
        assert module.net.sizes == [size] and logits.shape == (1, 3, 7, 10)
        x = F.interpolate(image, size=size, mode="bilinear", align_corners=False)
        expected = F.interpolate(module.net.conv(x), size=(7, 10), mode="bilinear", align_corners=False)
        torch.testing.assert_close(logits, expected)


@pytest.mark.parametrize("merge", ["logits", "probabilities"])
def test_an_average_over_sizes_and_mirror_images(merge):
    module = task(scales=[0.5, 1.0], flip=True, merge=merge).eval()
    image = pair((9, 13), 1)["image"]
    parts = []
    for size in ((4, 6), (9, 13)):
        for mirrored in (False, True):
            x = F.interpolate(image, size=size, mode="bilinear", align_corners=True)
            y = module.net.conv(x.flip(3) if mirrored else x)
            y = F.interpolate(y.flip(3) if mirrored else y, size=(9, 13), mode="bilinear", align_corners=True)
            parts.append(y.softmax(1) if merge == "probabilities" else y)
    expected = torch.stack(parts).mean(0)
    found = module.predict(image)
    torch.testing.assert_close(found.exp() if merge == "probabilities" else found, expected)
    assert len(module.net.sizes) == 4


def test_one_size_is_the_plain_network_and_answers_come_at_the_masks_size():
    module = task(flip=True).eval()
    image = pair((9, 13), 1)["image"]
    torch.testing.assert_close(module.predict(image), module.net.conv(image))  # a mirror image changes nothing here
    assert module.predict(image, (18, 20)).shape == (1, 3, 18, 20)


def test_measures_on_known_answers():
    module, batch = task().eval(), pair((8, 9), 2)
    found = module.evaluation_step(batch)
    assert list(found) == ["loss", "confusion"]  # a sweep minimises the first
    predicted, truth = module.net.conv(batch["image"]).argmax(1), batch["mask"]
    matrix = torch.zeros(3, 3)
    for a, b in zip(truth.flatten().tolist(), predicted.flatten().tolist()):
        if a != 255:
            matrix[a, b] += 1
    assert torch.equal(found["confusion"][0].float(), matrix)
    per_image = []
    for i in range(2):
        losses, _ = pixel_losses(module, {name: part[i : i + 1] for name, part in batch.items()})
        per_image.append(losses.mean())
    torch.testing.assert_close(found["loss"][0], sum(per_image))
    numbers = module.finalise({"loss": 1.5, "confusion": matrix.double() / 2})
    iou = [matrix[c, c] / (matrix[c].sum() + matrix[:, c].sum() - matrix[c, c]) for c in range(3)]
    assert numbers["loss"] == 1.5 and numbers["miou"] == pytest.approx(100 * float(sum(iou)) / 3)
    assert numbers["pixel_accuracy"] == pytest.approx(100 * float(matrix.diagonal().sum() / matrix.sum()))


def test_masks_larger_than_the_image_are_met_at_their_own_size():
    batch = pair((8, 8), 1)
    batch["image"] = batch["image"][:, :, ::2, ::2]
    found = task().eval().evaluation_step(batch)
    assert found["confusion"][0].sum() == (batch["mask"] != 255).sum()


# Training -------------------------------------------------------------------------------------------------------------


def test_biases_are_a_group_of_their_own():
    optimizer = task().configure_optimizers()
    assert [(g["lr"], g["weight_decay"]) for g in optimizer.param_groups] == [(0.1, 1e-4), (0.2, 0.0)]
    module = task(bias_lr=1.0, decay_norms=True, decay_biases=True)
    assert len(module.configure_optimizers().param_groups) == 1
    module.make_optimizer = functools.partial(torch.optim.Adam)
    with pytest.raises(UserError, match=r"project.optimizer.lr must be given"):
        module.configure_optimizers()


def test_stored_bases_move_with_a_training_step():
    net = Colours()
    net.ema, net.burger = EMAttention(3, 4, rank=2), Hamburger(3, 4, ham=NMF(rank=2), bases="online")
    module, x = task(net).train(), torch.rand(2, 3, 5, 5)
    before = [net.ema.bases.clone(), net.burger.ham.bases.clone()]
    net.burger(net.ema(x))
    module.on_before_optimizer_step(None)
    assert not any(torch.equal(a, b) for a, b in zip(before, (net.ema.bases, net.burger.ham.bases)))


def test_fake_batch_has_the_shape_of_a_crop():
    batch = task(crop=[6, 7]).fake_batch(3)
    assert batch["image"].shape == (3, 3, 6, 7) and batch["mask"].shape == (3, 6, 7)
    assert batch["mask"].dtype == torch.int64 and task(crop=5).fake_batch(1)["mask"].shape == (1, 5, 5)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(mean=[0.5]), "project.mean and project.std must hold 3 numbers each, got 1 and 3"),
        (dict(std=[0.5, 0.0, 0.5]), "project.std must be > 0, got 0.0"),
        (dict(class_weights=[1.0]), r"project.class_weights must hold one number per class \(3\), got 1"),
        (dict(scales=[]), "project.scales is empty"),
        (dict(scales=[1.0, 0.0]), "project.scales must be > 0, got 0.0"),
        (dict(merge="logit"), "project.merge must be one of logits, probabilities, got 'logit'. Closest: logits"),
    ],
)
def test_refusals(change, message):
    with pytest.raises(UserError, match=message):
        task(**change)


# Pictures -------------------------------------------------------------------------------------------------------------


class Data:
    """Five pictures of a data module."""

    splits, eval_fit = ("train", "val"), None
    palette, class_names = ((255, 0, 0), (0, 255, 0), (0, 0, 255)), ("a", "b", "c")

    def pairs(self, split):
        assert split == "val"
        return self

    def __len__(self):
        return 5

    def read(self, index):
        generator = torch.Generator().manual_seed(index)
        image = torch.randint(0, 256, (3, 8, 10), generator=generator, dtype=torch.uint8)
        return image, torch.randint(0, 3, (8, 10), generator=generator, dtype=torch.uint8)


def test_pictures_show_drawn_held_out_images(tmp_path):
    module = task()
    with evaluating(module):
        (first,) = module.show(Data(), tmp_path / "a", samples=2, seed=1)
        (again,) = module.show(Data(), tmp_path / "b", samples=2, seed=1)
        (other,) = module.show(Data(), tmp_path / "c", samples=2, seed=2)
        (step,) = module.preview(Data(), tmp_path / "step-00000010", samples=2, seed=1)
    assert first.read_bytes() == again.read_bytes() == step.read_bytes() != other.read_bytes()
    assert first.name == "overlays.png" and step.name == "step-00000010.png"


def test_any_pictures_in_a_folder(tmp_path):
    folder = tmp_path / "mine"
    folder.mkdir()
    pixels = np.random.default_rng(0).integers(0, 256, (9, 12, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(folder / "a.png")
    Image.fromarray(pixels[..., 0]).save(folder / "b.webp", lossless=True)  # grey
    (folder / "notes.txt").write_text("no picture")
    module = task()
    with evaluating(module):
        written = module.show_files(folder, Data(), tmp_path / "out")
    assert [path.name for path in written] == ["a.png", "a_classes.png", "b.png", "b_classes.png"]
    image = torch.from_numpy(pixels).permute(2, 0, 1)[None] / 127.5 - 1
    predicted = module.net.conv(image).argmax(1)[0]
    classes = Image.open(written[1])
    assert np.array_equal(np.array(classes), predicted.numpy())
    assert classes.getpalette()[:9] == [255, 0, 0, 0, 255, 0, 0, 0, 255]
    data = Data()
    data.eval_fit = [6, 6]  # smaller inside, the same size outside
    assert module.classes(torch.from_numpy(pixels).permute(2, 0, 1), data.eval_fit).shape == (9, 12)
    assert module.net.sizes[-1] == (5, 9)


# Configurations -------------------------------------------------------------------------------------------------------


def composed(name):
    register_resolvers()
    with initialize_config_dir(str(CONF), version_base="1.3"):
        return compose("config", overrides=[f"+experiment={name}", f"run.experiment={name}"])


def test_published_recipe_of_hamnet():
    """Table of hamburger.md, section Published configurations."""
    cfg = composed("hamburger_voc")
    project, burger = cfg.project, cfg.project.net.context
    assert (burger.version, burger.groups, burger.channels, burger.ham.rank) == ("v2", 1, 512, 64)
    assert (burger.ham.steps, burger.ham.eval_steps, burger.ham.inv_t, burger.ham.gradient) == (6, 6, 1.0, "one_step")
    assert (burger.bases, burger.cheese_factor, burger.eta) == ("random", 1, 0.9)
    assert (project.net.bn_momentum, project.net.dropout, project.net.align_corners) == (3e-4, 0.1, True)
    optimizer = project.optimizer
    assert (optimizer._target_, optimizer.lr, optimizer.momentum, optimizer.weight_decay) == (
        "torch.optim.SGD", 9e-3, 0.9, 1e-4,
    )  # fmt: skip
    assert (project.bias_lr, project.decay_norms, project.decay_biases) == (2.0, False, False)
    assert (project.schedule.power, project.schedule.every, project.schedule.final) == (0.9, 10, 0.0)
    assert (cfg.trainer.max_steps, cfg.data.batch_size, project.crop) == (60_000, 16, 513)
    assert list(cfg.data.augment.scales) == [0.5, 0.75, 1.0, 1.25, 1.5, 1.75, 2.0]
    assert (cfg.data.train_split, cfg.trainer.sync_batchnorm, dict(cfg.ema.profiles), cfg.seed) == (
        "trainaug", True, {}, 66,
    )  # fmt: skip
    second = composed("hamburger_voc_trainval")
    assert (second.trainer.max_steps, second.data.train_split) == (20_000, "trainval")
    assert second.project.optimizer.lr == pytest.approx(9e-4) and second.init.file.startswith(second.needs.first.dir)
    plus = composed("hamburger_voc_v2plus").project.net.context
    assert (plus.version, plus.ham.rank, plus.zero_ham, plus.dual) == ("v2plus", 512, True, False)


def test_published_recipes_on_ade20k():
    cfg = composed("hamburger_ade20k_r101")
    optimizer, schedule = cfg.project.optimizer, cfg.project.schedule
    assert (optimizer.lr, optimizer.weight_decay, schedule.power) == (0.01, 5e-4, 0.9)
    assert optimizer.lr * schedule.final == pytest.approx(1e-4)
    assert (cfg.trainer.max_steps, cfg.project.crop, cfg.project.net.norm) == (160_000, 512, "gn")
    assert cfg.project.net.context.version == "v1" and cfg.project.auxiliary_weight == 0.4
    assert (cfg.project.net.context.ham.steps, cfg.project.net.context.ham.eval_steps) == (6, 7)
    assert (cfg.project.net.initial, cfg.project.odd_sizes, cfg.data.batch_size) == ("fan_out", "keep", 8 * 4)
    for size, drop, width in (("tiny", 0.1, 480), ("small", 0.1, 512), ("base", 0.1, 512), ("large", 0.25, 512),
                              ("huge", 0.3, 512)):  # fmt: skip
        cfg = composed(f"hamburger_light_{size}")
        net, optimizer = cfg.project.net, cfg.project.optimizer
        assert (net.backbone.size, net.backbone.drop_path) == (size, drop)
        assert net.width == net.context.channels == width
        assert (net.context.ham.steps, net.context.ham.eval_steps, net.initial) == (6, 7, "fan_out")
        assert (cfg.project.odd_sizes, cfg.data.batch_size) == ("resize", 8 * 2)
        assert (net.kernel, net.norm, net.context.norm, net.norm_groups) == (1, "gn", "gn", 32)
        assert (optimizer._target_, optimizer.lr, optimizer.weight_decay) == ("torch.optim.AdamW", 6e-5, 0.01)
        assert (cfg.project.schedule.warmup, cfg.project.schedule.power, cfg.trainer.max_steps) == (1500, 1.0, 160_000)


def test_the_sweep_compares_every_module():
    text = (CONF / "sweep" / "hamburger_context.yaml").read_text()
    words = text.rsplit(":", 1)[1].strip().split(",")
    assert words == ["ham_nmf_r8", "ham_cd_r8", "ham_vq_r8", "attention", "ema", "a2", "psp", "aspp", "none"]
    assert set(words) <= {path.stem for path in (CONF / "context").glob("*.yaml")}
