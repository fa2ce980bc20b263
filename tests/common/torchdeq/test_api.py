"""The facade as a whole: every name with torchdeq's signature, its sub-modules, losses, and programs written for it."""

import argparse
import importlib
import inspect
import math
import types

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from common.errors import UserError
from common.torchdeq import api as torchdeq

# torchdeq 0.1.0: name -> parameters with defaults, without self; "..." takes further keywords
SIGNATURES = {
    "get_deq": "args=None, ...",
    "register_deq": "deq_type, core",
    "reset_deq": "model",
    "core.DEQBase": "args=None, f_solver='fixed_point_iter', b_solver='fixed_point_iter', no_stat=None, f_max_iter=40, "
    "b_max_iter=40, f_tol=0.001, b_tol=1e-06, f_stop_mode='abs', b_stop_mode='abs', eval_factor=1.0, "
    "eval_f_max_iter=0, ...",
    "core.DEQSliced": "args=None, ift=False, hook_ift=False, grad=1, tau=1.0, sup_gap=-1, sup_loc=None, n_states=1, "
    "indexing=None, ...",
    "core.DEQIndexing": "args=None, ift=False, hook_ift=False, grad=1, tau=1.0, sup_gap=-1, sup_loc=None, n_states=1, "
    "indexing=None, ...",
    "solver.fixed_point_iter": "func, x0, max_iter=50, tol=0.001, stop_mode='abs', indexing=None, tau=1.0, "
    "return_final=False, ...",
    "solver.simple_fixed_point_iter": "func, x0, max_iter=50, tau=1.0, indexing=None, ...",
    "solver.anderson_solver": "func, x0, max_iter=50, tol=0.001, stop_mode='abs', indexing=None, m=6, lam=0.0001, "
    "tau=1.0, return_final=False, ...",
    "solver.broyden_solver": "func, x0, max_iter=50, tol=0.001, stop_mode='abs', indexing=None, LBFGS_thres=None, "
    "ls=False, return_final=False, ...",
    "get_solver": "key",
    "register_solver": "solver_type, solver",
    "solver_stat_from_final_step": "z, fz, nstep=0",
    "apply_norm": "model, norm_type='weight_norm', prefix_filter_out=None, filter_out=None, args=None, ...",
    "reset_norm": "model",
    "remove_norm": "model",
    "register_norm": "norm_type, norm_class",
    "register_norm_module": "module_class, norm_type, names='weight', dims=0",
    "VariationalDropout": "dropout=0.5",
    "VariationalDropout1d": "dropout=0.5, token_first=True",
    "VariationalDropout2d": "dropout=0.5, token_first=True",
    "VariationalDropout3d": "dropout=0.5, token_first=True",
    "VariationalDropToken1d": "dropout=0.5, token_first=True",
    "VariationalDropToken2d": "dropout=0.5, token_first=True",
    "VariationalDropToken3d": "dropout=0.5, token_first=True",
    "reset_dropout": "model",
    "fp_correction": "crit, args, weight_func='exp', return_loss_values=False, ...",
    "register_weight_func": "name, func",
    "jac_reg": "f0, z0, vecs=1, create_graph=True",
    "power_method": "f0, z0, n_iters=100",
    "add_deq_args": "parser",
    "mixed_init": "z_shape, device=None",
    "mem_gc": "func, in_args=None",
    "grad.make_pair": "target, source",
    "utils.config.DEQConfig": "config",
}
OURS_ADD = {"mem_gc": {"module"}, "utils.config.DEQConfig": set()}


@pytest.mark.parametrize("name", SIGNATURES)
def test_every_name_has_torchdeqs_signature(name):
    value = torchdeq
    for part in name.split("."):
        value = getattr(value, part)
    assert hasattr(torchdeq, name.split(".")[-1])
    found = {p.name: p for p in inspect.signature(value).parameters.values()}
    listed = SIGNATURES[name].split(", ")
    open_ended = listed[-1] == "..."
    wanted = [each.split("=") for each in listed if each != "..."]
    order = [each for each in found if found[each].kind is inspect.Parameter.POSITIONAL_OR_KEYWORD]
    assert order[: len(wanted)] == [each[0] for each in wanted]
    assert set(order[len(wanted) :]) <= OURS_ADD.get(name, set())
    for parameter, *default in wanted:
        if default:
            assert repr(found[parameter].default) == default[0], parameter
    assert any(p.kind is inspect.Parameter.VAR_KEYWORD for p in found.values()) is open_ended
    assert value.__doc__, "every public name says what it is"


