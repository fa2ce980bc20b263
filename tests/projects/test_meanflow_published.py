"""The published settings of MeanFlow and iMF, read from the composed configurations and compared with the papers."""

from pathlib import Path

import pytest
import torch
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf

from common.runtime.cli.launch import register_resolvers
from common.weights.build import build

CONF = Path(__file__).resolve().parents[2] / "conf"
IMAGES = 1_281_167  # of ImageNet


def composed(experiment: str, *words: str):
    register_resolvers()
    with initialize_config_dir(str(CONF), version_base="1.3"):
        return compose("config", overrides=[f"+experiment={experiment}", f"run.experiment={experiment}", *words])


def published(cfg) -> dict[str, float]:
    return {entry.metric: entry.value for entry in cfg.published}


# name, patch, depth, width, heads, epochs, omega, kappa, end of the window, FID in one call
SIZES = [
    ("b4", 4, 12, 768, 12, 80, 1.0, 0.0, 1.0, 61.06),
    ("b4_guided", 4, 12, 768, 12, 240, 1.0, 0.5, 1.0, 11.35),
    ("b2", 2, 12, 768, 12, 240, 1.0, 0.5, 1.0, 6.17),
    ("m2", 2, 16, 1024, 16, 240, 1.0, 0.5, 1.0, 5.01),
    ("l2", 2, 24, 1024, 16, 240, 0.2, 0.92, 0.8, 3.84),
    ("xl2", 2, 28, 1152, 16, 240, 0.2, 0.92, 0.75, 3.43),
    ("xl2plus", 2, 28, 1152, 16, 1000, 0.2, 0.92, 0.75, None),
]


