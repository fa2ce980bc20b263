"""ECT end to end: algorithm 1 through the module, what the teacher pass does and does not do, stages by step number,
and real steps on real data.
"""

import copy
import math
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from omegaconf import OmegaConf
from torch import nn

from common.diffusion.precond import ECMPrecond
from common.diffusion.sample import Multistep
from common.diffusion.time import LogNormal
from common.errors import UserError
from common.losses.consistency import ConsistencyLoss
from common.runtime.training.context import RunContext
from common.runtime.verbs.assemble import assemble
from common.runtime.verbs.plan import build_fake
from projects.ect.module import Ect

SD = 0.5
REPO = Path(__file__).resolve().parents[2]


def module(net: nn.Module, *, loss=None, time=None, **options) -> Ect:
    schedule_of_stages = {
        "steps_per_stage": 10,
        "stages": 8,
        "first_stage": 0,
        "distill": False,
    } | options
    made = Ect(
        net=net, loss=loss or ConsistencyLoss(), time=time or LogNormal(mean=-1.1, std=2.0),
        optimizer=partial(torch.optim.RAdam, lr=1e-3), schedule=None, **schedule_of_stages,
    )  # fmt: skip
    made.context = RunContext(seed=5)
    return made.train()


def at_step(made: Ect, step: int) -> Ect:
    """The module as it is when `step` optimiser steps are done; its other draws are those of any trainer-less call."""
    made._trainer = SimpleNamespace(global_step=step)
    return made


def batch(n: int, classes: int = 3, dtype=torch.float32) -> dict:
    generator = torch.Generator().manual_seed(1)
    image = torch.rand(n, 3, 4, 4, generator=generator, dtype=dtype) * 2 - 1
    return {"image": image, "label": torch.arange(n) % classes, "position": torch.arange(n)}


# --- the equation ---------------------------------------------------------------------------------------------------


class Oracle(nn.Module):
    """The consistency function of data that is one single image."""

    label_dim = 0

    def __init__(self, point):
        super().__init__()
        self.point, self.sigmas = point, []

    def draw_dropout(self, x, generator=None):
        return ()

    def forward(self, x, sigma, class_labels=None, augment_labels=None, dropout_masks=None):
        self.sigmas += sigma.tolist()
        return self.point.expand_as(x)


@pytest.mark.parametrize("stage", [0, 1, 3, 7])
def test_an_oracle_on_one_image_has_zero_loss(stage):
    given = batch(64)
    given["image"] = given["image"][:1].repeat(64, 1, 1, 1)
    oracle = Oracle(given["image"][:1])
    assert module(oracle, loss=ConsistencyLoss(official=True), first_stage=stage).training_step(given, 0).item() == 0
    assert min(oracle.sigmas) > 0
    given["image"][0] += 0.5  # one pixel set that is not the oracle's: seen
    assert module(oracle, first_stage=stage).training_step(given, 0) > 0


@pytest.mark.parametrize("stage", [0, 1, 2, 7])
def test_loss_is_algorithm_1_with_the_modules_own_draws(spy, stage):
    """mean over i of |f(y + t eps, t) - sg f(y + r eps, r)| / (t - r), one eps, written out."""
    raw, given = spy().double(), batch(32, dtype=torch.float64)
    made = module(ECMPrecond(model=raw, sigma_data=SD), loss=ConsistencyLoss(official=True), first_stage=stage)
    got = made.training_step(given, 0)
    y, draws = given["image"], made.draws()
    t = draws.apply("t", made.time, 32).double()
    eps = draws.normal("eps", y)
    r = t * (1 - (1 + 8 / (1 + t.exp())) / 2 ** (stage + 1)).clamp(min=0)

    def f(level):  # EDM's constants: training does not use the boundary-exact ones
        level = level.reshape(-1, 1, 1, 1)
        x, total = y + level * eps, level**2 + SD**2
        out = raw(x / total.sqrt(), level.flatten().log() / 4)
        return SD**2 / total * x + level * SD / total.sqrt() * out

    with torch.no_grad():
        target = torch.where((r > 0).reshape(-1, 1, 1, 1), f(torch.where(r > 0, r, t)), y)
        expected = ((f(t) - target).square().sum((1, 2, 3)).sqrt() / (t - r)).mean()
    torch.testing.assert_close(got.detach(), expected, rtol=1e-5, atol=0)  # r is found in float32