def test_calls_take_torchdeqs_arguments():
    for core in (torchdeq.DEQSliced, torchdeq.DEQIndexing):
        parameters = list(inspect.signature(core.forward).parameters)
        assert parameters == ["self", "func", "z_init", "solver_kwargs", "sradius_mode", "backward_writer", "kwargs"]
        assert issubclass(core, torchdeq.DEQBase)


@pytest.mark.parametrize(
    "path, names",
    [
        ("core", "get_deq reset_deq register_deq DEQBase DEQSliced DEQIndexing"),
        ("norm", "apply_norm reset_norm remove_norm register_norm register_norm_module WeightNorm SpectralNorm"),
        ("solver", "get_solver register_solver solver_stat_from_final_step anderson_solver broyden_solver"),
        ("solver.fp_iter", "fixed_point_iter simple_fixed_point_iter"),
        ("solver.stat", "SolverStat"),
        ("dropout", "VariationalDropout VariationalDropToken2d reset_dropout"),
        ("loss", "fp_correction jac_reg power_method register_weight_func"),
        ("utils", "add_deq_args mem_gc mixed_init"),
        ("utils.mem", "mem_gc"),
        ("utils.layer_utils", "deq_decorator"),
        ("grad", "backward_factory make_pair"),
        ("norm.weight_norm", "WeightNorm"),
        ("norm.spectral_norm", "SpectralNorm"),
        ("norm.base_norm", "apply_norm reset_norm remove_norm register_norm register_norm_module"),
        ("core", "get_solver make_pair backward_factory power_method DEQConfig deq_decorator reset_norm reset_dropout"),
        ("solver.utils", "init_solver_info update_state batch_flatten batch_masked_mixing solver_stat_from_info"),
    ],
)
def test_submodules_can_be_imported_from_and_reached_as_attributes(path, names):
    module = importlib.import_module(f"common.torchdeq.api.{path}")
    reached = torchdeq
    for part in path.split("."):
        reached = getattr(reached, part)
    assert reached is module
    for name in names.split():
        assert getattr(module, name) is getattr(torchdeq, name)


def test_the_command_line_is_torchdeqs():
    parser = argparse.ArgumentParser()
    torchdeq.add_deq_args(parser)
    defaults = vars(parser.parse_args([]))
    assert defaults == {
        "f_solver": "fixed_point_iter", "b_solver": "fixed_point_iter", "f_max_iter": 40, "b_max_iter": 40,
        "f_tol": 1e-3, "b_tol": 1e-6, "f_stop_mode": "abs", "b_stop_mode": "abs", "eval_factor": 1.0,
        "eval_f_max_iter": 0, "norm_type": "weight_norm", "norm_no_scale": False, "norm_clip": False,
        "norm_clip_value": 1.0, "norm_target_norm": 1.0, "sn_n_power_iters": 1, "core": "sliced", "ift": False,
        "hook_ift": False, "n_states": 1, "indexing": [], "gamma": 0.8, "grad": [1], "tau": 1.0, "sup_gap": -1,
        "sup_loc": [], "jac_loss_weight": 0.0, "jac_loss_freq": 0.0, "jac_incremental": 0, "sradius_mode": False,
    }  # fmt: skip
    line = "--grad 1 2 --indexing 3 9 --norm_clip --f_solver broyden --tau .5"
    given = parser.parse_args(line.split())
    assert (given.grad, given.indexing, given.norm_clip, given.tau) == ([1, 2], [3, 9], True, 0.5)
    deq = torchdeq.get_deq(given, indexing=[3])
    assert deq.f_solver is torchdeq.broyden_solver and deq.indexing == [3, 37]


# ------------------------------------------------------------------------------------------------------------- losses


