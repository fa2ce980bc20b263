import builtins
import json
import os
import pickle
import sys
import types

import pytest
import torch

from common.diffusion import precond
from common.diffusion.sample import ImageNoise, Multistep
from common.errors import UserError
from common.nets.edm2 import EDM2UNet
from common.nets.unet import DhariwalUNet, SongUNet
from common.weights import official
from common.weights.convert import convert
from common.weights.export import load
from common.weights.load import load_file_into
from tools import import_weights

RAN = "import_weights_test_code_ran"


def _reconstruct_persistent_obj(meta):
    raise AssertionError("only its name goes into the file")


_reconstruct_persistent_obj.__module__ = "torch_utils.persistence"


class Official:
    """A module of ours, written the way the official code writes a module of its own."""

    def __init__(self, module, name, **kwargs):
        children = {
            key: Official(child, type(child).__name__) if child is not None else None
            for key, child in module._modules.items()
        }
        state = dict(_parameters=module._parameters, _buffers=module._buffers, _modules=children, training=False)
        state |= dict(_non_persistent_buffers_set=set(), _init_args=(), _init_kwargs=kwargs)
        source = f"import builtins; builtins.{RAN} = True"
        self.meta = dict(type="class", version=6, module_src=source, class_name=name, state=state)

    def __reduce__(self):
        return _reconstruct_persistent_obj, (self.meta,)


def save(path, content):
    stubs = {name: types.ModuleType(name) for name in ("torch_utils", "torch_utils.persistence")}
    stubs["torch_utils.persistence"]._reconstruct_persistent_obj = _reconstruct_persistent_obj
    with pytest.MonkeyPatch.context() as patch:
        for name, module in stubs.items():
            patch.setitem(sys.modules, name, module)
        path.write_bytes(pickle.dumps(content))
    return path


SMALL = dict(img_resolution=8, model_channels=64, channel_mult=[1], num_blocks=1, attn_resolutions=[8])


def edm(**options):
    raw = SongUNet(in_channels=3, out_channels=3, label_dim=0, **SMALL, **options)
    kwargs = dict(img_channels=3, label_dim=0, use_fp16=False, model_type="SongUNet", **SMALL, **options)
    return "edm", "EDMPrecond", precond.EDMPrecond(model=raw), kwargs


def adm():
    raw = DhariwalUNet(in_channels=3, out_channels=3, label_dim=4, **SMALL)
    kwargs = dict(img_channels=3, label_dim=4, sigma_data=0.7, use_fp16=True, **SMALL)
    return "edm", "EDMPrecond", precond.EDMPrecond(model=raw, sigma_data=0.7), kwargs


def vp():
    raw = SongUNet(in_channels=3, out_channels=3, **SMALL)
    return "edm", "VPPrecond", precond.VPPrecond(model=raw, beta_d=15.0), dict(img_channels=3, beta_d=15.0, **SMALL)


def iddpm():
    raw = DhariwalUNet(in_channels=3, out_channels=6, **SMALL)
    net = precond.IDDPMPrecond(model=raw, C2=0.01, M=50)
    return "edm", "iDDPMPrecond", net, dict(img_channels=3, C_2=0.01, M=50, **SMALL)


def edm2():
    raw = EDM2UNet(img_channels=3, label_dim=4, **SMALL)
    return "edm2", "Precond", precond.EDM2Precond(model=raw), dict(img_channels=3, label_dim=4, **SMALL)


def ect():
    raw = SongUNet(in_channels=3, out_channels=3, label_dim=0, **SMALL)
    kwargs = dict(img_channels=3, label_dim=0, use_fp16=False, model_type="SongUNet", **SMALL)
    return "edm", "ECMPrecond", precond.ECMPrecond(model=raw), kwargs


