"""The official wire format, written by this test: a fake module tree pickled under the official names."""

import builtins
import copy
import io
import operator
import os
import pathlib
import pickle
import subprocess
import sys
import types
from collections import OrderedDict
from functools import reduce

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from common.errors import UserError
from common.weights.pickle import read_snapshot

RAN = "common_weights_pickle_test_code_ran"
SOURCE = f"import builtins\nbuiltins.{RAN} = True\n"


def _reconstruct_persistent_obj(meta):
    raise AssertionError("only its name goes into the file")


_reconstruct_persistent_obj.__module__ = "torch_utils.persistence"


class EasyDict(dict):
    __module__ = "dnnlib.util"


class Persistent(nn.Module):
    """Pickles as the official decorator does: source text, class name and `__dict__`."""

    def __init__(self, *args, **kwargs):
        super().__init__()
        self._init_args, self._init_kwargs = args, kwargs

    def __reduce__(self):
        state = object.__reduce__(self)[2]
        meta = dict(type="class", version=6, module_src=SOURCE, class_name=type(self).__name__, state=state)
        return _reconstruct_persistent_obj, (meta,), None


class Layer(Persistent):
    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.weight = nn.Parameter(torch.arange(6.0).reshape(2, 3))
        self.bias = None
        self.register_buffer("resample_filter", torch.ones(1, 1, 2, 2).double())
        self.register_buffer("scratch", torch.zeros(1), persistent=False)


class EDMPrecond(Persistent):
    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.gain = nn.Parameter(torch.zeros([]).half())
        self.model = Layer(init_weight=np.sqrt(1 / 3))
        self.enc = nn.ModuleDict({"8x8_conv": Layer(), "8x8_none": nn.SiLU()})
        self.skip = None
        shared = torch.arange(12.0)
        self.register_buffer("view", shared[2:8].reshape(2, 3).t())
        self.noise_table = np.arange(6.0).reshape(2, 3)


def dumps(obj, protocol=4) -> bytes:
    """Pickles with stub modules of the official names in place, then takes them away again."""
    stubs = {
        name: types.ModuleType(name) for name in ("torch_utils", "torch_utils.persistence", "dnnlib", "dnnlib.util")
    }
    stubs["torch_utils.persistence"]._reconstruct_persistent_obj = _reconstruct_persistent_obj
    stubs["dnnlib.util"].EasyDict = EasyDict
    before = {name: sys.modules.get(name) for name in stubs}
    sys.modules.update(stubs)
    try:
        return pickle.dumps(obj, protocol=protocol)
    finally:
        for name, module in before.items():
            sys.modules.pop(name, None)
            if module is not None:
                sys.modules[name] = module


def snapshot_dict(**extra):
    net = EDMPrecond(8, 3, options=EasyDict(mult=[1, 2], init=dict(weight=np.float64(0.5))), rate=np.float32(0.25))
    return dict(ema=net, dataset_kwargs=EasyDict(path="x", dtype=torch.float16), **extra), net


def torch_bytes(content, **options):
    stream = io.BytesIO()
    torch.save(content, stream, **options)
    return stream.getvalue()


@pytest.fixture
def write(tmp_path):
    def write(obj, name="net.pkl", protocol=4):
        path = tmp_path / name
        path.write_bytes(obj if isinstance(obj, bytes) else dumps(obj, protocol))
        return path

    yield write
    assert not hasattr(builtins, RAN), "code from the file was run"


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_reads_names_tensors_and_arguments(write, protocol):
    content, net = snapshot_dict(loss_fn=Layer(), epochs=3)
    read = read_snapshot(write(content, protocol=protocol))
    want = net.state_dict()
    assert list(read.tensors) == list(want)
    for name, value in want.items():
        assert torch.equal(read.tensors[name], value) and read.tensors[name].dtype == value.dtype, name
    assert read.class_name == "EDMPrecond"
    assert read.args == [8, 3]
    assert read.kwargs == {"options": {"mult": [1, 2], "init": {"weight": 0.5}}, "rate": 0.25}
    assert read.others == {"dataset_kwargs": {"path": "x", "dtype": "torch.float16"}, "loss_fn": "<Layer>", "epochs": 3}


def test_numpy_before_version_two(write):
    """The released files were written when numpy's private modules had other names."""
    data = dumps(snapshot_dict()[0], protocol=2)
    assert b"cnumpy._core." in data
    read = read_snapshot(write(data.replace(b"cnumpy._core.", b"cnumpy.core.")))
    assert read.kwargs["rate"] == 0.25


