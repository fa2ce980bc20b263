import pickle
import zipfile

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from common.errors import UserError
from common.files import write_checksum
from common.weights.load import load_file_into, load_into, load_tensors, stored_step


class Net(nn.Module):
    def __init__(self, width=4, augment=0):
        super().__init__()
        self.map_augment = nn.Linear(augment, width, bias=False) if augment else None
        self.conv = nn.Conv2d(3, width, 3)
        self.register_buffer("freqs", torch.arange(3.0))


class Precond(nn.Module):
    def __init__(self, **options):
        super().__init__()
        self.model = Net(**options)


def weights(**options):
    torch.manual_seed(7)
    return Net(**options).state_dict()


def saved(path, content):
    save_file(content, path) if path.suffix == ".safetensors" else torch.save(content, path)
    return path


def renamed(tensors, prefix):
    return {prefix + key: value for key, value in tensors.items()}


@pytest.mark.parametrize("kind", ["safetensors", "pt", "ckpt"])
def test_reads_every_format(tmp_path, kind):
    tensors = weights()
    path = saved(tmp_path / f"a.{kind}", {"state_dict": tensors, "epoch": 3} if kind == "ckpt" else tensors)
    write_checksum(path)
    read = load_tensors(path)
    assert all(torch.equal(read[key], tensors[key]) for key in tensors) and len(read) == len(tensors)


@pytest.mark.parametrize("kind", ["safetensors", "pt"])
@pytest.mark.parametrize("keep", [0.0, 0.3, 0.99])
def test_truncated_file_is_named(tmp_path, kind, keep):
    path = saved(tmp_path / f"cut.{kind}", weights())
    data = path.read_bytes()
    path.write_bytes(data[: int(len(data) * keep)])
    with pytest.raises(UserError, match=rf"cut\.{kind}"):
        load_tensors(path)


def test_changed_byte_is_caught_by_the_checksum(tmp_path):
    path = saved(tmp_path / "a.safetensors", weights())
    write_checksum(path)
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    with pytest.raises(UserError, match=r"a\.safetensors is damaged or was changed"):
        load_tensors(path)


class Hostile:
    def __reduce__(self):
        return (pytest.fail, ("code in the file was run",))


def test_code_in_a_torch_file_is_not_run(tmp_path):
    path = saved(tmp_path / "evil.pt", {"state_dict": weights(), "x": Hostile()})
    for read in (load_tensors, stored_step):  # the second looks at one number of a checkpoint, for resume=<file>
        with pytest.raises(UserError, match=r"evil\.pt is refused: it asks for [\w.]+, and only tensors") as error:
            read(path)
        assert "weights_only" not in str(error.value)  # torch's advice on how to read it all the same
    path.write_bytes(pickle.dumps(Hostile()))  # the format before zip
    with pytest.raises(UserError, match=r"evil\.pt is refused") as error:
        stored_step(path)
    assert "weights_only" not in str(error.value)


def test_the_step_of_a_checkpoint(tmp_path):
    path = saved(tmp_path / "a.ckpt", {"global_step": 12, "state_dict": weights()})
    assert stored_step(path) == 12
    path.write_bytes(path.read_bytes()[:300])
    with pytest.raises(UserError, match=r"a\.ckpt is (truncated|refused)"):
        stored_step(path)


def test_a_torch_file_that_unpacks_to_far_more_is_refused(tmp_path, monkeypatch):
    torch.save({"a": torch.zeros(20 << 20)}, tmp_path / "plain.pt")
    with zipfile.ZipFile(tmp_path / "plain.pt") as plain, zipfile.ZipFile(tmp_path / "bomb.pt", "w", 8) as bomb:
        for member in plain.infolist():
            bomb.writestr(member.filename, plain.read(member))
    monkeypatch.setattr(torch, "load", lambda *a, **k: pytest.fail("it was unpacked"))
    with pytest.raises(UserError, match=r"bomb\.pt .*would unpack"):
        load_tensors(tmp_path / "bomb.pt")