def ect_imagenet():
    raw = EDM2UNet(img_channels=3, label_dim=4, dropout=0.4, dropout_res=16, **SMALL)
    net = precond.EDM2Precond(model=raw, logvar_channels=0)
    return (
        "edm2",
        "Precond",
        net,
        dict(img_channels=3, label_dim=4, use_fp16=False, dropout=0.4, dropout_res=16, **SMALL),
    )


class OfficialLoss:
    """ECT's loss as its loop pickles it beside the network: a persistent object that holds a bound method of itself."""

    def __init__(self):
        self.meta = dict(type="class", version=6, module_src="", class_name="ECMLoss", state=dict(q=2, stage=3))
        self.meta["state"]["_init_args"], self.meta["state"]["_init_kwargs"] = (), {}

    def t_to_r_sigmoid(self, t):
        return t

    def __reduce__(self):
        return _reconstruct_persistent_obj, (self.meta,)


def randomise(net):
    for value in net.parameters():
        value.data = torch.randn(value.shape) * 0.2
    return net.eval().requires_grad_(False)


@pytest.fixture(autouse=True)
def nothing_ran():
    yield
    assert not hasattr(builtins, RAN), "code from the file was run"


@pytest.mark.parametrize("make", [edm, adm, vp, iddpm, edm2])
def test_imported_network_computes_the_same(tmp_path, make, capsys):
    family, name, net, kwargs = make()
    randomise(net)
    file = save(tmp_path / f"{name}.pkl", dict(ema=Official(net, name, **kwargs), dataset_kwargs=dict(path="x")))
    assert import_weights.main([family, str(file)]) == 0
    out = capsys.readouterr().out
    assert name in out and f"{sum(p.numel() for p in net.parameters()):,} parameters" in out

    imported = load(tmp_path / name)
    x, sigma = torch.randn(2, 3, 8, 8), torch.tensor([0.3, 5.0])
    labels = torch.eye(4)[:2] if net.label_dim else None
    with torch.no_grad():
        assert torch.equal(imported.net(x, sigma, labels), net(x, sigma, labels))
    assert imported.meta["official_class"] == name and imported.meta["average"] == "ema"
    assert imported.net.dtype == ("float16" if kwargs.get("use_fp16", family == "edm2") else "float32")
    assert imported.sample(3, seed=1).shape == (3, 3, 8, 8)


@pytest.mark.parametrize(("make", "mid"), [(ect, 0.821), (ect_imagenet, 1.526)])
def test_a_snapshot_of_the_loop_of_ect_samples_in_two_steps(tmp_path, make, mid):
    """Branch main keeps the loss in the file, a bound method in it as builtins.getattr; imgnet the network alone."""
    family, name, net, kwargs = make()
    randomise(net)
    content = dict(ema=Official(net, name, **kwargs))
    if make is ect:
        inner = OfficialLoss()
        outer = OfficialLoss()
        outer.meta["state"]["t_to_r"] = inner.t_to_r_sigmoid
        content |= dict(loss_fn=outer, augment_pipe=None, dataset_kwargs=dict(path="x"))
    file = save(tmp_path / "network-snapshot-000500.pkl", content)
    assert make is not ect or b"getattr" in file.read_bytes()
    convert(file, tmp_path / "out", family=family)
    made = load(tmp_path / "out")
    assert isinstance(made.sampler, Multistep) and list(made.sampler.mids) == [mid]
    noise = ImageNoise(seed=0, indices=[0, 1], shape=(3, 8, 8))
    labels = torch.eye(4)[[1, 1]] if net.label_dim else None
    with torch.no_grad():
        x = net(80 * noise.z.double(), 80.0, labels).double()
        x = net(x + mid * noise.noise(0), mid, labels)
    torch.testing.assert_close(made.sample(2, labels=1 if net.label_dim else None), x, rtol=1e-4, atol=1e-4)