@pytest.mark.parametrize(
    "options, weights",
    [
        ({}, [0.512, 0.64, 0.8, 1]),
        ({"weight_func": "linear"}, [0.325, 0.55, 0.775, 1]),
        ({"weight_func": "const"}, [1, 1, 1, 1]),
        ({"gamma": 0.5}, [0.125, 0.25, 0.5, 1]),
        ({"weight_func": "linear", "gamma": 0.5, "bias": 1.0}, [1.625, 1.75, 1.875, 2]),
        ({"weight_func": "const", "c": 2.0, "gamma": 0.8}, [2, 2, 2, 2]),
    ],
)
def test_fp_correction_weighs_the_states(options, weights):
    values = [torch.tensor(3.0), torch.tensor(5.0), torch.tensor(7.0), torch.tensor(11.0)]
    scale = torch.tensor(2.0)
    loss, numbers = torchdeq.fp_correction(lambda v, s: v * s, (values, scale), return_loss_values=True, **options)
    assert loss.shape == () and loss.item() == pytest.approx(sum(w * 2 * v.item() for w, v in zip(weights, values)))
    assert numbers == [6, 10, 14, 22]


def test_registered_weights_are_used_and_wrong_ones_refused():
    torchdeq.register_weight_func("last_only_for_test", lambda n, k, scale=1.0: scale * float(k == n - 1))
    values = [torch.tensor(1.0), torch.tensor(10.0)]
    loss = torchdeq.fp_correction(lambda v: v, (values,), weight_func="last_only_for_test", scale=3.0)
    assert loss.item() == 30
    with pytest.raises(UserError, match="Closest: linear"):
        torchdeq.fp_correction(lambda v: v, (values,), weight_func="linaer")
    with pytest.warns(UserWarning, match="gama .closest: gamma"):
        torchdeq.fp_correction(lambda v: v, (values,), gama=0.9)
    with pytest.warns(UserWarning, match="hold .3, 2. states: the shorter start over"):
        loss = torchdeq.fp_correction(torch.mul, ([torch.tensor(float(k)) for k in (1, 2, 3)], values), "const")
    assert loss.item() == 1 * 1 + 2 * 10 + 3 * 1
    with pytest.raises(UserError, match="function"):
        torchdeq.register_weight_func("x", 1.0)


def linear_state(width=6, seed=0):
    g = torch.Generator().manual_seed(seed)
    z = torch.randn(3, width, generator=g, dtype=torch.float64).requires_grad_()
    return torch.randn(width, width, generator=g, dtype=torch.float64), z


def test_jac_reg_estimates_the_frobenius_norm_and_leaves_the_graph_usable():
    a, z = linear_state()
    a.requires_grad_()
    fz = z @ a.T
    torch.manual_seed(0)
    value = torchdeq.jac_reg(fz, z, vecs=4000, create_graph=False)
    assert not value.requires_grad
    assert value.item() == pytest.approx(a.square().sum().item() / 6, rel=0.05)
    torchdeq.jac_reg(fz, z).backward()  # torchdeq keeps the graph of f0, and so must this
    assert a.grad.abs().sum() > 0
    with pytest.raises(UserError, match="requires_grad_"):
        torchdeq.jac_reg(fz.detach(), z)


def test_the_radius_of_a_rotation_is_found():
    turn = 0.9 * torch.tensor([[math.cos(1), -math.sin(1)], [math.sin(1), math.cos(1)]])
    z = torch.randn(4, 2, generator=torch.Generator().manual_seed(1)).requires_grad_()
    torch.manual_seed(0)
    vector, radius = torchdeq.power_method(z @ turn.T, z)
    assert vector.shape == (4, 2) and torch.linalg.vector_norm(vector, dim=1) == pytest.approx(torch.ones(4))
    assert radius == pytest.approx(torch.full((4,), 0.9), abs=1e-3)  # torchdeq: 0.49
    a, z = linear_state()
    _, radius = torchdeq.power_method(z @ (a @ a.T), z, n_iters=200)
    assert radius == pytest.approx(torch.full((3,), torch.linalg.eigvalsh(a @ a.T).max().item()).double(), rel=1e-4)


