"""The facade's normalisation: both spellings, own modules and norms, and the function kept."""

import argparse
import copy

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrize

from common.deq.layers import SpectralNorm, WeightNorm
from common.errors import UserError
from common.torchdeq import api as torchdeq

KINDS = ("weight_norm", "spectral_norm")


def net(seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(6, 8), nn.Conv1d(8, 8, 1), nn.ConvTranspose1d(8, 4, 2), nn.Linear(4, 4))


def norm_of(layer, name="weight"):
    return layer.parametrizations[name][0]


@pytest.mark.parametrize("kind", KINDS)
def test_pitfall_11_the_function_stays_when_a_norm_is_put_on_and_taken_off(kind):
    model = net()
    before = [layer.weight.detach().clone() for layer in model]
    assert torchdeq.apply_norm(model, kind) is None
    torchdeq.reset_norm(model)
    for layer, weight in zip(model, before, strict=True):
        torch.testing.assert_close(layer.weight, weight)
    once = [layer.weight.detach().clone() for layer in model.eval()]
    torchdeq.reset_norm(model)
    assert all(torch.equal(layer.weight, weight) for layer, weight in zip(model, once, strict=True))
    torchdeq.remove_norm(model)
    for layer, weight in zip(model, once, strict=True):
        assert isinstance(layer.weight, nn.Parameter) and torch.equal(layer.weight, weight)
        assert not parametrize.is_parametrized(layer) and not hasattr(layer, "_deq_norm")
    torchdeq.apply_norm(model, kind)  # and on again


SPELLINGS = [
    ({"clip": True, "clip_value": 0.5}, {"norm_clip": True, "norm_clip_value": 0.5}),
    ({"learn_scale": False, "target_norm": 0.7}, {"norm_no_scale": True, "norm_target_norm": 0.7}),
    ({"n_power_iterations": 4}, {"sn_n_power_iters": 4}),
]


@pytest.mark.parametrize("short, long", SPELLINGS)
@pytest.mark.parametrize("kind", KINDS)
def test_pitfall_9_both_spellings_of_the_keywords_work(kind, short, long):
    models = [net() for _ in range(4)]
    torchdeq.apply_norm(models[0], kind, **short)
    torchdeq.apply_norm(models[1], kind, **long)
    torchdeq.apply_norm(models[2], kind, args=argparse.Namespace(**long, learning_rate=0.1))
    torchdeq.apply_norm(models[3], args={**long, "norm_type": kind})
    first = norm_of(models[0][0])
    assert type(first) is {"weight_norm": WeightNorm, "spectral_norm": SpectralNorm}[kind]
    for model in models[1:]:
        assert norm_of(model[0]).__dict__.keys() == first.__dict__.keys()
        assert (norm_of(model[0]).clip, norm_of(model[0]).learn_scale) == (first.clip, first.learn_scale)
        torch.testing.assert_close(model[0].weight, models[0][0].weight)
    plain = net()
    if "clip" in short:
        torch.testing.assert_close(models[0][3].weight.norm() / plain[3].weight.norm(), torch.tensor(0.5))
    if "learn_scale" in short:
        weight = models[0][0].weight
        size = torch.linalg.matrix_norm(weight, 2) if kind == "spectral_norm" else weight.norm(dim=1).mean()
        assert size.item() == pytest.approx(0.7, rel=1e-5)
    if "n_power_iterations" in short and kind == "spectral_norm":
        assert first.power_iterations == 4


def test_a_clipped_spectral_norm_bounds_the_weight_from_the_start():
    model = net()
    with torch.no_grad():
        model[0].weight.mul_(10)
        model[3].weight.mul_(0.01)
    small = model[3].weight.detach().clone()
    torchdeq.apply_norm(model, args={"norm_type": "spectral_norm", "norm_clip": True, "norm_target_norm": 0.9})
    torchdeq.reset_norm(model)
    assert torch.linalg.matrix_norm(model[0].weight, 2).item() == pytest.approx(0.9, rel=1e-4)
    assert torch.equal(model[3].weight, small)
    assert model[0].parametrizations.weight.original0.requires_grad


def test_keywords_of_the_command_line_come_before_args_and_those_before_the_short_ones():
    model = net()
    args = {"norm_clip": False, "norm_target_norm": 0.5, "norm_no_scale": True, "norm_type": "weight_norm"}
    torchdeq.apply_norm(model, "spectral_norm", args=args, norm_target_norm=0.25, clip=True)
    norm = norm_of(model[0])
    assert type(norm) is WeightNorm and norm.clip is None and norm.target == 0.25 and not norm.learn_scale


@pytest.mark.parametrize(
    "filters, normed",
    [
        ({"filter_out": "conv"}, {"head", "block.linear"}),
        ({"filter_out": ["conv", "head"]}, {"block.linear"}),
        ({"prefix_filter_out": "block"}, {"head"}),
        ({"prefix_filter_out": ["block.l", "x"]}, {"head", "block.conv"}),
        ({}, {"head", "block.conv", "block.linear"}),
    ],
)
def test_filters_go_by_path(filters, normed):
    model = nn.ModuleDict({"block": nn.ModuleDict({"conv": nn.Conv2d(2, 2, 1), "linear": nn.Linear(2, 2)})})
    model["head"] = nn.Linear(2, 2)
    model["other"] = nn.modules.linear.NonDynamicallyQuantizableLinear(2, 2)  # a subclass is left alone
    torchdeq.apply_norm(model, **filters)
    assert {path for path, module in model.named_modules() if hasattr(module, "_deq_norm")} == normed


