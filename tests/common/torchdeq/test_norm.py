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


def normed(kind="weight_norm"):
    model = net()
    torchdeq.apply_norm(model, kind)
    return model


def norm_of(layer, name="weight"):
    return layer.parametrizations[name][0]


@pytest.mark.parametrize("kind", KINDS)
def test_the_function_stays_when_a_norm_is_put_on_and_taken_off(kind):
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
def test_both_spellings_of_the_keywords_work(kind, short, long):
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
def test_copies_and_moves_work(kind):
    model = normed(kind)
    torchdeq.reset_norm(model)
    twin = copy.deepcopy(model)  # torchdeq: raises, the weight is no leaf
    torch.testing.assert_close(twin[0].weight, model[0].weight)
    assert twin[0].weight is not model[0].weight
    moved = copy.deepcopy(model).double()
    assert moved[0].weight.dtype == torch.float64  # torchdeq: only after the next reset
    moved[0](torch.zeros(1, 6, dtype=torch.float64))
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


def test_reset_deq_resets_norms_and_masks_reset_norm_only_norms():
    model = nn.Sequential(nn.Linear(3, 3), torchdeq.VariationalDropout(0.5))
    torchdeq.apply_norm(model)
    model(torch.ones(4, 3))
    mask = model[1].mask
    torchdeq.reset_norm(model)
    assert model[1].mask is mask
    torchdeq.reset_deq(model)
    assert model[1].mask is None


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda: torchdeq.apply_norm(net(), "weigth_norm"), "Closest: weight_norm"),
        (lambda: torchdeq.apply_norm(net(), clip_vlue=2), "Closest: clip_value"),
        (lambda: torchdeq.apply_norm(normed()), "remove_norm"),
        (lambda: torchdeq.register_norm_module(Bare, "spectral"), "Closest: spectral_norm"),
        (lambda: torchdeq.register_norm("x", object), "_target_modules and apply"),
    ],
)
def test_mistakes_are_named(call, message):
    with pytest.raises(UserError, match=message):
        call()


def test_nothing_to_normalise_is_no_mistake_in_torchdeq():
    assert torchdeq.apply_norm(net(), "none") is None
    torchdeq.apply_norm(nn.ReLU())


@pytest.mark.parametrize("kind", KINDS)
def test_an_assigned_weight_lasts_until_the_next_reset(kind):
    """As the zoo's IGNN projects its weight in every forward pass: no parameter changes, gradients pass through."""
    model = normed(kind)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    torchdeq.reset_norm(model)
    layer, x = model[0], torch.randn(3, 6)
    plain = layer.weight
    projected = plain.clamp(-0.1, 0.1)
    layer.weight = projected
    assert layer.weight is projected
    layer(x).square().sum().backward()
    raw = layer.parametrizations.weight
    assert raw.original1.grad.abs().sum() > 0 and layer.weight is projected  # torchdeq: it stays, spent or not
    named = dict(model.named_parameters())
    assert all(torch.equal(before[name], value) for name, value in named.items())
    with torch.no_grad():
        raw.original0.mul_(2)  # an optimiser step
    assert layer.weight is projected
    torchdeq.reset_norm(model)
    torch.testing.assert_close(layer.weight, 2 * plain, rtol=1e-3, atol=1e-4)


def test_in_place_projection_of_the_zoo():
    """`A = layer.weight; A.data.copy_(...); layer.weight = A`: the graph of A with other values."""
    model = normed()
    torchdeq.reset_norm(model)
    a = model[0].weight
    a.data.copy_(a.data.clamp(-0.1, 0.1))
    model[0].weight = a
    assert model[0].weight.abs().max() <= 0.1
    model[0](torch.ones(1, 6)).sum().backward()
    assert model[0].parametrizations.weight.original1.grad is not None


@pytest.mark.parametrize("kind", KINDS)
def test_writing_into_a_normalised_weight_is_refused(kind):
    """In torchdeq `nn.init` after apply_norm is lost at the first reset, without a word."""
    for write in (nn.init.zeros_, lambda weight: weight.data.fill_(0.5)):
        model = normed(kind)
        write(model[0].weight)
        with pytest.raises(UserError, match=r"written in place.*Assign instead"):
            torchdeq.reset_norm(model)
    model = normed(kind)
    model[0](torch.zeros(1, 6))
    with torch.no_grad():
        for parameter in model.parameters():  # of the parameters themselves: that counts
            parameter.data.mul_(0.5)
    torchdeq.reset_norm(model)


@pytest.mark.parametrize("learn_scale", [True, False])
def test_checkpoints_of_weight_norm_are_converted(learn_scale):
    model = net()
    torchdeq.apply_norm(model, learn_scale=learn_scale)
    g, v = torch.rand(8, 1) + 0.5, torch.randn(8, 6)
    theirs = {f"module.{name}": value for name, value in model.state_dict().items() if "0.parametrizations" not in name}
    theirs |= {"module.0.weight_v": v} | ({"module.0.weight_g": g} if learn_scale else {})
    model.load_state_dict(torchdeq.from_torchdeq(theirs))
    torchdeq.reset_norm(model)
    wanted = v / v.norm(dim=1, keepdim=True) * (g if learn_scale else 1)
    torch.testing.assert_close(model[0].weight, wanted)
    plain = {"conv_v": torch.ones(1), "a.bias": torch.ones(1)}
    assert torchdeq.from_torchdeq(plain).keys() == {"parametrizations.conv.original", "a.bias"}
    assert torchdeq.from_torchdeq({"a.weight_g": g}).keys() == {"a.weight_g"}  # no direction beside it


def test_checkpoints_of_spectral_norm_are_converted():
    model = normed("spectral_norm")
    weight, u, v = torch.randn(8, 6), torch.randn(8), torch.randn(6)
    theirs = {name: value for name, value in model.state_dict().items() if not name.startswith("0.parametrizations")}
    theirs |= {"0.weight_orig": weight, "0.weight_g": torch.full((8, 1), 0.9)}
    theirs |= {"0.weight_u": u / u.norm(), "0.weight_v": v / v.norm()}
    model.load_state_dict(torchdeq.from_torchdeq(theirs))
    for _ in range(30):
        torchdeq.reset_norm(model)
    sigma = torch.linalg.matrix_norm(weight, 2)
    torch.testing.assert_close(model[0].weight, 0.9 * weight / sigma, rtol=1e-3, atol=1e-4)