def test_mixed_init_and_mem_gc():
    torch.manual_seed(0)
    z = torchdeq.mixed_init(z_shape=(40, 50))
    assert 0.4 < (z == 0).float().mean() < 0.6 and 0.9 < z[z != 0].std() < 1.1
    layer, x = nn.Linear(3, 3), torch.randn(2, 3, requires_grad=True)
    torchdeq.mem_gc(layer, (x,)).square().sum().backward()
    found = [x.grad.clone(), layer.weight.grad.clone()]
    x.grad = layer.weight.grad = None
    layer(x).square().sum().backward()
    torch.testing.assert_close(found, [x.grad, layer.weight.grad])


def test_masks_live_on_the_device_of_their_input():
    drop = torchdeq.VariationalDropout2d(0.5, token_first=False)
    drop(torch.ones(2, 3, 4, 4, device="meta"))
    assert drop.mask.device.type == "meta" and drop.mask.shape == (2, 3, 1, 1)
    torchdeq.reset_dropout(nn.Sequential(drop))
    assert drop.mask is None


@pytest.mark.parametrize("places", [1, 2, 3])
@pytest.mark.parametrize("token_first", [True, False])
def test_dropout_classes_drop_what_their_names_say(places, token_first):
    torch.manual_seed(0)
    tokens = (5, 6, 7)[:places]
    x = torch.ones(4, *tokens, 8) if token_first else torch.ones(4, 8, *tokens)
    axes = tuple(range(1, places + 1)) if token_first else tuple(range(2, places + 2))
    channels = getattr(torchdeq, f"VariationalDropout{places}d")(0.5, token_first)(x)
    assert (channels.std(dim=axes) == 0).all() and 0.2 < (channels == 0).float().mean() < 0.8
    dropped = getattr(torchdeq, f"VariationalDropToken{places}d")(0.5, token_first)(x)
    assert (dropped.std(dim=-1 if token_first else 1) == 0).all() and set(dropped.unique().tolist()) == {0.0, 2.0}
    single = torchdeq.VariationalDropout(0.5)
    assert torch.equal(single(x), single(x)) and torch.equal(single.eval()(x), x)


# ------------------------------------------------------------------------------------------------------------ programs


class Multiscale(nn.Module):
    """A two-branch model written for torchdeq: only `torchdeq` is another module than there."""

    def __init__(self, args):
        super().__init__()
        self.inject = nn.Conv2d(1, 8, 3, padding=1)
        self.full_stage = nn.ModuleDict(
            {
                "fine": nn.Conv2d(8, 8, 3, padding=1),
                "coarse": nn.Conv2d(8, 8, 3, padding=1),
                "down": nn.Conv2d(8, 8, 3, stride=2, padding=1),
                "up": nn.Conv2d(8, 8, 1),
            }
        )
        self.drop = torchdeq.dropout.VariationalDropout2d(0.1, token_first=False)
        torchdeq.norm.apply_norm(self.full_stage, args=args)
        self.deq = torchdeq.get_deq(args)
        self.classifier = nn.Linear(16, 4)
        self.args = args

    def forward(self, x, compute_jac_loss=False):
        u = self.inject(x)
        torchdeq.reset_deq(self)
        z_init = [torch.zeros_like(u), torch.zeros(len(x), 8, 4, 4)]

        def func(fine, coarse):
            up = F.interpolate(self.full_stage["up"](coarse), scale_factor=2)
            new_fine = torch.tanh(0.4 * self.full_stage["fine"](self.drop(fine)) + 0.2 * up + u)
            new_coarse = torch.tanh(0.4 * self.full_stage["coarse"](coarse) + 0.3 * self.full_stage["down"](fine))
            return [new_fine, new_coarse]

        z_out, info = self.deq(func, z_init, solver_kwargs={"tau": self.args.tau}, writer=None)
        jac_loss = torch.zeros(())
        if self.training and compute_jac_loss:
            fine, coarse = z_out[-1]
            fine = fine.detach().requires_grad_()
            jac_loss = torchdeq.loss.jac_reg(func(fine, coarse.detach())[0], fine)
        heads = [self.classifier(torch.cat([z.mean((2, 3)) for z in each], 1)) for each in z_out]
        return (heads, jac_loss, info) if self.training else (heads[-1], info)


