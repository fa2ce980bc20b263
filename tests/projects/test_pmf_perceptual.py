"""LPIPS and ConvNeXt distances against their formulas written out, their files, and the crop both images share."""

from functools import partial

import pytest
import torch
from safetensors.torch import save_file
from torch.nn import functional as F

from common.errors import UserError
from projects.pmf.method import Perceptual, random_resized_crop, resize_matrix
from projects.pmf.perceptual import ConvNextDistance, Lpips

CONVS = {0: (3, 64), 2: (64, 64), 5: (64, 128), 7: (128, 128), 10: (128, 256), 12: (256, 256), 14: (256, 256),
         17: (256, 512), 19: (512, 512), 21: (512, 512), 24: (512, 512), 26: (512, 512), 28: (512, 512)}  # fmt: skip
AFTER = {2, 7, 14, 21, 28}  # the convolution whose activation is a feature; a pool follows all but the last


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """Random weights in the layout of torchvision's VGG16 (classifier included) and of LPIPS's heads."""
    folder = tmp_path_factory.mktemp("weights")
    generator = torch.Generator().manual_seed(0)
    vgg = {"classifier.0.weight": torch.zeros(4, 4)}
    for index, (into, out) in CONVS.items():
        vgg[f"features.{index}.weight"] = torch.randn(out, into, 3, 3, generator=generator) * (2 / (9 * into)) ** 0.5
        vgg[f"features.{index}.bias"] = 0.1 * torch.randn(out, generator=generator)
    widths = [CONVS[index][1] for index in sorted(AFTER)]
    heads = {
        f"lin{k}.model.1.weight": torch.rand(1, width, 1, 1, generator=generator) for k, width in enumerate(widths)
    }
    save_file(vgg, folder / "vgg.safetensors")
    save_file(heads, folder / "heads.safetensors")
    return folder, vgg, heads


@pytest.fixture(scope="module")
def lpips(files):
    folder = files[0]
    made = Lpips(backbone=str(folder / "vgg.safetensors"), heads=str(folder / "heads.safetensors"))
    made.load()
    return made.requires_grad_(False).eval()


def written_out(vgg, heads, image, x):
    """LPIPS as its paper has it, on [0, 1] images normalised with ImageNet's mean and deviation."""
    mean = torch.tensor([0.485, 0.456, 0.406])[:, None, None]
    std = torch.tensor([0.229, 0.224, 0.225])[:, None, None]
    pair = [((k + 1) / 2 - mean) / std for k in (image, x)]
    total, level = 0, 0
    for index in CONVS:
        weight, bias = vgg[f"features.{index}.weight"], vgg[f"features.{index}.bias"]
        pair = [F.conv2d(k, weight, bias, padding=1).relu() for k in pair]
        if index in AFTER:
            first, second = (k / (k.square().sum(1, keepdim=True).sqrt() + 1e-10) for k in pair)
            total = total + F.conv2d((first - second).square(), heads[f"lin{level}.model.1.weight"]).mean((1, 2, 3))
            pair, level = [F.max_pool2d(k, 2) for k in pair], level + 1
    return total


def images(n: int, size: int, seed: int) -> torch.Tensor:
    return torch.rand(n, 3, size, size, generator=torch.Generator().manual_seed(seed)) * 2 - 1


def test_lpips_is_its_formula(lpips, files):
    image, x = images(2, 32, 1), images(2, 32, 2)
    expected = written_out(files[1], files[2], image, x)
    # the rounded constants of the release (-.030 for 2 x .485 - 1) are the exact ones
    torch.testing.assert_close(lpips(image, x), expected, rtol=1e-4, atol=1e-6)
    assert (lpips(image, image) == 0).all() and (expected > 0).all()


def test_lpips_has_a_gradient_even_where_features_vanish(lpips):
    x = images(1, 16, 3)
    image = images(1, 16, 4).requires_grad_()
    (gradient,) = torch.autograd.grad(lpips(image, x).sum(), image)
    assert torch.isfinite(gradient).all() and gradient.abs().max() > 0
    before = lpips(image, x)
    assert lpips(image - 0.5 * gradient / gradient.abs().max(), x) < before  # downhill
    black = Lpips(backbone="", heads="").eval()
    with torch.no_grad():
        for p in black.features.parameters():
            p.zero_()  # every feature is 0, where the norm has no derivative
    (gradient,) = torch.autograd.grad(black(image, x).sum(), image)
    assert (gradient == 0).all()


def test_missing_and_wrong_files_are_named(files, tmp_path):
    folder = files[0]
    heads, vgg = str(folder / "heads.safetensors"), str(folder / "vgg.safetensors")
    with pytest.raises(UserError, match=r"no file .*nowhere.*vgg16-397923af.pth.*project.perceptual=null"):
        Lpips(backbone=str(tmp_path / "nowhere"), heads=heads).load()
    with pytest.raises(UserError, match=r"linear heads, and there is no file .*nowhere.*lpips 0.1.4"):
        Lpips(backbone=vgg, heads=str(tmp_path / "nowhere")).load()
    with pytest.raises(UserError, match=r"holds no lin0.model.1.weight of 64 values"):
        Lpips(backbone=vgg, heads=vgg).load()
    with pytest.raises(UserError, match=r"ConvNeXt V2, and there is no file .*nowhere.*convnextv2_base"):
        ConvNextDistance(weights=str(tmp_path / "nowhere"), model="convnextv2_atto").load()


