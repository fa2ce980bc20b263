"""tools.import_weights for MeanFlow, iMF and pMF: files made like the official ones become exports that sample."""

import math
from argparse import Namespace

import numpy as np
import pytest
import torch
from hydra import compose, initialize_config_dir

from common.diffusion.guidance import BoundVelocity
from common.diffusion.sample import AverageVelocitySteps, ImageNoise
from common.nets.average_velocity import AverageVelocity
from common.nets.dit import DiT
from common.nets.mit import MiT
from common.nets.unet import SongUNet
from common.weights.build import build
from common.weights.export import load
from common.weights.meanflow import GUIDANCE, RELEASES
from tools import import_weights

TINY = dict(img_resolution=8, in_channels=1, patch_size=2, width=64, depth=4, num_heads=4, label_dim=10)
UNET = dict(img_resolution=8, model_channels=16, channel_mult=[1], num_blocks=1, attn_resolutions=[8])


def shaken(net):
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in net.parameters():
            p.copy_(0.1 * torch.randn(p.shape, generator=generator))
    return net.eval()


def imported(capsys, *words) -> str:
    """What the command printed."""
    assert import_weights.main([str(word) for word in words]) == 0, capsys.readouterr().err
    return capsys.readouterr().out


def refused(capsys, *words) -> str:
    assert import_weights.main([str(word) for word in words]) == 2
    return capsys.readouterr().err