@pytest.mark.parametrize(
    "line",
    [
        "--f_solver broyden --f_max_iter 12 --grad 5 --tau 0.5",
        "--core indexing --f_solver anderson --f_stop_mode rel --n_states 3 --grad 1 2 3",
        "--f_solver simple_fixed_point_iter --f_max_iter 12 --n_states 2 --norm_type spectral_norm --norm_clip",
        "--ift --b_solver broyden --f_stop_mode rel --b_stop_mode rel --b_tol 1e-4",
    ],
)
def test_a_training_program_written_for_torchdeq_learns(line):
    parser = argparse.ArgumentParser()
    parser.add_argument("--batch_size", type=int, default=16)
    torchdeq.utils.add_deq_args(parser)
    args = parser.parse_args(f"{line} --jac_loss_weight 0.1".split())
    torch.manual_seed(0)
    net = Multiscale(args)
    optimizer = torch.optim.Adam(net.parameters(), lr=1e-2)
    x = torch.randn(args.batch_size, 1, 8, 8)
    x[:, :, :, :4] *= torch.linspace(0.2, 3, args.batch_size)[:, None, None, None]
    target = torch.arange(args.batch_size) // 4
    losses = []
    net.train()
    for _ in range(25):
        heads, jac_loss, info = net(x, compute_jac_loss=args.jac_loss_weight > 0)
        assert len(heads) == args.n_states and info["rel_lowest"].shape == (args.batch_size,)
        loss = torchdeq.fp_correction(F.cross_entropy, (heads, target), gamma=args.gamma)
        (loss + args.jac_loss_weight * jac_loss).backward()
        assert all(p.grad is not None for p in net.parameters())
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < 0.9 * losses[0]
    net.eval()
    head, info = net(x)
    assert (head.argmax(1) == target).float().mean() > 0.4  # chance is .25
    assert info["abs_lowest"].isfinite().all()


class ImplicitGraph(nn.Module):
    """A graph layer in the manner of the IGNN of torchdeq's zoo: bare parameters as weights, the nodes coupled."""

    def __init__(self, args, width, nodes):
        super().__init__()
        self.W = nn.Parameter(torch.randn(width, width))
        self.Omega = nn.Parameter(torch.randn(width, 3))
        torchdeq.norm.apply_norm(self, args=args)
        self.deq = torchdeq.get_deq(args)

    def forward(self, features, adjacency):
        torchdeq.norm.reset_norm(self)
        injected = self.Omega @ features @ adjacency
        z_out, info = self.deq(lambda z: F.elu(self.W @ z @ adjacency + injected), torch.zeros_like(injected))
        return z_out[-1], info


def test_rows_that_are_coupled_stop_together_and_own_modules_are_normalised():
    torchdeq.norm.register_norm_module(ImplicitGraph, "spectral_norm", names=["W", "Omega"], dims=[0, 0])
    args = types.SimpleNamespace(
        norm_type="spectral_norm", norm_clip=True, norm_target_norm=0.9, f_tol=1e-5, grad=5, tau=0.5
    )
    torch.manual_seed(0)
    layer = ImplicitGraph(args, 8, 12)
    adjacency = torch.full((12, 12), 1 / 12)
    adjacency[0, 1] = 0.5
    adjacency = adjacency / torch.linalg.matrix_norm(adjacency, 2)
    assert torch.linalg.matrix_norm(layer.W, 2) <= 0.9001
    features = torch.randn(3, 12)
    layer.eval()
    z, _ = layer(features, adjacency)
    injected = layer.Omega @ features @ adjacency
    residual = F.elu(layer.W @ z @ adjacency + injected) - z
    assert torch.linalg.vector_norm(residual, dim=1).max() < 1e-5  # a row frozen early would be left behind
    layer.train()
    layer(features, adjacency)[0].square().sum().backward()
    assert all(p.grad is not None for p in layer.parameters())
