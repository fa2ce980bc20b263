"""HamGAN's networks: published sizes, norms, gates, classes, and slow re-statements of the context blocks."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from common.deq.layers import reset
from common.errors import UserError
from common.ham.decompose import CD, NMF
from projects.hamburger.sagan import (
    ConditionalBatchNorm2d,
    DownBlock,
    EntryBlock,
    GatedAttention,
    GatedHamburger,
    Sagan,
    UpBlock,
)

TINY = dict(img_resolution=8, img_channels=1, label_dim=3, z_dim=6, g_width=8, d_width=8, g_context_at=8,
            d_context_at=4, g_ham=NMF(rank=4, unit=False), d_ham=NMF(rank=4, unit=False))  # fmt: skip


def tiny(**changed) -> Sagan:
    torch.manual_seed(0)
    return Sagan(**TINY | changed)


def hot(*classes: int) -> torch.Tensor:
    return F.one_hot(torch.tensor(classes), 3).float()


def noise(n: int = 4) -> torch.Tensor:
    return torch.randn(n, 6, generator=torch.Generator().manual_seed(1))


def pictures(n: int = 4) -> torch.Tensor:
    return torch.randn(n, 1, 8, 8, generator=torch.Generator().manual_seed(2)).tanh()


# Sizes


def conv(inside: int, outside: int, side: int) -> int:
    return side**2 * inside * outside + outside


def generator_count(classes: int) -> int:
    """From the TensorFlow code: linear, five blocks with two conditional norms each, ham, norm, last convolution."""
    total = 128 * 16384 + 16384
    for i, o in ((1024, 1024), (1024, 512), (512, 256), (256, 128), (128, 64)):
        total += 2 * classes * (i + o) + conv(i, o, 3) + conv(o, o, 3) + conv(i, o, 1)
    return total + 2 * 256**2 + 2 * classes * 256 + 1 + 2 * 64 + conv(64, 3, 3)


def discriminator_count(classes: int) -> int:
    total = conv(3, 64, 3) + conv(64, 64, 3) + conv(3, 64, 1)
    for i, o in ((64, 128), (128, 256), (256, 512), (512, 1024)):
        total += conv(i, o, 3) + conv(o, o, 3) + conv(i, o, 1)
    return total + 2 * conv(1024, 1024, 3) + 2 * 128**2 + 1 + 1024 + 1 + classes * 1024


def test_the_published_network_layer_by_layer():
    seen = {}
    with FakeTensorMode():
        net = Sagan(label_dim=1000)
        for name, part in net.named_modules():
            if isinstance(part, UpBlock | DownBlock | EntryBlock | GatedHamburger):
                part.register_forward_hook(lambda m, a, y, name=name: seen.update({name: tuple(y.shape[1:])}))
        images = net(torch.empty(2, 128), torch.empty(2, 1000))
        logits = net.discriminator(images, torch.empty(2, 1000))
    assert tuple(images.shape) == (2, 3, 128, 128) and tuple(logits.shape) == (2,)
    assert list(seen.items()) == [
        ("generator.blocks.0", (1024, 8, 8)), ("generator.blocks.1", (512, 16, 16)),
        ("generator.blocks.2", (256, 32, 32)), ("generator.context", (256, 32, 32)),
        ("generator.blocks.3", (128, 64, 64)), ("generator.blocks.4", (64, 128, 128)),
        ("discriminator.entry", (64, 64, 64)), ("discriminator.blocks.0", (128, 32, 32)),
        ("discriminator.context", (128, 32, 32)), ("discriminator.blocks.1", (256, 16, 16)),
        ("discriminator.blocks.2", (512, 8, 8)), ("discriminator.blocks.3", (1024, 4, 4)),
        ("discriminator.blocks.4", (1024, 4, 4)),
    ]  # fmt: skip
    count = lambda part: sum(p.numel() for p in part.parameters())
    assert count(net.generator) == generator_count(1000) == 42_640_004
    assert count(net.discriminator) == discriminator_count(1000) == 39_475_906
    for part, rank in ((net.generator, 32), (net.discriminator, 16)):
        rule = part.context.ham.decomposition
        assert (rule.rank, rule.steps, rule.eval_steps, rule.unit, rule.gradient) == (rank, 6, 6, False, "one_step")
    assert net.discriminator.context.norm is None


def test_bases_of_the_ham_are_uniform_and_keep_their_length():
    bases = tiny().generator.context.ham.decomposition.draw(1000, 8)
    assert bases.min() >= 0 and bases.max() < 1
    torch.testing.assert_close(bases.mean(), torch.tensor(0.5), rtol=0, atol=0.01)
    torch.testing.assert_close(bases.std(), torch.tensor(12**-0.5), rtol=0, atol=0.01)


# Norms


def matrices(net: nn.Module) -> dict[str, torch.Tensor]:
    return {n: m.weight.detach().flatten(1) for n, m in net.named_modules() if hasattr(m, "parametrizations")}


def test_every_weight_has_a_spectral_norm_of_at_most_one():
    net = tiny()
    plain = {n for n, m in net.named_modules() if isinstance(m, nn.Conv2d | nn.Linear)}
    with torch.no_grad():
        for p in net.parameters():
            p.add_(torch.randn_like(p))  # as far as many optimiser steps
    assert set(matrices(net)) == plain and len(plain) == 16
    for _ in range(30):
        reset(net)  # a power iteration each
    for name, matrix in matrices(net).items():
        largest = torch.linalg.matrix_norm(matrix, 2).item()
        assert largest == pytest.approx(1, abs=0.01), name


def test_a_small_weight_is_left_alone_except_in_the_bread():
    net = tiny()
    for part in net.modules():
        if hasattr(part, "parametrizations"):
            part.weight = 0.1 * part.weight / torch.linalg.matrix_norm(part.weight.flatten(1), 2)
    norms = {name: torch.linalg.matrix_norm(matrix, 2).item() for name, matrix in matrices(net).items()}
    assert {n for n, value in norms.items() if value > 0.5} == {n for n in norms if ".context." in n}
    assert all(value == pytest.approx(1 if ".context." in n else 0.1, rel=1e-4) for n, value in norms.items())


def test_conditional_norm_is_batch_norm_with_the_rows_of_the_class():
    norm = ConditionalBatchNorm2d(5, 3, momentum=0.25).double()
    with torch.no_grad():
        norm.scale.normal_()
        norm.shift.normal_()
    x = torch.randn(6, 5, 4, 4, dtype=torch.float64) * 3 + 1
    classes = [2, 0, 2, 2, 0, 0]
    y = norm(x, hot(*classes).double())
    mean, var = x.mean(dim=(0, 2, 3)), x.var(dim=(0, 2, 3), unbiased=False)
    for row, label in enumerate(classes):
        for c in range(5):
            want = (x[row, c] - mean[c]) / (var[c] + 1e-3).sqrt() * norm.scale[label, c] + norm.shift[label, c]
            torch.testing.assert_close(y[row, c], want)
    y.square().sum().backward()
    assert not norm.scale.grad[1].any() and norm.scale.grad[[0, 2]].all()  # nobody was of class 1
    torch.testing.assert_close(norm.statistics.running_mean, 0.25 * mean)
    assert norm.eval()(x, hot(1).double()).shape == x.shape  # one class for all, with the running statistics


def test_an_image_in_evaluation_depends_on_its_noise_and_class_alone():
    net = tiny().eval()
    with torch.no_grad():
        net.generator.context.sigma.fill_(0.5)
    whole = net(noise(), hot(0, 1, 2, 0))
    torch.manual_seed(9)  # bases of the ham do not come from the stream
    torch.testing.assert_close(net(noise()[2:3], hot(2)), whole[2:3])
    with torch.no_grad():
        net.generator.blocks[0].norm1.shift[1] += 1
    other = net(noise(), hot(0, 1, 2, 0))
    assert torch.equal(other[[0, 2, 3]], whole[[0, 2, 3]]) and not torch.allclose(other[1], whole[1])


# Context blocks


@pytest.mark.parametrize("context", ["ham", "attention"])
def test_the_gate_begins_closed_and_has_a_gradient(context):
    net, without = tiny(context=context), tiny(context="none")
    own = without.state_dict()
    net.load_state_dict(own | {k: v for k, v in net.state_dict().items() if k not in own})
    labels = hot(0, 1, 2, 0)
    images = net(noise(), labels)
    torch.testing.assert_close(images, without(noise(), labels))
    logits = net.discriminator(pictures(), labels)
    torch.testing.assert_close(logits, without.discriminator(pictures(), labels))
    (images.sum() + logits.sum()).backward()
    for part in (net.generator, net.discriminator):
        grads = {n: p.grad for n, p in part.context.named_parameters()}
        assert grads.pop("sigma").abs() > 1e-4
        assert not any(g.any() for g in grads.values())  # behind a factor of 0
    with torch.no_grad():
        net.generator.context.sigma.fill_(0.5)
    net.zero_grad()
    net(noise(), labels).square().sum().backward()
    assert all(p.grad.any() for p in net.generator.context.parameters())


@pytest.mark.parametrize("version", ["v1", "v2"])
@pytest.mark.parametrize("rule", [NMF(rank=3, unit=False), CD(rank=3, beta=0.01)])
def test_hamburger_written_out(version, rule):
    torch.manual_seed(0)
    made = lambda channels: ConditionalBatchNorm2d(channels, 3, eps=0.1)
    block = GatedHamburger(4, rule, version=version, norm=made, eval_seed=5).eval()
    with torch.no_grad():
        block.sigma.fill_(0.7)
        block.norm.scale.normal_()
        block.norm.shift.normal_()
    x, labels = torch.randn(2, 4, 3, 3), hot(2, 0)
    bases = rule.draw(1, 4, generator=torch.Generator().manual_seed(5))
    weight = lambda layer: layer.weight.flatten(1)
    got = block(x, labels).detach()
    for row, label in enumerate((2, 0)):
        pixels = weight(block.lower) @ x[row].flatten(1)
        pixels = pixels.clamp(min=0) if isinstance(rule, NMF) else pixels
        atoms, codes = rule.solve(pixels[None], bases)
        h = (atoms @ codes)[0]
        through = block.upper if version == "v1" else block.cheese
        h = weight(through) @ h / (1 + 0.1) ** 0.5  # running statistics at their start: mean 0, variance 1
        h = h * block.norm.scale[label][:, None] + block.norm.shift[label][:, None]
        h = h if version == "v1" else weight(block.upper) @ h.clamp(min=0)
        torch.testing.assert_close(got[row].flatten(1), x[row].flatten(1) + 0.7 * h.detach(), rtol=1e-4, atol=1e-5)


def test_attention_written_out():
    torch.manual_seed(0)
    block = GatedAttention(16)
    with torch.no_grad():
        block.sigma.fill_(0.7)
    x = torch.randn(2, 16, 4, 4)
    got = block(x)
    squares = [(r, c) for r in (0, 2) for c in (0, 2)]
    largest = lambda y: torch.stack([y[:, r : r + 2, c : c + 2].amax(dim=(1, 2)) for r, c in squares], dim=1)
    for row in range(2):
        q = block.query(x[row : row + 1])[0]
        k, v = largest(block.key(x[row : row + 1])[0]), largest(block.value(x[row : row + 1])[0])
        for r in range(4):
            for c in range(4):
                seen = v @ torch.softmax(k.T @ q[:, r, c], dim=0)
                want = x[row, :, r, c] + 0.7 * block.upper.weight.flatten(1) @ seen
                torch.testing.assert_close(got[row, :, r, c], want)


def test_the_discriminator_sees_once_where_two_blocks_share_a_resolution():
    net, calls = tiny(), []
    net.discriminator.context.register_forward_hook(lambda m, a, y: calls.append(a[0].shape))
    net.discriminator(pictures(), hot(0, 1, 2, 0))
    assert calls == [(4, 8, 4, 4)]


# Blocks and heads


def test_shortcuts_may_change_places_with_resampling():
    torch.manual_seed(0)
    x = torch.randn(2, 3, 4, 4)
    up, down, entry = UpBlock(3, 5, 0, lambda c, k: _Plain()), DownBlock(3, 5), EntryBlock(3, 5)
    double = lambda y: y.repeat_interleave(2, dim=2).repeat_interleave(2, dim=3)
    halve = lambda y: y.unflatten(2, (2, 2)).unflatten(4, (2, 2)).mean(dim=(3, 5))
    want = up.conv2(F.relu(up.conv1(double(F.relu(x))))) + up.shortcut(double(x))
    torch.testing.assert_close(up(x, None), want)
    want = halve(down.conv2(F.relu(down.conv1(F.relu(x))))) + halve(down.shortcut(x))
    torch.testing.assert_close(down(x), want)
    want = halve(entry.conv2(F.relu(entry.conv1(x)))) + halve(entry.shortcut(x))
    torch.testing.assert_close(entry(x), want)
    same = DownBlock(3, 3, downsample=False)
    torch.testing.assert_close(same(x), x + same.conv2(F.relu(same.conv1(F.relu(x)))))


class _Plain(nn.Module):
    def forward(self, x, class_labels):
        return x


def test_projection_of_the_class():
    d = tiny().discriminator.eval()
    phi = d.features(pictures())
    assert phi.shape == (4, 8) and phi.min() >= 0
    rows = d.classes.weight.T  # (classes, features)
    for classes in ((0, 0, 0, 0), (2, 1, 0, 2)):
        want = d.last(phi).squeeze(1) + (phi * rows[list(classes)]).sum(dim=1)
        torch.testing.assert_close(d(pictures(), hot(*classes)), want)
    unconditional = tiny(label_dim=0)
    assert unconditional.discriminator.classes is None and unconditional.discriminator(pictures()).shape == (4,)
    assert unconditional(noise()).shape == (4, 1, 8, 8) and unconditional(noise()).abs().max() <= 1


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda: tiny(img_resolution=12), "img_resolution must be 4 times a power of two"),
        (lambda: tiny(img_resolution=4), "at least 8, got 4"),
        (lambda: tiny(context="hamm"), "context must be one of ham, attention, none, got 'hamm'. Closest: ham"),
        (lambda: tiny(g_context_at=16), "g_context_at must be one of 4, 8, got 16"),
        (lambda: tiny(d_context_at=8), "d_context_at must be one of 4, got 8"),
        (lambda: tiny(version="v2plus"), "version must be one of v1, v2"),
        (lambda: tiny(label_dim=-1), "label_dim must be a whole number >= 0"),
        (lambda: tiny(g_width=0), "g_width must be a whole number >= 1"),
        (lambda: tiny()(torch.zeros(2, 5), hot(0, 1)), r"noise of shape \(batch, 6\)"),
        (lambda: tiny()(noise(2)), r"one-hot of shape \(2, 3\), got None"),
        (lambda: tiny().discriminator(pictures(), hot(0, 1)), r"one-hot of shape \(4, 3\), got \(2, 3\)"),
    ],
)
def test_sizes_and_inputs_that_do_not_fit(call, message):
    with pytest.raises(UserError, match=message):
        call()