def test_no_names_stay_behind(write):
    read_snapshot(write(snapshot_dict()[0]))
    assert not {"torch_utils", "torch_utils.persistence", "dnnlib", "dnnlib.util"} & set(sys.modules)


class Call:
    """Pickles as a call of `function(*args)`."""

    def __init__(self, function, *args):
        self.parts = function, args

    def __reduce__(self):
        return self.parts


HOSTILE = {
    "os.system": lambda d: Call(os.system, f"touch {d}/flag"),
    "eval": lambda d: Call(eval, f"open('{d}/flag', 'w')"),
    "exec": lambda d: Call(exec, f"open('{d}/flag', 'w')"),
    "getattr": lambda d: Call(getattr, "x", "upper"),
    "__import__": lambda d: Call(__import__, "this"),
    "open": lambda d: Call(open, f"{d}/flag", "w"),
    "torch.load": lambda d: Call(torch.load, f"{d}/x"),
    "torch.hub.load": lambda d: Call(torch.hub.load, "a/b", "c"),
    "operator": lambda d: Call(operator.attrgetter, "system"),
    "class": lambda d: pathlib.PurePath("x"),
    "subprocess": lambda d: Call(subprocess.Popen, ["touch", f"{d}/flag"]),
}


@pytest.mark.parametrize("place", ["beside", "instead", "argument", "parameter", "module", "state", "metadata"])
@pytest.mark.parametrize("kind", HOSTILE)
def test_hostile_calls_are_refused_and_not_run(write, tmp_path, kind, place):
    evil = HOSTILE[kind](tmp_path)
    content, net = snapshot_dict()
    if place == "beside":
        content["loss_fn"] = evil
    elif place == "instead":
        content["ema"] = evil
    elif place == "argument":
        net._init_kwargs["x"] = [evil]
    elif place == "parameter":
        net._parameters["gain"] = evil
    elif place == "module":
        net._modules["extra"] = evil
    elif place == "state":
        net.__dict__["anything"] = evil
    else:
        net._non_persistent_buffers_set = evil
    with pytest.raises(
        UserError, match=r"net\.pkl: it asks for ([\w.]+, which no network needs|an attribute of .*), and is refused"
    ):
        read_snapshot(write(content))
    assert not (tmp_path / "flag").exists()


def test_hostile_storage_bytes(write, tmp_path):
    """The bytes of a tensor storage are a pickle of their own."""

    class Storage:
        def __init__(self, data):
            self.data = data

        def __reduce__(self):
            return torch.storage._load_from_bytes, (self.data,)

    for legacy in (True, False):
        content, net = snapshot_dict()
        data = torch_bytes(HOSTILE["os.system"](tmp_path), _use_new_zipfile_serialization=not legacy)
        net._parameters["gain"] = Storage(data)
        with pytest.raises(UserError, match=r"storage inside the file asks for \w+\.system and is refused"):
            read_snapshot(write(content))
    net._parameters["gain"] = Storage(torch_bytes({"a": torch.zeros(1)}))
    with pytest.raises(UserError, match="is a dict and is refused"):
        read_snapshot(write(content))
    assert not (tmp_path / "flag").exists()


def opcodes(*parts: bytes) -> bytes:
    return b"\x80\x04" + b"".join(parts) + b"."


@pytest.mark.parametrize(
    "stream",
    [
        # BUILD on things that are not plain records: our functions, our classes, finished tensors
        opcodes(b"ctorch._utils\n_rebuild_tensor_v2\n", b"}", b"X\x01\x00\x00\x00xK\x01s", b"b"),
        opcodes(b"ctorch._utils\n_rebuild_tensor_v2\n", b"N}X\x05\x00\x00\x00valueK\x01s\x86", b"b"),
        opcodes(b"ctorch.nn.modules.activation\nSiLU\n", b"N}X\x04\x00\x00\x00nameK\x01s\x86", b"b"),
        opcodes(b"ctorch.nn.modules.activation\nSiLU\n", b"}X\x04\x00\x00\x00nameK\x01s", b"b"),
        opcodes(b"cnumpy\ndtype\n", b"X\x01\x00\x00\x00O\x85R"),
        opcodes(b"cnumpy\ndtype\n", b"N}X\x05\x00\x00\x00valueK\x01s\x86", b"b"),
        opcodes(b"ccollections\nOrderedDict\n", b"N}X\x06\x00\x00\x00updateK\x01s\x86", b"b"),
        opcodes(b"cbuiltins\ndict\n"),
        opcodes(b"\x8c\x08builtins\x8c\x0cstr.__class__\x93"),
        opcodes(b"ctorch.nn.modules.module\nModule.__init__\n"),
        opcodes(b"\x82\x01"),
        opcodes(b"K\x01Q"),
        opcodes(b"X\x01\x00\x00\x00x"),
        b"",
        b"\x80\x04",
        b"hello world",
        b"\x80\x04\x95\xff\xff\xff\xff\xff\xff\xff\x7f",
    ],
)
def test_malformed_streams_are_one_sentence(write, stream):
    with pytest.raises(UserError, match=r"net\.pkl"):
        read_snapshot(write(stream))