def test_ect_starts_from_a_network_trained_with_augmentation_labels(tmp_path):
    _, name, net, kwargs = edm(augment_dim=9)
    randomise(net)
    convert(save(tmp_path / "a.pkl", dict(ema=Official(net, name, **kwargs))), tmp_path / "a", family="edm")
    plain = precond.ECMPrecond(model=SongUNet(in_channels=3, out_channels=3, **SMALL))
    report = load_file_into(plain, tmp_path / "a")
    assert report.skipped == ("model.map_augment.weight",) and not report.missing
    assert torch.equal(plain.model.map_layer0.weight, net.model.map_layer0.weight)


def test_wrong_family_unknown_class_and_unknown_option(tmp_path):
    _, name, net, kwargs = edm()
    file = save(tmp_path / "a.pkl", dict(ema=Official(net, name, **kwargs)))
    with pytest.raises(UserError, match=r"Use: import_weights edm "):
        convert(file, tmp_path / "out", family="edm2")
    file = save(tmp_path / "b.pkl", dict(ema=Official(net, "StyleGAN", **kwargs)))
    with pytest.raises(UserError, match=r"b\.pkl: StyleGAN is not a network we can import\. Known: EDMPrecond"):
        convert(file, tmp_path / "out", family="edm")
    file = save(tmp_path / "c.pkl", dict(ema=Official(net, name, **kwargs, widgets=3)))
    with pytest.raises(UserError, match=r"c\.pkl: widgets is not an option of common\.nets\.unet\.SongUNet"):
        convert(file, tmp_path / "out", family="edm")
    file = save(tmp_path / "d.pkl", dict(ema=Official(net, name, **{**kwargs, "model_channels": 128})))
    with pytest.raises(UserError, match=r"d\.pkl: \d+ tensors are not those of EDMPrecond"):
        convert(file, tmp_path / "out", family="edm")
    assert not (tmp_path / "out").exists()


def test_a_release_with_known_checksum_is_checked(tmp_path, monkeypatch):
    _, name, net, kwargs = edm()
    release = official.Release(file="a.pkl", url="u", family="edm", sha256="0" * 64, published={"fid": 2.0})
    monkeypatch.setitem(official.RELEASES, "a", release)
    file = save(tmp_path / "a.pkl", dict(ema=Official(net, name, **kwargs)))
    with pytest.raises(UserError, match=r"not the released a\.pkl"):
        convert(file, tmp_path / "out", family="edm")


def test_command_line_errors_are_one_sentence(tmp_path, capsys):
    class Evil:
        def __reduce__(self):
            return os.system, (f"touch {tmp_path}/flag",)

    file = save(tmp_path / "evil.pkl", dict(ema=Evil()))
    assert import_weights.main(["edm", str(file)]) == 2
    error = capsys.readouterr().err
    assert "evil.pkl: it asks for posix.system" in error or "evil.pkl: it asks for nt.system" in error
    assert not (tmp_path / "flag").exists() and not (tmp_path / "evil").exists()

    file.write_bytes(save(tmp_path / "b.pkl", dict(ema=Official(edm()[2], "EDMPrecond"))).read_bytes()[:-100])
    assert import_weights.main(["edm", str(file)]) == 2
    assert "evil.pkl is truncated" in capsys.readouterr().err
    assert import_weights.main(["edm", str(tmp_path / "none.pkl")]) == 2
    assert "none.pkl does not exist" in capsys.readouterr().err
    assert import_weights.main(["edm", str(tmp_path / "noending")]) == 2
    assert "--out" in capsys.readouterr().err


def test_written_configuration_is_plain_json(tmp_path):
    _, name, net, kwargs = edm()
    convert(save(tmp_path / "a.pkl", dict(ema=Official(net, name, **kwargs))), tmp_path / "a", family="edm")
    config = json.loads((tmp_path / "a" / "config.json").read_text())
    assert config["network"]["model"]["_target_"] == "common.nets.unet.SongUNet"
    assert config["sampler"] == {"_target_": "common.diffusion.sample.Heun", "steps": 18}