@pytest.mark.parametrize("kind", KINDS)
def test_pitfall_10_copies_moves_and_later_initialisation_work(kind):
    model = net()
    torchdeq.apply_norm(model, kind)
    torchdeq.reset_norm(model)
    twin = copy.deepcopy(model)  # torchdeq: raises, the weight is no leaf
    torch.testing.assert_close(twin[0].weight, model[0].weight)
    assert twin[0].weight is not model[0].weight
    moved = copy.deepcopy(model).double()
    assert moved[0].weight.dtype == torch.float64  # torchdeq: only after the next reset
    moved[0](torch.zeros(1, 6, dtype=torch.float64))
    fresh = torch.randn(8, 6)
    model[0].weight = fresh
    torchdeq.reset_norm(model)
    torch.testing.assert_close(model[0].weight, fresh, rtol=1e-5, atol=1e-6)  # torchdeq: lost at the reset
    twin.load_state_dict(model.state_dict())
    torch.testing.assert_close(twin[0].weight, model[0].weight)


@pytest.mark.parametrize("kind", KINDS)
def test_one_reset_serves_all_steps_and_gradients_reach_scale_and_direction(kind):
    model = nn.Linear(5, 5)
    torchdeq.apply_norm(model, kind)
    torchdeq.reset_norm(model)
    assert model.weight is model.weight
    deq = torchdeq.get_deq(f_max_iter=5, grad=3)
    deq(lambda z: torch.tanh(0.5 * model(z)), torch.zeros(2, 5))[0][-1].square().sum().backward()
    originals = model.parametrizations.weight
    assert originals.original0.grad.abs().sum() > 0 and originals.original1.grad.abs().sum() > 0


class Bare(nn.Module):
    def __init__(self):
        super().__init__()
        self.W, self.U = nn.Parameter(torch.randn(4, 3)), nn.Parameter(torch.randn(2, 5))


def test_modules_of_ones_own_can_be_registered():
    for kind in KINDS:
        torchdeq.register_norm_module(Bare, kind, names=["W", "U"], dims=[0, 1])
        model = nn.Sequential(Bare(), nn.Linear(2, 2))
        before = [model[0].W.detach().clone(), model[0].U.detach().clone()]
        torchdeq.apply_norm(model, kind)
        assert model[0].parametrizations.W.original0.shape == (4, 1)
        assert model[0].parametrizations.U.original0.shape == (1, 5)
        torchdeq.reset_norm(model)
        torch.testing.assert_close([model[0].W.detach(), model[0].U.detach()], before)
        torchdeq.remove_norm(model)
        assert set(dict(model[0].named_parameters())) == {"W", "U"}
    torchdeq.register_norm_module(Bare, "weight_norm", names="V")
    with pytest.raises(UserError, match="no weight 'V'"):
        torchdeq.apply_norm(Bare())


class Halved:
    """A normalisation after torchdeq's protocol."""

    _target_modules = {nn.Linear: ("weight", 0)}  # noqa: RUF012

    def __init__(self, factor):
        self.factor, self.resets = factor, 0

    @classmethod
    def apply(cls, module, deq_args=None, factor=0.5):
        module.register_parameter("weight_raw", nn.Parameter(module.weight.data))
        del module._parameters["weight"]
        made = cls(deq_args.get("norm_factor", factor))
        made(module)
        return made

    def __call__(self, module):
        module.weight = self.factor * module.weight_raw
        self.resets += 1

    def remove(self, module):
        weight = module.weight.detach()
        del module.weight, module._parameters["weight_raw"]
        module.register_parameter("weight", nn.Parameter(weight))


def test_norms_of_ones_own_can_be_registered():
    torchdeq.register_norm("halved_for_test", Halved)
    model = nn.Sequential(nn.Linear(3, 3), nn.Dropout())
    before = model[0].weight.detach().clone()
    torchdeq.apply_norm(model, "halved_for_test", args={"norm_type": "halved_for_test"}, factor=0.25)
    torchdeq.reset_norm(model)
    torchdeq.reset_deq(model)
    assert model[0]._deq_norm.resets == 3
    torch.testing.assert_close(model[0].weight, 0.25 * before)
    torchdeq.remove_norm(model)
    torch.testing.assert_close(model[0].weight.detach(), 0.25 * before)
    with pytest.raises(UserError, match="_target_modules and apply"):
        torchdeq.register_norm("x", object)


def test_reset_deq_resets_norms_and_masks_reset_norm_only_norms():
    model = nn.Sequential(nn.Linear(3, 3), torchdeq.VariationalDropout(0.5))
    torchdeq.apply_norm(model)
    model(torch.ones(4, 3))
    mask = model[1].mask
    torchdeq.reset_norm(model)
    assert model[1].mask is mask
    torchdeq.reset_deq(model)
    assert model[1].mask is None


def test_mistakes_are_named():
    with pytest.raises(UserError, match="Closest: weight_norm"):
        torchdeq.apply_norm(net(), "weigth_norm")
    with pytest.raises(UserError, match="Closest: clip_value"):
        torchdeq.apply_norm(net(), clip_vlue=2)
    with pytest.raises(UserError, match="Closest: spectral_norm"):
        torchdeq.register_norm_module(Bare, "spectral")
    model = net()
    torchdeq.apply_norm(model)
    with pytest.raises(UserError, match="remove_norm"):
        torchdeq.apply_norm(model)
    assert torchdeq.apply_norm(net(), "none") is None
    torchdeq.apply_norm(nn.ReLU())  # nothing to normalise is no mistake in torchdeq
