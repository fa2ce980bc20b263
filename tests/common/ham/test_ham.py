"""The module around a decomposition: shapes, groups, both directions, stored bases, precision."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch._subclasses.fake_tensor import FakeTensorMode

from common.errors import UserError
from common.ham.decompose import CD, NMF, VQ
from common.ham.ham import Ham, update_bases

KINDS = {"nmf": NMF, "vq": VQ, "cd": CD}
every_kind = pytest.mark.parametrize("kind", KINDS)


def rule(kind, **options):
    return KINDS[kind](**({"rank": 3} | ({} if kind == "nmf" else {"inv_t": 10.0}) | options))


def picture(kind, *shape, seed=0, dtype=torch.float64):
    x = torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)
    return x.abs() if kind == "nmf" else x


def state(module):
    return {name: value.clone() for name, value in module.state_dict().items()}


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


# ---------------------------------------------------------------------------------------------------------------------
# What is decomposed


@every_kind
def test_is_the_decomposition_of_the_pixels(kind):
    x = picture(kind, 2, 8, 3, 5)
    ham = Ham(8, rule(kind))
    bases = ham.decomposition.draw(2, 8, dtype=x.dtype)
    d, c = ham.decomposition.solve(x.reshape(2, 8, 15), bases)
    torch.testing.assert_close(ham(x, bases[:, None]), (d @ c).reshape(x.shape))
    one = ham(x, bases[:1])  # (S, d, r): the same start for all samples
    torch.testing.assert_close(one[:1], ham(x[:1], bases[:1]))
    torch.testing.assert_close(one[1:], ham(x[1:], bases[:1]))


@every_kind
def test_channel_ham_decomposes_the_transposed_matrix(kind):
    x = picture(kind, 2, 8, 3, 5)
    ham = Ham(8, rule(kind), spatial=False)
    bases = ham.decomposition.draw(2, 15, dtype=x.dtype)
    d, c = ham.decomposition.solve(x.reshape(2, 8, 15).transpose(1, 2), bases)
    torch.testing.assert_close(ham(x, bases[:, None]), (d @ c).transpose(1, 2).reshape(x.shape))


@every_kind
@pytest.mark.parametrize("spatial", [True, False], ids=["spatial", "channel"])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=["planes", "channels last"])
def test_groups_are_separate_hams(kind, spatial, layout):
    x = picture(kind, 2, 8, 3, 5).contiguous(memory_format=layout)
    ham = Ham(8, rule(kind), groups=4, spatial=spatial)
    d = 2 if spatial else 15
    bases = ham.decomposition.draw(8, d, dtype=x.dtype).unflatten(0, (2, 4))
    parts = [
        Ham(2, rule(kind), spatial=spatial)(part, bases[:, g : g + 1])
        for g, part in enumerate(x.contiguous().chunk(4, dim=1))
    ]
    torch.testing.assert_close(ham(x, bases), torch.cat(parts, dim=1))


@every_kind
@pytest.mark.parametrize("spatial", [True, False], ids=["spatial", "channel"])
def test_memory_order_changes_rounding_only_and_is_kept(kind, spatial):
    x = picture(kind, 2, 8, 3, 5)
    ham = Ham(8, rule(kind), spatial=spatial)
    bases = ham.decomposition.draw(1, 8 if spatial else 15, dtype=x.dtype)
    last = x.contiguous(memory_format=torch.channels_last)
    found = ham(last, bases)
    torch.testing.assert_close(found, ham(x, bases))
    if spatial:
        assert found.is_contiguous(memory_format=torch.channels_last)
        assert ham(x, bases).is_contiguous()


@every_kind
@pytest.mark.parametrize("shape", [(2, 8, 1, 1), (2, 8, 15), (0, 8, 3, 5), (1, 8, 2, 3, 4)], ids=str)
def test_other_shapes(kind, shape):
    x = picture(kind, *shape, dtype=torch.float32).requires_grad_()
    y = Ham(8, rule(kind, rank=12))(x)
    assert y.shape == x.shape and torch.isfinite(y).all()
    (grad,) = torch.autograd.grad(y.sum(), x)
    assert torch.isfinite(grad).all()


def test_steps_of_training_and_of_evaluation():
    x = picture("nmf", 1, 8, 3, 5)
    ham = Ham(8, NMF(rank=3, steps=1, eval_steps=9))
    bases = ham.decomposition.draw(1, 8, dtype=x.dtype)
    for training, steps in ((True, 1), (False, 9)):
        d, c = ham.decomposition.solve(x.flatten(2), bases, steps=steps)
        torch.testing.assert_close(ham.train(training)(x, bases).flatten(2), d @ c)


# ---------------------------------------------------------------------------------------------------------------------
# Precision


@every_kind
def test_float32_inside_under_autocast(kind):
    x = picture(kind, 2, 8, 3, 5, dtype=torch.float32)
    ham = Ham(8, rule(kind))
    bases = ham.decomposition.draw(1, 8)
    plain = ham(x, bases)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(ham(x, bases), plain)
        half = x.bfloat16().requires_grad_()
        found = ham(half, bases)
        found.sum().backward()
    assert found.dtype == half.grad.dtype == torch.bfloat16
    assert torch.equal(found, ham(half.detach().float(), bases).bfloat16())


def test_tiny_half_precision_numbers_do_not_underflow():
    x = (1e-4 * picture("nmf", 1, 8, 3, 5)).half()
    y = Ham(8, NMF(rank=8, steps=50))(x)
    assert y.dtype == torch.float16 and (y > 0).any() and torch.isfinite(y).all()


# ---------------------------------------------------------------------------------------------------------------------
# Bases


@every_kind
@pytest.mark.parametrize("bases", ["random", "online"])
def test_evaluation_changes_no_state(kind, bases):
    ham = Ham(8, rule(kind), bases=bases).eval()
    before = state(ham)
    assert list(before) == (["bases"] if bases == "online" else []), "the buffer exists before the first forward"
    for _ in range(2):
        ham(picture(kind, 2, 8, 3, 5))
    assert same(before, state(ham))
    ham.train()(picture(kind, 2, 8, 3, 5))
    assert same(before, state(ham)), "nor does a training forward, before update_bases"


@every_kind
@pytest.mark.parametrize("spatial", [True, False], ids=["spatial", "channel"])
def test_online_update_is_the_formula(kind, spatial):
    x = picture(kind, 5, 8, 3, 5)
    ham = Ham(8, rule(kind), groups=2, spatial=spatial, bases="online", pixels=15, eta=0.7).double()
    before = ham.bases.clone()
    ham(x)
    parts = x.reshape(10, 4, 15) if spatial else x.reshape(10, 4, 15).transpose(1, 2)
    found, _ = ham.decomposition.solve(parts, before.repeat(5, 1, 1))
    mean = found.unflatten(0, (5, 2)).mean(dim=0)
    ham.update_bases()
    torch.testing.assert_close(ham.bases, F.normalize(before + 0.7 * (mean - before), dim=1))
    moved = ham.bases.clone()
    ham.update_bases()
    assert torch.equal(ham.bases, moved), "one update per forward"
    fresh = Ham(8, rule(kind), groups=2, spatial=spatial, bases="online", pixels=15).double()
    fresh.load_state_dict(ham.state_dict())
    torch.testing.assert_close(fresh(x), ham(x))


def test_updates_reach_every_ham_of_a_network():
    net = torch.nn.Sequential(Ham(8, VQ(rank=3), bases="online"), torch.nn.ReLU(), Ham(8, NMF(rank=3)))
    before = state(net)
    net(picture("vq", 2, 8, 3, 5, dtype=torch.float32))
    assert update_bases(net) == 1
    assert not same(before, state(net))
    copy.deepcopy(net)
    with pytest.raises(UserError, match=r"update_bases needs online bases, this Ham's are random"):
        net[2].update_bases()


@every_kind
def test_learned_bases_get_a_gradient_from_bptt_only(kind):
    ham = Ham(8, rule(kind, gradient="bptt"), bases="learned").double()
    y = ham(picture(kind, 2, 8, 3, 5))
    y.square().sum().backward()
    assert ham.bases.grad.abs().sum() > 0
    if kind == "nmf":
        with torch.no_grad():
            ham.bases.neg_()
        torch.testing.assert_close(ham(picture(kind, 2, 8, 3, 5)), y)
    with pytest.raises(UserError, match=r"ham.bases=learned needs ham.gradient=bptt"):
        Ham(8, rule(kind), bases="learned")


@every_kind
def test_seeded_evaluation_depends_on_the_sample_alone(kind):
    x = picture(kind, 4, 8, 3, 5)
    ham = Ham(8, rule(kind), groups=2, eval_seed=3).eval()
    generator = torch.get_rng_state()
    whole = ham(x)
    torch.testing.assert_close(torch.cat([ham(x[2:]), ham(x[:2])]), whole[[2, 3, 0, 1]])
    assert torch.equal(generator, torch.get_rng_state()), "the global generator is left alone"
    assert not torch.allclose(Ham(8, rule(kind), groups=2, eval_seed=4).eval()(x), whole)
    ham.train()
    assert not torch.equal(ham(x), ham(x)), "training draws new bases each time"


@every_kind
def test_random_bases_repeat_with_the_global_seed(kind):
    x = picture(kind, 4, 8, 3, 5)
    ham = Ham(8, rule(kind)).eval()
    outputs = []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        outputs.append(ham(x))
    assert torch.equal(outputs[0], outputs[1]) and not torch.equal(outputs[0], outputs[2])


# ---------------------------------------------------------------------------------------------------------------------
# Bad input


@pytest.mark.parametrize(
    "build, sentence",
    [
        (lambda: Ham(8, groups=3), r"ham.channels must be a multiple of 3 \(ham.groups\), got 8"),
        (
            lambda: Ham(8, bases="onlin"),
            "ham.bases must be one of random, online, learned, got 'onlin'. Closest: online",
        ),
        (lambda: Ham(8, eta=2.0), r"ham.eta must be >= 0 and <= 1, got 2.0"),
        (lambda: Ham(8, spatial=False, bases="online"), "ham.pixels must be set for online bases of a channel ham"),
        (lambda: Ham(8, bases="online", eval_seed=1), "ham.eval_seed draws random bases, but the bases are online"),
        (lambda: Ham(8)(torch.rand(2, 4, 3, 3)), r"Ham expects an input \(B, 8, ...\), got \(2, 4, 3, 3\)"),
        (lambda: Ham(8)(torch.rand(2, 8)), r"Ham expects an input \(B, 8, ...\), got \(2, 8\)"),
        (lambda: Ham(8)(torch.randn(2, 8, 9)), "NMF needs an input >= 0"),
        (
            lambda: Ham(8, VQ(rank=3), spatial=False, bases="online", pixels=9)(torch.rand(2, 8, 4, 4)),
            "ham.pixels is 9, but the input has 16 pixels",
        ),
        (
            lambda: Ham(8, VQ(rank=3))(torch.rand(2, 8, 4, 4), torch.rand(8, 3)),
            r"bases must have the shape \(1, 8, 3\) or \(2, 1, 8, 3\), got \(8, 3\)",
        ),
    ],
    ids=range(10),
)
def test_bad_input_is_one_sentence(build, sentence):
    with pytest.raises(UserError, match=sentence):
        build()


@every_kind
def test_fake_tensors_and_a_description(kind):
    ham = Ham(8, rule(kind), groups=2)
    assert "groups=2" in repr(ham) and "rank=3" in repr(ham)
    with FakeTensorMode():
        assert ham(torch.empty(2, 8, 3, 5)).shape == (2, 8, 3, 5)