@pytest.mark.parametrize("name, patch, depth, width, heads, epochs, omega, kappa, end, fid", SIZES)
def test_meanflow_on_imagenet(name, patch, depth, width, heads, epochs, omega, kappa, end, fid):
    cfg = composed(f"meanflow_imagenet_{name}")
    net, loss, time = cfg.project.net, cfg.project.loss, cfg.project.time
    assert (net.patch_size, net.depth, net.width, net.num_heads) == (patch, depth, width, heads)
    assert (list(net.times), net.time_scale, net.img_resolution, net.in_channels) == (["t", "t-r"], 1, 32, 4)
    assert (loss.omega, loss.kappa, loss.start, loss.end, loss.power, loss.eps) == (omega, kappa, 0, end, 1, 0.01)
    assert time._target_.endswith("OrderThenMask") and (time.base.mean, time.base.std, time.equal) == (-0.4, 1, 0.75)
    optimizer = cfg.project.optimizer
    assert (optimizer.lr, list(optimizer.betas), optimizer.weight_decay) == (1e-4, [0.9, 0.95], 0)
    assert (cfg.project.schedule.warmup, cfg.ema.profiles.ema.decay, cfg.project.label_drop.p) == (0, 0.9999, 0.1)
    assert cfg.trainer.max_steps == epochs * (IMAGES // cfg.data.batch_size) and cfg.data.batch_size == 256
    assert (cfg.trainer.precision, cfg.trainer.gradient_clip_val) == ("32-true", None)
    assert cfg.data.source.mean == 0 and cfg.data.source.std == pytest.approx(1 / 0.18215)
    assert cfg.decoder.mean == 0 and cfg.decoder.std == cfg.data.source.std
    assert published(cfg).get("test/fid_one_step") == fid
    if name.startswith("xl2"):
        assert published(cfg)["test/fid_two_steps"] == (2.2 if name == "xl2plus" else 2.93)
        assert cfg.evaluate.samplers.two_steps.steps == 2


# name, width, depth, heads, omega, interval, FID, IS, parameters to generate
IMF = [
    ("b", 768, 12, 12, 8.0, (0.4, 0.65), 3.39, 255.3, 88_948_256),
    ("m", 768, 24, 12, 10.5, (0.4, 0.6), 2.27, 257.7, 173_921_312),
    ("l", 1024, 32, 16, 10.5, (0.4, 0.6), 1.86, 276.6, 409_071_648),
    ("xl", 1024, 48, 16, 8.0, (0.42, 0.62), 1.72, 282.0, 610_433_056),
]


@pytest.mark.parametrize("name, width, depth, heads, omega, interval, fid, score, generating", IMF)
def test_imf_on_imagenet(name, width, depth, heads, omega, interval, fid, score, generating):
    cfg = composed(f"imf_imagenet_{name}")
    net, loss, time = cfg.project.net, cfg.project.loss, cfg.project.time
    assert (net.width, net.depth, net.num_heads, net.head_depth, net.v_depth) == (width, depth, heads, 8, 8)
    assert (loss.power, loss.eps, loss.head, loss.uncond_omega) == (1, 0.01, "auxiliary", "one")
    assert time._target_.endswith("OrderThenMask") and (time.base.mean, time.base.std, time.equal) == (-0.4, 1, 0.5)
    assert (cfg.project.omega.s_max, cfg.project.omega.beta) == (7, 1)
    assert (cfg.project.interval.split, cfg.project.interval.whole, cfg.project.label_drop.p) == (0.5, False, 0.1)
    optimizer = cfg.project.optimizer
    assert (optimizer.lr, list(optimizer.betas), optimizer.weight_decay) == (1e-4, [0.9, 0.95], 0)
    steps = IMAGES // 1024
    assert (cfg.data.batch_size, cfg.trainer.max_steps, cfg.project.schedule.warmup) == (1024, 640 * steps, 10 * steps)
    assert (cfg.ema.profiles.ema.decay, cfg.trainer.precision, cfg.trainer.gradient_clip_val) == (
        0.9999, "32-true", None,
    )  # fmt: skip
    assert list(cfg.data.source.mean) == [0.86488, -0.27787343, 0.21616915, 0.3738409]
    assert list(cfg.decoder.std) == [4.85503674, 5.31922414, 3.93725398, 3.9870003]
    for sampler in (cfg.evaluate.samplers.one_step, cfg.sample.sampler):
        assert (sampler.steps, sampler.omega, (sampler.t_min, sampler.t_max)) == (1, omega, interval)
        assert sampler.beyond == (omega > 1 + cfg.project.omega.s_max)
    assert published(cfg)["test/fid_one_step"] == fid and published(cfg)["test/is_one_step"] == score
    assert cfg.evaluate.balanced and cfg.evaluate.inception_score and cfg.evaluate.samples == 50_000
    with torch.device("meta"):
        bare = build(OmegaConf.to_container(net, resolve=True) | {"v_depth": 0})
    assert sum(p.numel() for p in bare.parameters()) == generating


def test_two_calls_of_imf_xl():
    cfg = composed("imf_imagenet_xl")
    two = cfg.evaluate.samplers.two_steps
    assert (two.steps, two.omega, two.t_min, two.t_max) == (2, 4, 0.36, 0.64)
    assert published(cfg)["test/fid_two_steps"] == 1.54


def test_the_ablation_of_imf_is_smaller_and_shorter():
    cfg = composed("imf_imagenet_b_ablation")
    assert (cfg.data.batch_size, cfg.trainer.max_steps, cfg.project.schedule.warmup) == (256, 240 * (IMAGES // 256), 0)


def test_meanflow_on_cifar10():
    """Scripts cifar10_v0.sh and cifar10_v1.sh of Gsunshine/py-meanflow and its defaults."""
    v0, v1 = composed("meanflow_cifar10"), composed("meanflow_cifar10_v1")
    for cfg in (v0, v1):
        optimizer = cfg.project.optimizer
        assert (optimizer.lr, list(optimizer.betas), cfg.data.batch_size) == (6e-4, [0.9, 0.999], 8 * 128)
        steps = 50_000 // 1024
        assert (cfg.project.schedule.warmup, cfg.trainer.max_steps) == (200 * steps, 16_000 * steps)
        assert (cfg.project.loss.power, cfg.project.loss.eps, cfg.project.time.equal) == (0.75, 1e-3, 0.25)
        assert cfg.project.net.model.dropout == 0.2 and cfg.project.augment.p == 0.12
        assert {(p.decay, p.every) for p in cfg.ema.profiles.values()} == {
            (0.9999, 16), (0.99995, 16), (0.9996, 16),
        }  # fmt: skip
    assert (v0.project.time.base.mean, v0.project.time.base.std) == (-2, 2)
    assert v0.project.time._target_.endswith("OrderThenMask")
    time = v1.project.time
    assert (time.base.mean, time.base.std, time.second.mean, time.second.std, time.swap) == (-0.6, 1.6, -4, 1.6, False)
    assert time._target_.endswith("MaskThenOrder")


@pytest.mark.parametrize("experiment", ["imf_imagenet_b", "imf_tiny_guided"])
def test_several_scales_at_test_time_are_one_word(experiment):
    samplers = composed(experiment, "+guidance=omegas").evaluate.samplers
    assert [samplers[f"omega_{k}"].omega for k in (1, 2, 4, 8)] == [1, 2, 4, 8]
