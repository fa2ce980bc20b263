"""Official EDM / EDM2 network pickles, read without running anything they contain.

Those files hold Python source code next to the tensors and normally `exec` it when opened. Here every name a file asks
for is replaced by an inert stand-in of ours, or refused; the source text is skipped. What comes out is tensors under
their official names and the constructor arguments as plain data.

Format (read from NVlabs/edm and edm2, `torch_utils/persistence.py`): `dict(ema=<network>, ...)`; a network is
`_reconstruct_persistent_obj(dict(type, version, module_src, class_name, state))` with the module's `__dict__` as state,
tensors are `_rebuild_tensor_v2(_load_from_bytes(<torch.save of one storage>), ...)`.
"""

import io
import math
import pickle
import re
import warnings
import zipfile
from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from common.archives import open_zip
from common.errors import UserError
from common.files import refuse_lfs_pointer

_DTYPES = {name for name in dir(torch) if isinstance(getattr(torch, name), torch.dtype)}
# A small file can describe an enormous tree by naming the same branch again and again.
_MAX_DEPTH, _MAX_ITEMS = 64, 200_000


@dataclass(frozen=True, kw_only=True)
class Snapshot:
    """One network of a pickle: class name, constructor arguments (plain data), tensors under the official names.

    others   the remaining entries of the file as plain data; objects appear as "<ClassName>"
    """

    class_name: str
    args: list
    kwargs: dict
    tensors: dict[str, Tensor]
    others: dict = field(default_factory=dict)


def read_snapshot(path: str | Path, *, key: str = "ema") -> Snapshot:
    """The network stored under `key` of an official EDM / EDM2 pickle.

    Raises UserError that names the file when it is missing, truncated or no such pickle, and when it asks for any name
    outside the known list (the name is in the message; nothing was run).
    """
    path = Path(path)
    if not path.is_file():
        raise UserError(f"{path} does not exist. Check the path.")
    refuse_lfs_pointer(path)
    with open(path, "rb") as file:
        head = file.read(4)
        if head.startswith(b"PK"):
            raise UserError(f"{path} is a torch or zip file, not an EDM pickle. Load it directly: it needs no import.")
        file.seek(0)
        try:
            content = _Reader(file).load()
        except UserError as error:
            raise UserError(f"{path}: {error}") from error
        except MemoryError:
            raise UserError(f"{path} is damaged: it asks for more memory than there is. Copy it again.") from None
        except Exception as error:  # a damaged stream can fail in every opcode, each with its own exception type
            reason = (str(error).strip() or type(error).__name__).splitlines()[0]
            raise UserError(f"{path} is truncated or no EDM pickle ({reason}). Copy it again.") from error
    try:
        return _snapshot(content, key)
    except UserError as error:
        raise UserError(f"{path}: {error}") from error


class _ImmutableClass(type):
    """Classes that a pickle can refer to but not change."""

    def __setattr__(cls, name, value):
        raise UserError(f"the file tries to change {cls.__name__}.{name} and is refused.")


class Record(metaclass=_ImmutableClass):
    """Inert stand-in for an object of the file: `name` of its class and `state`, its `__dict__`."""

    name = "object"
    state: dict

    def __new__(cls, *args):
        self = object.__new__(cls)
        self.state = {}
        return self

    def __init__(self, *args):
        pass

    def __setstate__(self, state):
        if not isinstance(state, dict):
            raise UserError(f"the state of {self.name} is a {type(state).__name__}, not a dictionary.")
        self.__dict__["state"] = state


class _ReadOnly(metaclass=_ImmutableClass):
    """Read-only wrapper of a finished value: pickle's BUILD opcode must not reach a tensor's own `__setstate__`."""

    __slots__ = ("value",)
    value: Any

    def __init__(self, value):
        object.__setattr__(self, "value", value)

    def __setattr__(self, name, value):
        raise UserError("the file tries to change a finished value and is refused.")


class _Call(_ReadOnly):
    """A function of ours that a pickle may call but not change."""

    __slots__ = ()

    def __call__(self, *args):
        return self.value(*args)


class _DType(metaclass=_ImmutableClass):
    """A numpy dtype by name; only plain numbers, because object dtypes would unpickle again."""

    __slots__ = ("code", "order")

    def __init__(self, code, align=False, copy=False):
        if not (isinstance(code, str) and re.fullmatch(r"[<>|=]?[biufc]\d{1,2}|\?", code)):
            raise UserError(f"numpy dtype {code!r} is not a plain number type and is refused.")
        self.code, self.order = code.lstrip("<>|="), code[0] if code[0] in "<>" else "="

    def __setstate__(self, state):
        if isinstance(state, tuple) and len(state) > 1 and state[1] in ("<", ">", "|", "="):
            self.order = state[1]

    @property
    def value(self) -> np.dtype:
        return np.dtype(self.order + self.code if self.order in "<>" else self.code)


