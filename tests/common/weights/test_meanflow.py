"""Key maps; that the mapped weights give the official answers stands in tests/common/nets/test_meanflow_official.py."""

import numpy as np
import pytest
import torch

from common.errors import UserError
from common.nets.average_velocity import AverageVelocity
from common.nets.dit import DiT
from common.nets.mit import MiT
from common.nets.unet import SongUNet
from common.weights.meanflow import RELEASES, load_official, official_state
from projects.pmf.network import PixelMiT

SIZES = dict(img_resolution=8, in_channels=3, patch_size=4, label_dim=4, width=16, depth=2, num_heads=2)
HEADS = dict(SIZES, head_depth=1, v_depth=1)
NETS = {"dit": lambda: DiT(**SIZES), "mit": lambda: MiT(**HEADS), "pmf": lambda: PixelMiT(**HEADS, bottleneck=4)}
NAMED = ("q_proj", "k_proj", "v_proj", "out_proj", "w1", "w2", "w3", "mlp.0", "mlp.2", "final_layer.linear")


def shaken(make):
    torch.manual_seed(0)
    net = make()
    with torch.no_grad():
        for p in net.parameters():
            p.copy_(torch.randn_like(p))
    return net


def wrapped(state: dict, linear: str, table: str) -> dict:
    """The names of the authors' PyTorch code ("_flax_linear", "_flax_embedding") or of FD-loss."""
    renamed = {}
    for name, value in state.items():
        stem, _, leaf = name.rpartition(".")
        if stem.endswith(NAMED):
            name = f"{stem}.{linear}.{leaf}"
        renamed[name.replace("embedding_table.weight", f"embedding_table.{table}.weight")] = value
    return renamed


@pytest.mark.parametrize("names", [("_flax_linear", "_flax_embedding"), ("linear", "embedding")])
@pytest.mark.parametrize("kind", ["mit", "pmf"])
def test_both_pytorch_dialects_load(tmp_path, kind, names):
    source, target = shaken(NETS[kind]), NETS[kind]()
    state = wrapped(source.state_dict(), *names)
    assert set(state) != set(source.state_dict())
    state = {name: value[None] if name.endswith("_tokens") else value for name, value in state.items()}
    state["rope_freqs"] = torch.ones(3, 4)
    torch.save({f"net.{name}": value for name, value in state.items()}, tmp_path / "model.pth")
    report = load_official(target, tmp_path / "model.pth")
    assert report.loaded == len(source.state_dict())
    assert all(torch.equal(a, b) for a, b in zip(source.state_dict().values(), target.state_dict().values()))


def test_a_dit_of_the_authors_of_dit_loads_without_its_fixed_positions(tmp_path):
    make = lambda: DiT(**SIZES, times=["t"], out_channels=6)
    source, target = shaken(make), make()
    state = {n.replace("adaLN_modulation.", "adaLN_modulation.1."): v for n, v in source.state_dict().items()}
    state["pos_embed"] = torch.zeros(1, 4, 16)
    torch.save({"model": {}, "ema": state}, tmp_path / "DiT.pt")
    assert load_official(target, tmp_path / "DiT.pt").skipped == ("pos_embed",)
    assert all(torch.equal(a, b) for a, b in zip(source.state_dict().values(), target.state_dict().values()))


def flax_tree(state: dict) -> dict:
    """A MiT's tensors as JAX keeps them."""
    tree = {}
    for name, value in state.items():
        stem, _, leaf = name.rpartition(".")
        path = name.replace(".", "/")
        for group in ("shared_blocks", "u_heads", "v_heads"):
            path = path.replace(f"{group}/", f"{group}_")
        path = path.replace("mlp/0/", "mlp/layers_0/").replace("mlp/2/", "mlp/layers_2/")
        if stem.endswith("embedding_table"):
            path = path.replace("weight", "_flax_embedding/embedding")
        elif leaf == "weight":
            path = path.replace("weight", "_flax_linear/kernel" if stem.endswith(NAMED) else "kernel")
            value = value.permute(2, 3, 1, 0) if value.ndim == 4 else value.T if value.ndim == 2 else value
        elif leaf == "bias" and stem.endswith(NAMED):
            path = path.replace("bias", "_flax_linear/bias")
        tree[path] = value.contiguous().numpy()
    return tree