# --- gradients ------------------------------------------------------------------------------------------------------


class WithTeacher:
    """The same loss with the target from another network."""

    sync_dropout = True

    def __init__(self, teacher):
        self.teacher = teacher

    def __call__(self, *args, **options):
        return ConsistencyLoss()(*args, teacher=self.teacher, **options)


@pytest.mark.parametrize("stage", [0, 2, 7])
def test_gradient_flows_through_the_student_alone(spy, stage):
    given = batch(24, dtype=torch.float64)
    net = ECMPrecond(model=spy(dropout=0.3, label_dim=3)).double()
    teacher = copy.deepcopy(net).train()  # could take gradients, were any sent there
    grads = []
    for loss in (ConsistencyLoss(), WithTeacher(teacher)):
        net.zero_grad()
        module(net, loss=loss, first_stage=stage).training_step(given, 0).backward()
        grads.append({name: p.grad.clone() for name, p in net.named_parameters()})
    assert all(torch.equal(grads[0][name], grads[1][name]) for name in grads[0])
    assert all(grad.abs().sum() > 0 for grad in grads[0].values())
    assert all(p.grad is None for p in teacher.parameters())
    assert teacher.model.calls and not any(call.grad for call in teacher.model.calls)


# --- stages ---------------------------------------------------------------------------------------------------------


def test_stages_of_the_published_recipes_follow_the_step_number(composed, tmp_path):
    firsts = {
        "ect_cifar10": {25_000 * k: k for k in range(8)},
        "ect_imagenet64_s": {25_000 * k: k for k in range(4)},
        "ect_cifar10_1hour": {0: 0},
    }
    for experiment, stages in firsts.items():
        made = build_fake(composed(experiment, tmp_path))[1]
        assert made.stage == 0
        for first, stage in stages.items():
            assert at_step(made, first).stage == stage
            assert first == 0 or at_step(made, first - 1).stage == stage - 1
        last = max(stages.values())
        assert at_step(made, 10**7).stage == last  # a longer run stays in the last stage
        made._trainer = None
    made = build_fake(composed("ect_cifar10", tmp_path))[1]
    assert [at_step(made, step).stage for step in (20_000, 24_999, 25_000)] == [0, 0, 1]
    made._trainer = None


def test_published_settings_are_the_authors(composed, tmp_path):
    """Shift of sigma_min in evaluation, replacement for infinite gradients, TF32; and the iterations."""
    cifar, imagenet = (0.003, 1e5, False), (0.0, 0.0, True)
    wanted = {
        "ect_cifar10": cifar,
        "ect_cifar10_1hour": cifar,
        "ect_imagenet64_s": imagenet,
        "ect_imagenet64_xl": imagenet,
    }
    for experiment, settings in wanted.items():
        cfg = composed(experiment, tmp_path)
        assert (cfg.project.net.sigma_min, cfg.callbacks.guard.replace, cfg.speed.tf32) == settings, experiment
    # --duration Mimg, --eval_every ticks of --tick kimg, --batch 128
    for experiment, images in {
        "ect_cifar10": 25_600_000,
        "ect_cifar10_1hour": 80 * 12_800,
        "ect_imagenet64_s": 12_800_000,
    }.items():
        written = OmegaConf.load(REPO / "conf" / "experiment" / f"{experiment}.yaml")
        assert written.trainer.max_steps == images // 128


def test_first_stage_shifts_the_schedule_and_stays_below_the_last(spy):
    made = module(ECMPrecond(model=spy()), first_stage=6)
    stages = [at_step(made, step).stage for step in (0, 9, 10, 25, 1000)]
    made._trainer = None
    assert stages == [6, 6, 7, 7, 7]