class _Array(metaclass=_ImmutableClass):
    """A numpy array that is filled by pickle's BUILD opcode."""

    __slots__ = ("value",)

    def __init__(self, *args):
        self.value = np.zeros(0)

    def __setstate__(self, state):
        _, shape, dtype, fortran, raw = state
        self.value = _array(raw, dtype, shape, "F" if fortran else "C")


def _array(raw, dtype: _DType, shape, order="C") -> np.ndarray:
    if not isinstance(dtype, _DType) or not isinstance(raw, bytes | bytearray):
        raise UserError("a numpy array without plain bytes is refused.")
    shape = tuple(shape) if isinstance(shape, tuple | list) else (shape,)
    return np.frombuffer(raw, dtype.value).reshape(shape, order="F" if order == "F" else "C").copy()


def _scalar(dtype, raw=b""):
    return _array(raw, dtype, (1,))[0].item()


def _frombuffer(raw, dtype, shape, order):
    array = _Array()
    array.value = _array(raw, dtype, shape, order)
    return array


def _encode(text, encoding="latin1"):
    if encoding != "latin1":
        raise UserError(f"text encoding {encoding!r} is not part of the format and is refused.")
    return text.encode("latin1")


def _persistent(meta):
    if not isinstance(meta, dict) or meta.get("type") != "class" or not isinstance(meta.get("class_name"), str):
        raise UserError("a persistent object without class name is not part of the format.")
    record = _record_type(meta["class_name"])()
    record.__setstate__(meta.get("state"))
    return record


def _record_type(name: str) -> type:
    return _ImmutableClass(name, (Record,), {"name": name})


def _load_from_bytes(data):
    if not isinstance(data, bytes | bytearray):
        raise UserError("a tensor storage that is not plain bytes is refused.")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            if data.startswith(b"PK"):
                open_zip(io.BytesIO(data)).close()
            storage = torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
    except zipfile.BadZipFile as error:
        raise UserError(f"a tensor storage inside the file is refused: {error}.") from error
    except pickle.UnpicklingError as error:
        name = re.search(r"GLOBAL ([\w.]+)", str(error))
        asked = f"asks for {name[1]}" if name else "holds more than numbers"
        raise UserError(f"a tensor storage inside the file {asked} and is refused; nothing was run.") from error
    if not isinstance(storage, torch.storage.TypedStorage):
        raise UserError(f"a tensor storage inside the file is a {type(storage).__name__} and is refused.")
    return _ReadOnly(storage)


def _rebuild_tensor(storage, offset, size, stride, requires_grad=False, hooks=None, metadata=None):
    if not isinstance(storage, _ReadOnly) or not isinstance(storage.value, torch.storage.TypedStorage):
        raise UserError("a tensor without a storage is refused.")
    numbers = (offset, *size, *stride)
    if len(size) != len(stride) or not all(type(n) is int and n >= 0 for n in numbers):
        raise UserError(f"a tensor of size {size} and stride {stride} is not possible.")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        flat = torch.empty(0, dtype=storage.value.dtype).set_(storage.value)
    # torch would silently enlarge a storage that is too small and expose the memory behind it
    last = offset + sum((n - 1) * step for n, step in zip(size, stride))
    if math.prod(size) and last >= flat.numel():
        raise UserError(f"a tensor of size {tuple(size)} reaches past its {flat.numel()} stored numbers.")
    if math.prod(size) > flat.numel():
        raise UserError(f"a tensor of size {tuple(size)} repeats its {flat.numel()} stored numbers and is refused.")
    return _ReadOnly(flat.as_strided(tuple(size), tuple(stride), offset).clone().contiguous())


def _rebuild_parameter(data, requires_grad=True, hooks=None, state=None):
    if not isinstance(data, _ReadOnly) or not isinstance(data.value, Tensor):
        raise UserError("a parameter without a tensor is refused.")
    return data


def _attribute(owner, name):
    """A bound method of an object of the file, as ECT's loss keeps one: its name, and nothing that can be called."""
    if not isinstance(owner, Record) or not isinstance(name, str) or not name.isidentifier():
        raise UserError("it asks for an attribute of something that is no object of the file, and is refused.")
    return f"<{owner.name}.{name}>"


def _device(kind, index=None):
    return str(kind)


def _size(values=()):
    return tuple(values)


_NAMES: dict[tuple[str, str], Any] = {
    ("torch_utils.persistence", "_reconstruct_persistent_obj"): _Call(_persistent),
    ("torch._utils", "_rebuild_tensor_v2"): _Call(_rebuild_tensor),
    ("torch._utils", "_rebuild_parameter"): _Call(_rebuild_parameter),
    ("torch._utils", "_rebuild_parameter_with_state"): _Call(_rebuild_parameter),
    ("torch.storage", "_load_from_bytes"): _Call(_load_from_bytes),
    ("torch", "Size"): _Call(_size),
    ("torch", "device"): _Call(_device),
    ("dnnlib.util", "EasyDict"): dict,
    ("dnnlib", "EasyDict"): dict,
    ("collections", "OrderedDict"): OrderedDict,
    ("_codecs", "encode"): _Call(_encode),
    ("numpy", "ndarray"): _Array,
    ("numpy", "dtype"): _DType,
}
for _home in ("builtins", "__builtin__"):
    _NAMES[_home, "set"], _NAMES[_home, "frozenset"] = set, frozenset
    _NAMES[_home, "getattr"] = _Call(_attribute)