def test_a_training_state_of_jax_gives_its_average(tmp_path):
    source, target = shaken(NETS["mit"]), NETS["mit"]()
    tree = flax_tree(source.state_dict())
    copies = {"ema_params/net/": 1, "params/net/": 0, "opt_state/0/mu/net/": 0}
    np.savez(
        tmp_path / "s.npz", **{head + path: f * value for head, f in copies.items() for path, value in tree.items()}
    )
    load_official(target, tmp_path / "s.npz")
    assert all(torch.equal(a, b) for a, b in zip(source.state_dict().values(), target.state_dict().values()))
    load_official(target, tmp_path / "s.npz", prefix="params/net/")
    assert not any(value.any() for value in target.state_dict().values())


def test_several_averages_ask_for_a_choice(tmp_path):
    tree = flax_tree(shaken(NETS["mit"]).state_dict())
    heads = ("ema_params/1000/net/", "ema_params/2000/net/")
    np.savez(tmp_path / "s.npz", **{head + path: value for head in heads for path, value in tree.items()})
    with pytest.raises(UserError, match=r"several copies.*ema_params/1000/net/.*ema_params/2000/net/"):
        load_official(NETS["mit"](), tmp_path / "s.npz")
    with pytest.raises(UserError, match=r"no network below prefix 'ema\.'"):
        load_official(NETS["mit"](), tmp_path / "s.npz", prefix="ema.")


def test_the_cifar_unet_loads_into_its_wrapper_with_its_attention_reordered(tmp_path):
    sizes = dict(img_resolution=8, in_channels=3, out_channels=3, model_channels=16, channel_mult=[1], num_blocks=1)
    make = lambda: AverageVelocity(model=SongUNet(**sizes, num_times=2))
    source, target = shaken(make), make()
    torch.save({"model": {f"net_ema.{k}": v for k, v in source.model.state_dict().items()}}, tmp_path / "cifar.pth")
    load_official(target, tmp_path / "cifar.pth")
    for (name, a), b in zip(source.model.state_dict().items(), target.model.state_dict().values()):
        if name.endswith(("qkv.weight", "qkv.bias")):
            a = torch.stack(a.chunk(3), dim=1).flatten(0, 1)
        assert torch.equal(a, b), name


def test_the_v_head_is_left_out_where_the_network_has_none(tmp_path):
    source, target = shaken(NETS["mit"]), MiT(**dict(HEADS, v_depth=None))
    torch.save(source.state_dict(), tmp_path / "full.pth")
    report = load_official(target, tmp_path / "full.pth")
    assert report.skipped and all(name.startswith("v_") for name in report.skipped)
    torch.save({k: v for k, v in source.state_dict().items() if k[:2] != "v_"}, tmp_path / "inference.pth")
    with pytest.raises(UserError, match="does not fit MiT"):
        load_official(NETS["mit"](), tmp_path / "inference.pth")


def test_other_files_are_refused(tmp_path):
    torch.save({"conv.weight": torch.zeros(1)}, tmp_path / "other.pth")
    with pytest.raises(UserError, match=r"other\.pth holds no DiT, iMF, pMF or U-Net"):
        load_official(NETS["mit"](), tmp_path / "other.pth")


def test_names_that_are_ours_already_stay():
    for make in NETS.values():
        state = make().state_dict()
        assert list(official_state(state)) == list(state)


def test_every_release_is_complete():
    for name, release in RELEASES.items():
        assert name.startswith(release.family) and release.url.endswith("/" + release.file)
        assert release.published and release.licence