@pytest.mark.parametrize("v_depth", [2, 0, None])
def test_an_imf_file_becomes_an_export_with_the_head_it_has(v_depth, tmp_path, capsys):
    net = shaken(MiT(**TINY, head_depth=2, v_depth=v_depth))
    torch.save({f"net.{name}": value for name, value in net.state_dict().items()}, tmp_path / "own.pth")
    printed = imported(capsys, "imf", tmp_path / "own.pth", "--net", "mit_tiny")
    count = sum(p.numel() for p in net.parameters())
    assert f"size      {count:,} parameters" in printed and "class     MiT -> common.nets.mit.MiT\n" in printed
    model = load(tmp_path / "own")
    assert model.config["network"]["v_depth"] == v_depth
    labels = torch.tensor([3, 7])
    z = torch.randn(2, 1, 8, 8, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        given = dict(class_labels=torch.eye(10)[labels], omega=4.0, t_min=0.2, t_max=0.6)
        assert torch.equal(model.net(z, 1.0, 0.0, **given), net(z, 1.0, 0.0, **given))
    plain, guided = (
        model.sample(2, labels=labels, sampler=AverageVelocitySteps(omega=omega, t_min=0.2, t_max=0.6))
        for omega in (None, 4.0)
    )
    assert plain.shape == (2, 1, 8, 8) and not torch.allclose(plain, guided)
    assert torch.equal(model.sample(2, labels=labels), plain), "the exported sampler takes one unguided step"


def test_a_jax_tree_of_a_dit(tmp_path, capsys):
    """Matrices stand the other way round there, the patch convolution too."""
    net, tree = shaken(DiT(**TINY)), {}
    for name, value in net.state_dict().items():
        path = name.replace(".", "/")
        if name.startswith(("t_embedder", "h_embedder")):
            path = path.replace("mlp/0", "mlp/layers_0").replace("mlp/2", "mlp/layers_2")
        if name.endswith("embedding_table.weight"):
            path = path.replace("/weight", "/embedding")
        elif name.endswith("weight"):
            value = value.permute(2, 3, 1, 0) if value.ndim == 4 else value.T
            path = path.replace("/weight", "/kernel")
        tree[f"params/net/{path}"] = value.numpy()
    np.savez(tmp_path / "b4.npz", **tree)
    imported(capsys, "meanflow", tmp_path / "b4.npz", "--net", "dit_tiny", "--out", tmp_path / "there")
    kept = load(tmp_path / "there").net.state_dict()
    assert kept.keys() == net.state_dict().keys()
    assert all(torch.equal(kept[name], value) for name, value in net.state_dict().items())


def test_a_checkpoint_of_the_cifar_code_gives_its_main_average(tmp_path, capsys):
    """It keeps the weights, three averages, the optimiser and the program's options in one file."""
    nets = [shaken(SongUNet(**UNET, in_channels=3, out_channels=3, num_times=2, resample_filter=[1, 3, 3, 1],
                            channel_mult_noise=2)) for _ in range(2)]  # fmt: skip
    with torch.no_grad():
        nets[1].map_layer0.bias.add_(1)
    model = {f"{head}{name}": value for head, net in (("net.", nets[1]), ("net_ema.", nets[0]), ("net_ema1.", nets[1]))
             for name, value in net.state_dict().items()}  # fmt: skip
    model["num_updates"] = torch.tensor(16)
    torch.save({"model": model, "epoch": 3, "args": Namespace(lr=6e-4, arch="unet")}, tmp_path / "checkpoint-last.pth")
    words = [word for key, value in UNET.items()
             for word in ("--set", f"model.{key}={str(value).replace(' ', '')}")]  # fmt: skip
    imported(capsys, "meanflow", tmp_path / "checkpoint-last.pth", *words)
    made = load(tmp_path / "checkpoint-last")
    assert isinstance(made.net, AverageVelocity) and made.net.augment_dim == 0
    assert torch.equal(made.net.model.map_layer0.bias, nets[0].map_layer0.bias)
    assert made.sample(2).shape == (2, 3, 8, 8)
    other = ["--key", "net_ema1.", "--out", tmp_path / "other"]
    imported(capsys, "meanflow", tmp_path / "checkpoint-last.pth", *words, *other)
    assert torch.equal(load(tmp_path / "other").net.model.map_layer0.bias, nets[1].map_layer0.bias)


def test_mistakes_are_one_sentence(tmp_path, capsys):
    torch.save(MiT(**TINY, head_depth=2, v_depth=0).state_dict(), tmp_path / "own.pth")
    own = tmp_path / "own.pth"
    assert "is of no released name: say its network with --net, one of dit_b2" in refused(capsys, "imf", own)
    assert "own.pth does not fit MiT" in refused(capsys, "imf", own, "--net", "mit_tiny", "--set", "width=32")
    assert "is no option of mit_tiny" in refused(capsys, "imf", own, "--net", "mit_tiny", "--set", "widht=32")
    assert "leave --net, --set, --noise-scale and --omega out for edm" in refused(
        capsys, "edm", own, "--net", "mit_tiny"
    )


def test_a_released_name_says_its_network(tmp_path):
    for family, file, target, key, value in (
        ("imf", "iMF-XL-2.pth", "common.nets.mit.MiT", "depth", 48),
        ("pmf", "pMF-H-32.pt", "projects.pmf.network.PixelMiT", "patch_size", 32),
        ("pmf", "pMF-H-16.pt", "projects.pmf.network.PixelMiT", "mlp_multiple", 8),
        ("meanflow", "checkpoint-last.pth", "common.nets.average_velocity.AverageVelocity", "times", ["t", "t-r"]),
    ):
        tree = import_weights.network_of(Namespace(family=family, file=tmp_path / file, net=None, set=[]))
        assert tree["_target_"] == target and tree[key] == value


def test_an_imported_pmf_starts_from_the_noise_it_was_trained_with(tmp_path, capsys):
    net = build(import_weights.network_of(Namespace(family="pmf", file=tmp_path / "x", net="pmf_tiny", set=[])))
    torch.save(shaken(net).state_dict(), tmp_path / "pMF-H-16.pt")
    words = ["pmf", tmp_path / "pMF-H-16.pt", "--net", "pmf_tiny"]
    imported(capsys, *words)
    imported(capsys, *words, "--noise-scale", "1", "--out", tmp_path / "other")
    released, other = load(tmp_path / "pMF-H-16"), load(tmp_path / "other")
    assert (released.meta["noise_scale"], other.meta["noise_scale"]) == (2, 1)
    z = ImageNoise(seed=3, indices=[0, 1], shape=(1, 8, 8)).z
    for scale, made in ((2.0, released), (1.0, other)):
        velocity = BoundVelocity(
            net=made.net, class_labels=torch.eye(10)[[4, 4]], noise_scale=scale, guidance=(1, math.inf)
        )
        one = AverageVelocitySteps(omega=7.0, t_min=0.2, t_max=0.6)
        torch.testing.assert_close(made.sample(2, seed=3, labels=4), one(velocity, z, None).float())
    assert not torch.allclose(released.sample(2, seed=3, labels=4), other.sample(2, seed=3, labels=4))


def test_an_export_samples_with_the_guidance_of_the_published_number(tmp_path, capsys):
    """It follows from the released name, from --omega and --interval for other names."""
    net = shaken(MiT(**TINY, head_depth=2, v_depth=0))
    for name, words, guidance in (
        ("iMF-L-2.pth", (), (10.5, 0.4, 0.6)),
        ("own.pth", ("--omega", "3", "--interval", "0.1", "0.5"), (3.0, 0.1, 0.5)),
    ):
        torch.save(net.state_dict(), tmp_path / name)
        imported(capsys, "imf", tmp_path / name, "--net", "mit_tiny", *words)
        made = load((tmp_path / name).with_suffix(""))
        assert (made.sampler.omega, made.sampler.t_min, made.sampler.t_max) == guidance
        conditions = dict(zip(("omega", "t_min", "t_max"), guidance), class_labels=torch.eye(10)[[4, 4]])
        z = ImageNoise(seed=3, indices=[0, 1], shape=(1, 8, 8)).z
        with torch.no_grad():
            torch.testing.assert_close(made.sample(2, seed=3, labels=4), z - net(z, 1.0, 0.0, **conditions))


def test_every_release_has_the_guidance_of_its_experiment(tmp_path):
    """The experiments sample as the exports do: one table would not notice a slip of the other."""
    kinds = {"b": "b", "m": "m", "l": "l", "xl": "xl", "h": "h"}
    for key, release in RELEASES.items():
        family, size = key.split("_")
        side = {"16": "256", "32": "512"}.get(size.lstrip("blh"))
        size = kinds[size.rstrip("0123456789")]
        experiment = f"imf_imagenet_{size}" if family == "imf" else f"pmf_imagenet{side}_{size}"
        with initialize_config_dir(str(import_weights.CONF), version_base="1.3"):
            one = compose("config", [f"+experiment={experiment}"]).evaluate.samplers.one_step
        assert (one.omega, one.t_min, one.t_max) == GUIDANCE[release.file], key
