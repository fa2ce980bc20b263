"""Behaviour of SongUNet and DhariwalUNet, and what every raw network promises (EDM2UNet, MLPDenoiser as well)."""

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from common.errors import UserError
from common.nets.edm2 import EDM2UNet, weights_kept
from common.nets.mlp import MLPDenoiser
from common.nets.unet import DhariwalUNet, SongUNet

RGB = dict(img_resolution=8, in_channels=3, out_channels=3, dropout=0.2, label_dim=4)
SMALL = dict(RGB, model_channels=16, channel_mult=[1, 2], num_blocks=1, attn_resolutions=[4])
NCSNPP = dict(embedding_type="fourier", encoder_type="residual", channel_mult_noise=2, resample_filter=[1, 3, 3, 1])
MAKERS = {
    "ddpmpp": lambda: SongUNet(**SMALL, augment_dim=9),
    "ncsnpp": lambda: SongUNet(**SMALL, **NCSNPP),
    "skip": lambda: SongUNet(**SMALL, **dict(NCSNPP, encoder_type="skip"), decoder_type="skip"),
    "label_dropout": lambda: SongUNet(**SMALL, label_dropout=0.5),
    "adm": lambda: DhariwalUNet(**dict(SMALL, model_channels=64)),
    "edm2": lambda: EDM2UNet(
        img_resolution=8, img_channels=3, label_dim=4, model_channels=64, channel_mult=[1, 2], num_blocks=1, dropout=0.2
    ),
    "mlp": lambda: MLPDenoiser(**RGB, augment_dim=0, width=32, depth=2),
}


def build(name):
    """A network without layers at zero, so that every path reaches the output."""
    torch.manual_seed(0)
    net = MAKERS[name]()
    with torch.no_grad():
        for key, p in net.named_parameters():
            # Shrunk or zeroed layers get the size of ordinary ones.
            if p.ndim == 0:
                p.fill_(0.7)
            elif p.ndim >= 2:
                p.normal_(std=p[0].numel() ** -0.5)
            elif "bias" in key:
                p.normal_(std=0.1)
    return net


def batch(size=3):
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(size, 3, 8, 8, generator=generator)
    return x, torch.linspace(-1.5, 1, size), torch.eye(4)[torch.arange(size) % 4]


def close(a, b, tolerance=2e-6):
    assert (a - b).abs().max() <= tolerance * b.abs().max(), (a - b).abs().max() / b.abs().max()


@pytest.fixture(params=MAKERS)
def net(request):
    return build(request.param)


def test_output_shape_and_attributes(net):
    x, noise, labels = batch()
    assert net(x, noise, labels).shape == x.shape
    assert (net.img_resolution, net.in_channels, net.out_channels, net.label_dim) == (8, 3, 3, 4)
    assert net.augment_dim in (0, 9)


def test_samples_do_not_see_each_other(net):
    x, noise, labels = batch()
    net.eval()
    close(net(x, noise, labels)[1:2], net(x[1:2], noise[1:2], labels[1:2]), 5e-6)


def test_every_input_matters(net):
    x, noise, labels = batch()
    net.eval()
    out = net(x, noise, labels)
    for other in (net(x + 0.1, noise, labels), net(x, noise + 0.3, labels), net(x, noise, labels.roll(1, 0))):
        assert (other - out).abs().flatten(1).amax(1).min() > 1e-4


def test_no_class_means_zero_labels_and_one_noise_label_serves_all(net):
    x, noise, labels = batch()
    net.eval()
    close(net(x, noise), net(x, noise, torch.zeros_like(labels)))
    close(net(x, noise[:1], labels), net(x, noise[:1].expand(3), labels))


def test_drawn_masks_equal_the_ones_torch_draws_on_the_way(net):
    x, noise, labels = batch()
    if getattr(net, "label_dropout", 0):
        net.label_dropout = 0  # drawn with rand, not bernoulli: same law, other stream
    net(x, noise, labels)  # a first training pass brings EDM2's weights to unit length
    with weights_kept(net):
        torch.manual_seed(3)
        inline = net(x, noise, labels)
        torch.manual_seed(3)
        masks = net.draw_dropout(x)
        assert len(masks) > 1 and all(m.dtype == torch.bool and len(m) == 3 for m in masks)
        close(net(x, noise, labels, dropout_masks=masks), inline)
        assert (net(x, noise, labels) - inline).abs().max() > 1e-3