for _home in ("numpy.core", "numpy._core"):
    _NAMES[_home + ".multiarray", "_reconstruct"] = _Call(_Array)
    _NAMES[_home + ".multiarray", "scalar"] = _Call(_scalar)
    _NAMES[_home + ".numeric", "_frombuffer"] = _Call(_frombuffer)


class _Reader(pickle.Unpickler):
    """Looks up every global in `_NAMES`; never imports anything."""

    def find_class(self, module, name):
        found = _NAMES.get((module, name))
        if found is not None:
            return found
        if module == "torch" and name in _DTYPES:
            return f"torch.{name}"
        # plain containers such as ModuleDict: their content is needed, their code is not
        if module.startswith("torch.nn.modules.") and name.isidentifier():
            return _record_type(name)
        raise UserError(f"it asks for {module}.{name}, which no network needs, and is refused; nothing was run.")

    def persistent_load(self, pid):
        raise UserError("it refers to data outside the file and is refused.")


def _snapshot(content, key: str) -> Snapshot:
    if isinstance(content, Record):
        content = {key: content}
    if not isinstance(content, dict) or not isinstance(content.get(key), Record):
        held = ", ".join(map(str, list(content)[:8])) if isinstance(content, dict) else type(content).__name__
        raise UserError(f"no network under {key!r}; the file holds {held}.")
    network = content[key]
    args, kwargs = network.state.get("_init_args"), network.state.get("_init_kwargs")
    if not isinstance(args, tuple | list) or not isinstance(kwargs, Mapping):
        raise UserError(f"{network.name} carries no constructor arguments, so its architecture is unknown.")
    tensors: dict[str, Tensor] = {}
    _collect(network, "", tensors, 0, _Budget())
    if not tensors:
        raise UserError(f"{network.name} holds no tensors.")
    others = {str(name): plain(value) for name, value in content.items() if name != key}
    return Snapshot(
        class_name=network.name, args=plain(list(args)), kwargs=plain(dict(kwargs)), tensors=tensors, others=others
    )


class _Budget:
    """Counts what was visited; raises UserError when a file describes more than any network has."""

    def __init__(self):
        self.items = 0

    def visit(self, depth: int) -> None:
        self.items += 1
        if depth > _MAX_DEPTH or self.items > _MAX_ITEMS:
            raise UserError("its parts contain each other, or repeat without end, and are refused.")


def _collect(record: Record, prefix: str, into: dict[str, Tensor], depth: int, budget: _Budget) -> None:
    """The order and names of `nn.Module.state_dict`: own parameters, own persistent buffers, then the children."""
    budget.visit(depth)
    transient = record.state.get("_non_persistent_buffers_set") or ()
    for group in ("_parameters", "_buffers"):
        for name, value in _items(record, group):
            if value is None or (group == "_buffers" and name in transient):
                continue
            if not isinstance(value, _ReadOnly) or not isinstance(value.value, Tensor):
                raise UserError(f"{prefix}{name} is not a tensor.")
            into[prefix + name] = value.value
    for name, child in _items(record, "_modules"):
        if child is None:
            continue
        if not isinstance(child, Record):
            raise UserError(f"{prefix}{name} is not a module.")
        _collect(child, f"{prefix}{name}.", into, depth + 1, budget)


def _items(record: Record, group: str):
    found = record.state.get(group) or {}
    if not isinstance(found, Mapping) or not all(isinstance(name, str) for name in found):
        raise UserError(f"{group} of {record.name} is not a dictionary of names.")
    return list(found.items())


def plain(value: Any, depth: int = 0, budget: _Budget | None = None) -> Any:
    """`value` as JSON data: tuples and sets become lists, arrays nested lists, objects "<ClassName>"."""
    budget = budget or _Budget()
    budget.visit(depth)
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, Mapping):
        return {str(name): plain(item, depth + 1, budget) for name, item in value.items()}
    if isinstance(value, list | tuple | set | frozenset):
        return [plain(item, depth + 1, budget) for item in value]
    if isinstance(value, _Array):
        return value.value.tolist()
    if isinstance(value, _DType):
        return str(value.value)
    if isinstance(value, _ReadOnly) and isinstance(value.value, Tensor):
        return value.value.tolist() if value.value.numel() <= 1024 else f"<tensor {tuple(value.value.shape)}>"
    return f"<{value.name}>" if isinstance(value, Record) else f"<{type(value).__name__}>"