@pytest.mark.parametrize("prefix", ["", "model.", "module.", "_orig_mod.", "module._orig_mod.", "net.", "ema.model."])
def test_prefixes_are_repaired(prefix):
    net, tensors = Net(), weights()
    other = {"other.x": torch.ones(1)} if prefix.replace("_orig_mod.", "") else {}
    report = load_into(net, {**renamed(tensors, prefix), **other})
    assert report.loaded == len(tensors) and report.outside == len(other)
    assert all(torch.equal(value, tensors[key]) for key, value in net.state_dict().items())


@pytest.mark.parametrize("prefix", ["", "net.", "model.", "net.model."])
def test_prefix_is_added_where_the_module_has_one(prefix):
    net, tensors = Precond(), weights()
    report = load_into(net, renamed(tensors, prefix))
    assert report.loaded == len(tensors) and not report.outside
    assert torch.equal(net.model.conv.weight, tensors["conv.weight"])


def test_compiled_submodule_names_inside_the_path():
    net, tensors = Precond(), weights()
    load_into(net, renamed(tensors, "net.model._orig_mod."))
    assert torch.equal(net.model.conv.weight, tensors["conv.weight"])


def test_several_copies_must_be_chosen_between():
    first, second = weights(), Net().state_dict()
    both = {**renamed(first, "net."), **renamed(second, "ema.")}
    with pytest.raises(UserError, match=r"several copies.*prefix='(net|ema)\.' or prefix='(net|ema)\.'"):
        load_into(Net(), both)
    net = Net()
    report = load_into(net, both, prefix="ema.")
    assert torch.equal(net.conv.weight, second["conv.weight"]) and report.outside == len(first)


def test_augmentation_labels_are_dropped_and_reported():
    net, tensors = Net(augment=0), weights(augment=9)
    report = load_into(net, tensors)
    assert report.skipped == ("map_augment.weight",) and "map_augment.weight" in str(report)
    assert torch.equal(net.conv.weight, tensors["conv.weight"])
    assert load_into(Net(augment=9), weights(augment=0), ignore=["map_augment.*"]).missing == ("map_augment.weight",)


def test_other_architecture_is_one_sentence_and_changes_nothing(tmp_path):
    path = saved(tmp_path / "wide.safetensors", weights(width=8))
    net = Net()
    before = {key: value.clone() for key, value in net.state_dict().items()}
    with pytest.raises(UserError) as caught:
        load_file_into(net, path)
    text = str(caught.value)
    assert "wide.safetensors does not fit Net: 0 missing, 0 unexpected and 2 mismatched" in text
    assert "conv.weight: (8, 3, 3, 3) in the file, (4, 3, 3, 3) in the network" in text
    assert all(torch.equal(value, before[key]) for key, value in net.state_dict().items())


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda d: load_tensors(saved(d / "a.pkl", {})), r"a\.pkl .*tools\.import_weights"),
        (lambda d: load_tensors(d / "b.pt"), r"b\.pt.* do not exist"),
        (lambda d: load_tensors(saved(d / "c.pt", {"epoch": 3})), "holds no state_dict but the keys epoch"),
        (lambda d: stored_step(saved(d / "d.ckpt", {})), r"d\.ckpt is no checkpoint of a run: it holds no global_step"),
        (lambda d: load_into(Net(), renamed(weights(), "net."), prefix="swa."), r"no tensor below prefix 'swa\.'"),
        (lambda d: load_into(Net(), {"encoder.weight": torch.ones(1)}), r"3 missing, 1 unexpected.*absent in the file"),
        (lambda d: load_into(Net(augment=9), weights()), "1 missing"),  # else a layer would stay random
    ],
)
def test_what_cannot_be_read_or_does_not_fit_is_named(tmp_path, call, message):
    with pytest.raises(UserError, match=message):
        call(tmp_path)


def test_not_strict_loads_what_fits():
    net = Net()
    tensors = {**weights(), "freqs": torch.zeros(9), "extra": torch.zeros(1)}
    del tensors["conv.bias"]
    report = load_into(net, tensors, strict=False)
    assert (report.loaded, report.missing, report.unexpected, report.mismatched) == (
        1, ("conv.bias",), ("extra",), ("freqs",),
    )  # fmt: skip
    assert torch.equal(net.conv.weight, tensors["conv.weight"])


def test_half_precision_file_into_a_float_network():
    net = Net()
    load_into(net, {key: value.half() for key, value in weights().items()})
    assert net.conv.weight.dtype == torch.float32