def test_equal_masks_give_equal_passes_bit_for_bit(net):
    x, noise, labels = batch()
    masks = net.draw_dropout(x, torch.Generator().manual_seed(5))
    with weights_kept(net):  # each training pass of EDM2 normalises its weights again, which moves the last bit
        first, second = (net(x, noise, labels, dropout_masks=masks) for _ in range(2))
    assert torch.equal(first, second)


def test_masks_of_a_sub_batch_are_rows_of_the_whole(net):
    x, noise, labels = batch(4)
    masks = net.draw_dropout(x)
    rows = torch.tensor([2, 0])
    part = net(x[rows], noise[rows], labels[rows], dropout_masks=tuple(m[rows] for m in masks))
    close(part, net(x, noise, labels, dropout_masks=masks)[rows], 5e-6)


def test_masks_are_ignored_in_evaluation_and_empty_without_dropout(net):
    x, noise, labels = batch()
    masks = net.draw_dropout(x)
    net.eval()
    assert torch.equal(net(x, noise, labels, dropout_masks=masks), net(x, noise, labels))
    plain = SongUNet(**dict(SMALL, dropout=0))
    assert plain.draw_dropout(x) == ()
    plain(x, noise, labels, dropout_masks=())


def test_label_dropout_is_the_first_mask():
    net = build("label_dropout")
    x, noise, labels = batch()
    masks = list(net.draw_dropout(x))
    assert masks[0].shape == (3, 1)
    masks[0] = torch.tensor([[True], [False], [True]])
    dropped = net(x, noise, labels, dropout_masks=tuple(masks))
    masks[0] = torch.ones(3, 1, dtype=torch.bool)
    kept = net(x, noise, labels * torch.tensor([[1.0], [0.0], [1.0]]), dropout_masks=tuple(masks))
    close(dropped, kept)


def test_forward_mode_derivative_matches_finite_differences(net):
    x, noise, labels = batch(2)
    net = net.double().eval()
    x, noise, labels = x.double(), noise.double(), labels.double()
    direction = torch.randn_like(x)
    _, tangent = torch.func.jvp(lambda x, t: net(x, t, labels), (x, noise), (direction, torch.ones_like(noise)))
    h = 1e-6
    ahead, behind = (net(x + s * h * direction, noise + s * h, labels) for s in (1, -1))
    close(tangent, (ahead - behind) / (2 * h), 1e-5)


def test_channels_last_changes_rounding_only(net):
    x, noise, labels = batch()
    masks = net.draw_dropout(x)
    plain = net(x, noise, labels, dropout_masks=masks)
    net.to(memory_format=torch.channels_last)
    close(net(x.to(memory_format=torch.channels_last), noise, labels, dropout_masks=masks), plain, 5e-6)
    if not isinstance(net, MLPDenoiser):
        drawn = [m for m in net.draw_dropout(x) if m.ndim == 4]
        assert all(m.is_contiguous(memory_format=torch.channels_last) for m in drawn)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_changes_rounding_only(net, dtype):
    x, noise, labels = batch()
    net.eval()
    exact = net(x, noise, labels)
    # Rounding errors of some twenty layers in a row.
    tolerance = 8 * torch.finfo(dtype).eps
    out = net(x.to(dtype), noise, labels)
    assert out.dtype == dtype
    close(out.float(), exact, tolerance)
    with torch.autocast("cpu", dtype):
        close(net(x, noise, labels).float(), exact, tolerance)


def test_gradients_reach_every_weight_under_autocast(net):
    x, noise, labels = batch()
    with torch.autocast("cpu", torch.bfloat16):
        net(x, noise, labels, torch.ones(3, 9) if net.augment_dim else None).float().square().sum().backward()
    for key, p in net.named_parameters():
        assert p.grad is not None and p.grad.isfinite().all() and p.grad.abs().max() > 0, key