@pytest.mark.parametrize("option", [{"steps_per_stage": 0}, {"stages": 0}, {"first_stage": -1}])
def test_impossible_stages_are_refused(spy, option):
    with pytest.raises(UserError, match=rf"project\.{next(iter(option))}|project\.stages"):
        module(ECMPrecond(model=spy()), **option)


# --- the teacher pass -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("stage", range(4))
def test_rows_with_r_zero_take_no_teacher_pass(spy, stage):
    raw = spy()
    made = module(ECMPrecond(model=raw), first_stage=stage)
    made.training_step(batch(256), 0)
    t = made.draws().apply("t", made.time, 256)
    live = made.loss.t_to_r(t, stage) > 0
    teacher, student = raw.calls
    assert (student.x.shape[0], student.grad, student.training) == (256, True, True)
    assert (teacher.x.shape[0], teacher.grad, teacher.training) == (int(live.sum()), False, True)
    share = {0: 0.189, 1: 0.414}.get(stage, 1.0)  # 1 - P(r = 0) under the CIFAR-10 times
    assert abs(live.float().mean() - share) < 0.08
    assert all(bool(torch.isfinite(call.noise_labels).all()) for call in raw.calls)
    torch.testing.assert_close(teacher.noise_labels, made.loss.t_to_r(t, stage)[live].log() / 4)


def test_a_batch_of_small_times_makes_one_call_in_stage_0(spy):
    raw = spy()
    module(ECMPrecond(model=raw), time=LogNormal(mean=-3.0, std=0.1)).training_step(batch(16), 0)
    assert [(call.x.shape[0], call.grad) for call in raw.calls] == [(16, True)]


class EqualTimes(ConsistencyLoss):
    """r = t: whatever is left of the difference comes from the dropout masks."""

    def t_to_r(self, t, stage):
        return t


def test_both_passes_use_the_masks_the_module_drew(spy):
    losses = {}
    for sync in (True, False):
        raw = spy(dropout=0.5)
        loss = EqualTimes(weight="uniform", official=True, sync_dropout=sync)
        made = module(ECMPrecond(model=raw), loss=loss)
        losses[sync] = made.training_step(batch(16), 0).item()
        teacher, student = raw.calls
        if sync:
            drawn = raw.draw_dropout(batch(16)["image"], made.draws().generator("dropout", local=True))
            assert len(drawn) == 2 and not torch.equal(drawn[0], drawn[1])
            for masks in (teacher.masks, student.masks):
                assert all(torch.equal(a, b) for a, b in zip(masks, drawn, strict=True))
        else:
            assert teacher.masks is None and student.masks is None
    assert losses[True] == 0 and losses[False] > 0.01


def test_a_sub_batch_keeps_its_own_masks_and_labels(spy):
    raw = spy(dropout=0.5, label_dim=3)
    made = module(ECMPrecond(model=raw), first_stage=1)
    made.training_step(batch(32), 0)
    live = made.loss.t_to_r(made.draws().apply("t", made.time, 32), 1) > 0
    teacher, student = raw.calls
    assert 0 < live.sum() < 32
    assert torch.equal(student.class_labels, torch.eye(3)[torch.arange(32) % 3])
    assert torch.equal(teacher.class_labels, student.class_labels[live])
    assert all(torch.equal(a, b[live]) for a, b in zip(teacher.masks, student.masks, strict=True))


# --- generation -----------------------------------------------------------------------------------------------------