def test_convnext_distance_is_of_pooled_features(tmp_path):
    import timm

    torch.manual_seed(0)
    network = timm.create_model("convnextv2_atto", num_classes=7).eval()  # a file has a classifier
    save_file(network.state_dict(), tmp_path / "c.safetensors")
    made = ConvNextDistance(weights=str(tmp_path / "c.safetensors"), model="convnextv2_atto").eval()
    made.load()
    image, x = images(2, 64, 5).requires_grad_(), images(2, 64, 6)
    with torch.no_grad():
        maps = [network.forward_features(k).mean((2, 3)) for k in (image, x)]
        norm = network.head.norm
        first, second = (F.layer_norm(m, m.shape[1:], norm.weight, norm.bias, 1e-6) for m in maps)
    found = made(image, x)
    torch.testing.assert_close(found, (first - second).square().sum(1), rtol=1e-4, atol=1e-5)
    found.sum().backward()
    assert image.grad.abs().sum() > 0


def test_both_distances_in_the_step_read_their_files_when_training_begins(files, small_module):
    folder = files[0]
    distance = Lpips(backbone=str(folder / "vgg.safetensors"), heads=str(folder / "heads.safetensors"))
    made = small_module(Perceptual(distances={"lpips": distance}, weights={"lpips": 0.4}, crop=16))
    assert (distance.heads[0] == 1 / 64).all()
    made.setup("fit")
    assert (distance.heads[0] == files[2]["lin0.model.1.weight"].flatten()).all()
    made.on_fit_start()
    assert not any(name.startswith("perceptual") for name in made.state_dict())  # not in checkpoints
    assert all(p.shape for group in made.parameter_groups() for p in group["params"])
    assert sum(len(group["params"]) for group in made.parameter_groups()) == len(list(made.net.parameters()))
    missing = small_module(Perceptual(distances={"lpips": Lpips(backbone="no", heads="no")}, weights={"lpips": 0.4}))
    with pytest.raises(UserError, match="no file no"):
        missing.setup("fit")
    missing.setup("validate")


# Crops ----------------------------------------------------------------------------------------------------------------


def test_resizing_keeps_what_is_whole():
    whole = resize_matrix(torch.zeros(1), torch.full((1,), 12.0), 12, 12)[0]
    torch.testing.assert_close(whole, torch.eye(12))
    part = resize_matrix(torch.tensor([3.0, 5.0]), torch.tensor([4.0, 4.0]), 12, 4)
    torch.testing.assert_close(part, torch.stack([torch.eye(12)[3:7], torch.eye(12)[5:9]]))
    for length, size in ((5.0, 11), (11.0, 4)):  # enlarged; and shrunk, where the kernel widens
        rows = resize_matrix(torch.tensor([0.0]), torch.tensor([length]), 11, size)[0]
        torch.testing.assert_close(rows.sum(1), torch.ones(size))
        assert ((rows != 0).sum(1) <= (4 if length < size else 4 * length / size + 1)).all()
    # a straight line stays one, away from the borders
    line = resize_matrix(torch.tensor([4.0]), torch.tensor([6.0]), 16, 24)[0] @ torch.arange(16.0)
    torch.testing.assert_close(line, 4 + (torch.arange(24) + 0.5) / 4 - 0.5)


def test_resizing_equals_torchs_where_both_do_the_same():
    """Antialiased cubic resizing of a whole image, with a = -1/2 as in PIL."""
    image = images(1, 40, 7)
    down = resize_matrix(torch.zeros(1), torch.full((1,), 40.0), 40, 16)
    expected = F.interpolate(image, 16, mode="bicubic", antialias=True, align_corners=False)
    torch.testing.assert_close(down[:, None] @ image @ down[:, None].mT, expected, rtol=1e-4, atol=1e-5)


def test_crops_have_the_published_sizes():
    """Slopes of an image that counts its pixels tell size and place of every crop."""
    side, n = 64, 400
    line = torch.arange(float(side))
    image = torch.stack([line.expand(side, side), line[:, None].expand(side, side)]).expand(n, 2, side, side)
    crops = random_resized_crop(image.contiguous(), 8, torch.Generator().manual_seed(0))
    inner = crops[:, :, 2:6, 2:6]
    width = (inner[:, 0, 0, 3] - inner[:, 0, 0, 0]) / 3 * 8
    height = (inner[:, 1, 3, 0] - inner[:, 1, 0, 0]) / 3 * 8
    share, ratio = width * height / side**2, width / height
    assert share.min() > 0.07 and share.max() < 1.02
    assert ratio.min() > 0.70 and ratio.max() < 1.43 and (ratio > 1).float().mean().sub(0.5).abs() < 0.1
    assert share.mean().sub(0.53).abs() < 0.05
    left = crops[:, 0].mean((1, 2)) - width / 2
    assert left.min() > -2 and (left + width).max() < side + 1
    both = random_resized_crop(images(3, 20, 8).repeat(1, 2, 1, 1), 9, torch.Generator().manual_seed(1))
    assert both.shape == (3, 6, 9, 9)
    torch.testing.assert_close(both[:, :3], both[:, 3:])


@pytest.fixture
def small_module():
    from common.diffusion.time import LogitNormal, MaskThenOrder
    from common.losses.meanflow import ImprovedMeanFlowLoss
    from projects.pmf.module import PixelMeanFlow
    from projects.pmf.network import PixelMiT

    net = PixelMiT(
        img_resolution=8, in_channels=3, patch_size=4, bottleneck=8, width=16, depth=2, num_heads=2, head_depth=1,
        v_depth=1, label_dim=0,
    )  # fmt: skip
    return lambda perceptual: PixelMeanFlow(
        net=net, loss=ImprovedMeanFlowLoss(t_floor=0.05), label_drop=None, omega=None, interval=None,
        time=MaskThenOrder(base=LogitNormal(mean=0.8, std=0.8), equal=0.5), noise_scale=1.0, perceptual=perceptual,
        optimizer=partial(torch.optim.Adam, lr=1e-3), schedule=None,
    )  # fmt: skip