@pytest.mark.parametrize("name", MAKERS)
def test_runs_on_fake_tensors(name):
    with FakeTensorMode():
        net = MAKERS[name]()
        x = torch.empty(5, 3, 8, 8)
        out = net(x, torch.empty(5), torch.empty(5, 4), dropout_masks=net.draw_dropout(x))
        out.sum().backward()
    assert out.shape == x.shape


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(x=torch.zeros(3, 3, 16, 16)), r"takes images of shape \(batch, 3, 8, 8\), got \(3, 3, 16, 16\)"),
        (dict(x=torch.zeros(3, 1, 8, 8)), r"got \(3, 1, 8, 8\)"),
        (dict(noise_labels=torch.zeros(2)), r"noise_labels must have shape \(3,\) or \(1,\), got \(2,\)"),
        (dict(class_labels=torch.zeros(3, 7)), r"class_labels must have shape \(3, 4\).*label_dim=4, got \(3, 7\)"),
        (dict(augment_labels=torch.zeros(3, 2)), "augment_labels must have shape .* augment_dim"),
        (dict(dropout_masks=(torch.ones(3, 1),)), "holds 1 masks but this network has"),
    ],
)
def test_inputs_that_do_not_fit_are_named(net, change, message):
    x, noise, labels = batch()
    arguments = dict(x=x, noise_labels=noise, class_labels=labels) | change
    with pytest.raises(UserError, match=message):
        net(**arguments)


@pytest.mark.parametrize(
    ("kind", "change", "message"),
    [
        (SongUNet, dict(encoder_type="skp"), "encoder_type must be one of standard, skip, residual.*Closest: skip"),
        (SongUNet, dict(decoder_type="residual"), "decoder_type must be one of standard, skip"),
        (SongUNet, dict(embedding_type="cosine"), "embedding_type must be one of"),
        (SongUNet, dict(img_resolution=9), "img_resolution must be a multiple of 2"),
        (SongUNet, dict(img_resolution=0), "img_resolution must be a whole number >= 1, got 0"),
        (SongUNet, dict(attn_resolutions=[5]), r"attn_resolutions names 5, but this network works at \[8, 4\]"),
        (SongUNet, dict(channel_mult=[]), "channel_mult must name at least one level"),
        (SongUNet, dict(dropout=1.0), "dropout must be >= 0 and < 1, got 1.0"),
        (SongUNet, dict(label_dropout=-1), "label_dropout must be"),
        (SongUNet, dict(model_channels=2), "cannot be normalised"),
        (SongUNet, dict(num_blocks=0), "num_blocks must be a whole number"),
        (SongUNet, dict(num_times=0), "num_times must be a whole number >= 1"),
        (MLPDenoiser, dict(num_times=0), "num_times must be a whole number >= 1"),
        (DhariwalUNet, {}, "32 channels cannot be cut into heads of 64"),
    ],
)
def test_options_that_do_not_fit_are_named(kind, change, message):
    with pytest.raises(UserError, match=message):
        kind(**(RGB if kind is MLPDenoiser else SMALL) | change)


def test_default_attention_above_the_image_size_is_ignored():
    assert SongUNet(img_resolution=8, in_channels=1, out_channels=1, model_channels=16, channel_mult=[1, 1])


@pytest.mark.parametrize("kind", [SongUNet, MLPDenoiser])
def test_several_times_are_embedded_side_by_side(kind):
    torch.manual_seed(0)
    sizes = RGB if kind is MLPDenoiser else SMALL
    net = kind(**dict(sizes, dropout=0.0), num_times=2, augment_dim=3)
    with torch.no_grad():
        for p in net.parameters():
            p.normal_(std=0.1)
    x, labels = batch()[0], torch.eye(4)[:3]
    times = torch.tensor([[0.9, 0.2], [0.5, 0.5], [0.2, 0.9]])
    base = net(x, times, labels, torch.zeros(3, 3))
    for column in range(2):
        moved = times.clone()
        moved[:, column] += 0.1
        assert ((net(x, moved, labels, torch.zeros(3, 3)) - base).abs().flatten(1).amax(dim=1) > 1e-6).all()
    assert (net(x, times.flip(1), labels)[0] - net(x, times, labels)[0]).abs().max() > 1e-6
    # another batch size is another order of summing: float32 units times the root of some 5 layers of 256 terms
    close(net(x[1:2], times[1:2], labels[1:2], torch.zeros(1, 3)), base[1:2], 5e-6)
    close(net(x, times[:1], labels), net(x, times[:1].expand(3, 2), labels), 5e-6)
    with pytest.raises(UserError, match=r"noise_labels must have shape \(3, 2\) or \(1, 2\), got \(3,\)"):
        net(x, times[:, 0], labels)