def test_the_reader_is_unchanged_after_an_attack(write):
    good = write(snapshot_dict()[0], "good.pkl")
    evil = opcodes(b"ctorch.nn.modules.container\nModuleDict\n", b"N}X\x0c\x00\x00\x00__setstate__K\x01s\x86", b"b")
    with pytest.raises(UserError):
        read_snapshot(write(evil))
    assert "enc.8x8_conv.weight" in read_snapshot(good).tensors


@pytest.mark.filterwarnings("ignore:TypedStorage is deprecated")
def test_tensor_reaching_past_its_storage(write):
    """torch would enlarge the storage and show whatever memory lies behind it."""

    class Forged:
        def __init__(self, *geometry):
            self.geometry = geometry

        def __reduce__(self):
            storage = torch.zeros(4).storage()
            return torch._utils._rebuild_tensor_v2, (storage, *self.geometry, False, OrderedDict())

    for geometry in [(0, (8,), (1,)), (3, (2,), (1,)), (0, (2, 2), (4, 1)), (0, (1000,), (0,)), (-1, (1,), (1,))]:
        content, net = snapshot_dict()
        net._parameters["gain"] = Forged(*geometry)
        with pytest.raises(UserError, match="a tensor of size"):
            read_snapshot(write(content))
    net._parameters["gain"] = Forged(1, (3,), (1,))
    assert torch.equal(read_snapshot(write(content)).tensors["gain"], torch.zeros(3))


def changed(change):
    content, net = snapshot_dict()
    change(net)
    return content


@pytest.mark.parametrize(
    "content, message",
    [
        (dict(a=1, b=2), "no network under 'ema'; the file holds a, b"),
        (torch_bytes({}), "not an EDM pickle"),
        (changed(lambda n: vars(n).update(_init_args=None, _init_kwargs=None)), "no constructor arguments"),
        (changed(lambda n: n.model._modules.update(up=n.model)), "contain each other"),
        (changed(lambda n: vars(n).update(_init_args=reduce(lambda p, _: [p], range(100)))), "contain each other"),
        (changed(lambda n: vars(n).update(_init_args=reduce(lambda p, _: [p, p], range(41)))), "repeat without end"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_cannot_be_rebuilt_is_named(write, content, message):
    with pytest.raises(UserError, match=rf"net\.pkl.*{message}"):
        read_snapshot(write(content))


def test_missing_key_and_missing_file(write, tmp_path):
    with pytest.raises(UserError, match=r"net\.pkl: no network under 'net'; the file holds ema, dataset_kwargs"):
        read_snapshot(write(snapshot_dict()[0]), key="net")
    with pytest.raises(UserError, match=r"none\.pkl does not exist"):
        read_snapshot(tmp_path / "none.pkl")


GOOD = dumps(snapshot_dict()[0])


@pytest.mark.parametrize("keep", [0.1, 0.5, 0.9, 0.999])
def test_truncated_file_is_named(write, keep):
    with pytest.raises(UserError, match=r"cut\.pkl"):
        read_snapshot(write(GOOD[: int(len(GOOD) * keep)], "cut.pkl"))


@settings(deadline=None, max_examples=50)
@given(st.data())
def test_any_damage_is_read_or_refused_but_never_crashes(tmp_path_factory, data):
    damaged = bytearray(GOOD)
    for _ in range(data.draw(st.integers(1, 3))):
        damaged[data.draw(st.integers(0, len(GOOD) - 1))] = data.draw(st.integers(0, 255))
    path = tmp_path_factory.mktemp("damage") / "net.pkl"
    path.write_bytes(damaged)
    before = copy.copy(sys.modules)
    try:
        read_snapshot(path)
    except UserError as error:
        assert "net.pkl" in str(error)
    assert not hasattr(builtins, RAN)
    assert set(sys.modules) - set(before) <= {name for name in sys.modules if name.startswith(("torch", "numpy"))}