def test_one_and_two_steps_use_one_and_two_boundary_exact_calls(spy):
    raw = spy()
    made = module(ECMPrecond(model=raw, sigma_min=0.003))
    x = torch.randn(3, 3, 4, 4)
    made.net.eval()
    torch.testing.assert_close(made.denoiser()(x, torch.full((3,), 0.003)), x, rtol=0, atol=0)
    made.net.train()
    for mids, levels in (((), [80.0]), ((0.821,), [80.0, 0.821])):
        raw.calls.clear()
        made.generate(torch.arange(3), sampler=Multistep(mids=mids), seed=0)
        assert [4 * call.noise_labels[0].item() for call in raw.calls] == pytest.approx([math.log(s) for s in levels])
        assert not any(call.training or call.grad for call in raw.calls)


# --- real runs ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("recipe", [(), ("project.loss.q=2", "project.stages=8", "project.net.model.dropout=0.2")])
def test_two_real_steps(two_steps, tmp_path, recipe):
    seeds = (("a", 3), ("b", 3), ("c", 4))
    runs = [two_steps("ect_tiny", tmp_path / name, f"seed={seed}", *recipe) for name, seed in seeds]
    before, after, _ = runs[0]
    assert all(torch.isfinite(value).all() for value in after.values())
    changed = {name for name in after if not torch.equal(before[name], after[name])}
    assert changed == {name for name in after if name.endswith(("weight", "bias"))}
    losses = [[float(row["train/loss"]) for row in rows] for _, _, rows in runs]
    assert len(losses[0]) == 2 and losses[0] == losses[1] != losses[2]
    assert all(map(math.isfinite, losses[0]))
    assert all(torch.equal(after[name], runs[1][1][name]) for name in after)


def test_stages_of_a_real_run_count_optimiser_steps_not_micro_batches(two_steps, tmp_path):
    _, _, rows = two_steps(
        "ect_tiny", tmp_path / "run", "project.loss.q=2", "project.stages=3", "project.steps_per_stage=2",
        "trainer.max_steps=7", "trainer.accumulate_grad_batches=2", "data.batch_size=64",
    )  # fmt: skip
    assert [float(row["train/stage"]) for row in rows] == [0, 0, 1, 1, 2, 2, 2]


def test_two_steps_on_real_cifar10(two_steps, composed, data_root, tmp_path):
    small = (
        "project.net.model.model_channels=16", "project.net.model.num_blocks=1", "project.net.model.channel_mult=[1,2]",
        "data.batch_size=8", "data.source.batches=[1]", f"data.root={data_root}",
    )  # fmt: skip
    before, after, rows = two_steps("ect_cifar10", tmp_path / "run", *small)
    assert not any("map_augment" in name for name in after)  # ECT tunes without augmentation labels
    losses = [float(row["train/loss"]) for row in rows]
    assert len(losses) == 2 and all(map(math.isfinite, losses)) and all(float(row["train/stage"]) == 0 for row in rows)
    assert all(torch.isfinite(value).all() for value in after.values())
    changed = {name for name in after if not torch.equal(before[name], after[name])}
    # RAdam's first steps are plain gradient descent: what lies behind output layers of 1e-5 rounds off, they do not
    assert {name for name in after if name.endswith(("aux_conv.weight", "conv1.weight"))} <= changed

    run = assemble(composed("ect_cifar10", tmp_path / "again", *small), training=True, measuring=False)
    images = run.data.on_after_batch_transfer(next(iter(run.data.train_dataloader())), 0)["image"]
    assert images.shape == (8, 3, 32, 32) and images.min() >= -1 and images.max() <= 1 and images.std() > 0.2
    # a fresh network returns c_skip x, so the first loss is known from the images and the draws alone
    fresh = run.module.train()
    y, draws = images, fresh.draws()
    t, eps = draws.apply("t", fresh.time, 8), draws.normal("eps", images)
    r = fresh.loss.t_to_r(t, 0)
    skipped = [0.25 / (s**2 + 0.25).reshape(-1, 1, 1, 1) * (y + s.reshape(-1, 1, 1, 1) * eps) for s in (t, r)]
    expected = ((skipped[0] - skipped[1]).square().sum((1, 2, 3)).sqrt() / (t - r)).mean()
    assert losses[0] == pytest.approx(expected.item(), rel=1e-2)
