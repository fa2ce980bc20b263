"""Checks a configuration against the signatures of the classes it names, before any data is read.

Hydra rejects a misspelt key on the command line, but merges the same typo inside an experiment file silently, and does
not check types. `check` therefore imports every `_target_`, compares the keys with its signature and the values with
its annotations, and reports one sentence per problem with the nearest name.
"""

import collections.abc
import dataclasses
import enum
import inspect
import os
import re
import types
import typing
from collections.abc import Iterator, Mapping
from pathlib import Path

from common.errors import UserError, nearest
from common.limits import configuration_problems
from common.runtime.cli.explain import explain_hydra_error, nearest_below, words
from common.targets import resolve

HYDRA_KEYS = {"_target_", "_partial_", "_recursive_", "_convert_", "_args_"}
OPEN = "<open>"  # schema value of a section whose keys are free
# Types of the values that no `_target_` describes and whose default, null, does not show them.
TYPES = {
    "task": str,
    "seed": int,
    "resume": str,
    "init.file": str | None,
    "init.average": str | None,
    "init.hint": str | None,
    "speed.channels_last": bool | None,
    "speed.threads": int | None,
    "sample.average": str,
    "sample.classes": list[int] | None,
    "sample.input": str | list[str] | None,
    "plan.parameters": int | None,
    "plan.peak_tflops": float | None,
    "run.dir": str,
    "run.name": str,
    "paths.outputs": str,
    "paths.cache": str,
    "paths.data": str,
    "paths.weights": str,
}


def check(config, *, schema=None, supplied: Mapping[str, set[str]] | None = None) -> None:
    """Raises `UserError` (exit code 2) with one line per problem of `config`; returns None when there is none.

    config    DictConfig or plain nested dict; interpolations are resolved first
    schema    what sections without `_target_` may hold: nested dict (see `read_schema`), the set of root keys, or None
              for no such check. A value `OPEN` or {} leaves that section free; a section whose known entries are all
              `_target_` nodes (callbacks, loggers) accepts further named nodes, but nothing else
    supplied  {"project": {"total_steps"}}: arguments the runtime passes itself to the target at that path
    """
    tree = _plain(config)
    if isinstance(schema, set | frozenset):
        schema = {key: OPEN for key in schema}
    elif schema is not None:
        schema = _plain(schema, throw=False)
    found = [*_walk(tree, "", schema if schema is not None else OPEN, supplied or {}), *configuration_problems(tree)]
    problems = list(dict.fromkeys(found))
    # a bad value is reported where it was given, not once more for every place that refers to it
    given = [problem for problem in problems if not _is_reference(config, problem.split(" ", 1)[0])]
    if problems:
        raise UserError("\n".join(given or problems))


def check_data(config, conf_dir=None) -> None:
    """Raises `UserError` when the chosen data are of another kind than the experiment reads: masks for a denoiser, say.

    config    composed configuration with `project` and `data`
    conf_dir  the conf/ folder: where data of the right kind are looked up for the sentence
    """
    from omegaconf import OmegaConf

    for part in ("project", "data", "trainer"):
        if not OmegaConf.select(config, f"{part}._target_", default=None):
            raise UserError(
                f"{part} is empty: there is no {part}._target_. Choose one: {part}=<a file of conf/{part}>."
            )
    needed, held = (
        getattr(_class_of(OmegaConf.select(config, f"{part}._target_")), attribute, "")
        for part, attribute in (("project", "reads"), ("data", "holds"))
    )
    if needed and held and needed != held:
        fitting = _data_of_kind(needed, Path(conf_dir)) if conf_dir else []
        listing = f" Choose one of: {', '.join(fitting)}." if fitting else ""
        raise UserError(f"This experiment needs {needed}, and the data chosen (data=...) are {held}.{listing}")


def _class_of(target):
    try:
        return resolve(target)
    except UserError:  # `check` reports it with its path
        return None


def _data_of_kind(kind: str, conf_dir: Path) -> list[str]:
    found = []
    for path in sorted((conf_dir / "data").glob("*.yaml")):
        target = re.search(r"^_target_: *(\S+)", path.read_text(encoding="utf-8"), re.MULTILINE)
        if target and getattr(_class_of(target[1]), "holds", "") == kind:
            found.append(path.stem)
    return found


def _is_reference(config, path: str) -> bool:
    """True when the value at `path` is an interpolation such as `${trainer.max_steps}`."""
    if isinstance(config, dict):
        return False
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    parent, _, key = path.rpartition(".")
    try:
        node = OmegaConf.select(config, parent) if parent else config
        return OmegaConf.is_dict(node) and OmegaConf.is_interpolation(node, key)
    except OmegaConfBaseException:
        return False


def _plain(config, throw: bool = True):
    """DictConfig -> plain resolved containers; missing values and broken interpolations become `UserError`."""
    if isinstance(config, dict):
        return config
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    try:
        return OmegaConf.to_container(config, resolve=throw, throw_on_missing=throw)
    except OmegaConfBaseException as error:
        raise UserError(explain_hydra_error(error)) from error


# ---------------------------------------------------------------------------------------------------------------------
# Visiting every node of the tree


def _walk(node, path: str, schema, supplied) -> Iterator[str]:
    if isinstance(node, list | tuple):
        for index, item in enumerate(node):
            yield from _walk(item, f"{path}.{index}" if path else str(index), OPEN, supplied)
        return
    if not isinstance(node, dict):
        return
    if "_target_" in node:
        yield from _target(node, path, supplied.get(path, set()))
    elif isinstance(schema, dict) and schema:
        yield from _section(node, path, schema)
    for key, value in node.items():
        inner = schema.get(key, OPEN) if isinstance(schema, dict) and schema and "_target_" not in node else OPEN
        yield from _walk(value, f"{path}.{key}" if path else str(key), inner, supplied)


def _section(node: dict, path: str, schema: dict) -> Iterator[str]:
    """Keys and plain types of a section that no `_target_` describes."""
    known = [value for key, value in schema.items() if value is not None]
    named_objects = bool(path) and bool(known) and all(_is_target(value) for value in known)
    for key, value in node.items():
        here = f"{path}.{key}" if path else str(key)
        if named_objects and not _is_target(value) and value is not None and not _is_target(schema.get(key)):
            yield (
                f"{here} has no _target_, so it is not an entry of {path}. "
                f"{nearest(str(key), schema)}Entries: {', '.join(map(str, schema))}."
            )
        elif not named_objects and key not in schema:
            where = f"an option of {path}" if path else "a section of the configuration"
            yield f"{here} is not {where}. {nearest(str(key), schema)}Options: {', '.join(map(str, schema))}."
        elif here in TYPES:
            reason = mismatch(value, TYPES[here])
            if reason:
                yield f"{here} must be {reason}"
        elif key in schema:
            default = schema[key]
            if isinstance(default, bool | int | float) and value is not None:
                reason = mismatch(value, type(default))
                if reason:
                    yield f"{here} must be {reason}"
            elif isinstance(default, dict) and value is not None and not isinstance(value, dict):
                yield f"{here} is a section (keys: {', '.join(map(str, default))}), got {_show(value)}."


def _is_target(value) -> bool:
    return isinstance(value, dict) and "_target_" in value


def _target(node: dict, path: str, supplied: set[str]) -> Iterator[str]:
    label = path or "configuration"
    prefix = f"{path}." if path else ""
    try:
        target = resolve(node["_target_"])
    except UserError as error:
        yield f"{label}: {error}"
        return
    for key in ("_partial_", "_recursive_"):
        if key in node and not isinstance(node[key], bool):
            yield f"{prefix}{key} must be true or false, got {_show(node[key])}."
    try:
        signature = inspect.signature(target)
    except (ValueError, TypeError):  # a builtin without a signature: nothing to compare with
        return
    hints = _hints(target)
    parameters = dict(signature.parameters)
    open_ended = any(p.kind is p.VAR_KEYWORD for p in parameters.values())
    positional = [p.name for p in parameters.values() if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
    by_name = {name: p for name, p in parameters.items() if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)}
    arguments = node.get("_args_") or []
    given = dict(zip(positional, arguments)) | {key: value for key, value in node.items() if key not in HYDRA_KEYS}
    name = node["_target_"]
    for key, value in given.items():
        if key not in by_name and key not in positional:
            if not open_ended:
                options = ", ".join(by_name) or "none"
                close = nearest(str(key), by_name) or nearest_below(str(key), node, path)
                yield f"{prefix}{key} is not an option of {name}. {close}Options: {options}."
            continue
        parameter = parameters[key]
        if value is None and parameter.default is None:
            continue
        hint = hints.get(key, parameter.annotation)
        reason = mismatch(value, hint, recursive=node.get("_recursive_", True) is not False)
        if reason:
            yield f"{prefix}{key} must be {reason}"
    if node.get("_partial_") is True:
        return
    for key, parameter in by_name.items():
        if parameter.default is parameter.empty and key not in given and key not in supplied:
            kind = f" ({_name(hints[key])})" if key in hints else ""
            typo = nearest(key, [k for k in given if k not in by_name])
            meant = f"{typo}" if typo else ""
            yield f"{prefix}{key}{kind} is missing: {name} needs it. {meant}Set {prefix}{key}=..."


def _hints(target) -> dict:
    """Resolved annotations by parameter name; those that cannot be resolved (TYPE_CHECKING imports) are left out."""
    function = target
    if inspect.isclass(target):
        function = target.__init__ if target.__init__ is not object.__init__ else target.__new__
    function = inspect.unwrap(function)
    try:
        return typing.get_type_hints(function)
    except Exception:
        pass
    space = getattr(function, "__globals__", {})
    hints = {}
    for key, annotation in getattr(function, "__annotations__", {}).items():
        try:
            hints[key] = eval(annotation, space) if isinstance(annotation, str) else annotation
        except Exception:
            hints[key] = typing.Any
    return hints


# ---------------------------------------------------------------------------------------------------------------------
# One value against one annotation

LISTS = (
    list,
    tuple,
    collections.abc.Sequence,
    collections.abc.MutableSequence,
    collections.abc.Iterable,
    collections.abc.Collection,
)
DICTS = (dict, collections.abc.Mapping, collections.abc.MutableMapping)


def mismatch(value, hint, recursive: bool = True) -> str | None:
    """None when `value`, as plain YAML data, fits the annotation; else "a float, got 'abc' (str). <advice>".

    recursive  False where Hydra does not build nested `_target_` nodes (`_recursive_: false`): they stay dicts
    """
    advice = _misfit(value, hint, recursive)
    return None if advice is None else f"{_name(hint)}, got {_show(value)}. {advice}".rstrip()


def _misfit(value, hint, recursive: bool) -> str | None:
    """None when it fits, else advice (possibly empty)."""
    hint = _strip(hint)
    if hint in (inspect.Parameter.empty, typing.Any, object) or isinstance(hint, str | typing.TypeVar):
        return None
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        advices = [_misfit(value, option, recursive) for option in arguments]
        given = [advice for advice in advices if advice is not None]
        return max(given, key=len) if len(given) == len(advices) else None
    if origin is typing.Literal:
        if any(value == option and type(value) is type(option) for option in arguments):
            return None
        return nearest(str(value), arguments)
    if hint in (None, types.NoneType):
        return None if value is None else ""
    if value is None:
        return "null is not allowed here."
    if recursive and _is_target(value):
        return _object(value, hint, origin)
    if _is_callable(hint, origin):
        return "Give a node with _target_ and _partial_: true."
    return _data(value, hint, origin or hint, arguments, recursive)


def _data(value, hint, kind, arguments, recursive: bool) -> str | None:
    """Plain YAML data against anything but unions, literals and callables."""
    if kind in LISTS:
        if not isinstance(value, list | tuple):
            return f"Write a list: [{value}]." if not isinstance(value, dict) else ""
        return _elements(value, kind, arguments, recursive)
    if kind in DICTS or typing.is_typeddict(hint):
        if not isinstance(value, dict):
            return ""
        inner = arguments[1] if len(arguments) == 2 else typing.Any
        wrong = [key for key, item in value.items() if _misfit(item, inner, recursive) is not None]
        return f"Entry {wrong[0]!r} is {_show(value[wrong[0]])}." if wrong else None
    if kind is bool:
        return None if isinstance(value, bool) else "Write true or false."
    if kind is int:
        if isinstance(value, int) and not isinstance(value, bool):
            return None
        return f"Write {int(value)}." if isinstance(value, float) and value.is_integer() else ""
    if kind is float:
        return _float(value)
    if kind is str:
        if isinstance(value, str):
            return None
        return f"Quote it: '{value}'." if not isinstance(value, dict | list) else ""
    if kind is os.PathLike or (inspect.isclass(kind) and issubclass(kind, os.PathLike)):
        return None if isinstance(value, str | os.PathLike) else ""
    if inspect.isclass(kind) and issubclass(kind, enum.Enum):
        return None if issubclass(kind, str) and value in [m.value for m in kind] else ""
    if not inspect.isclass(kind) or getattr(kind, "_is_protocol", False):
        return None  # any other annotation: the class itself checks the value
    try:
        fits = isinstance(value, kind)
    except TypeError:
        return None
    return None if fits else "Give a node with _target_."


def _float(value) -> str | None:
    if isinstance(value, int | float) and not isinstance(value, bool):
        return None
    if not isinstance(value, str):
        return ""
    try:
        number = float(value)
    except ValueError:
        return ""
    if number != number or abs(number) == float("inf"):
        return "YAML writes infinities as .inf, -.inf and .nan."
    mantissa, _, exponent = f"{number!r}".partition("e")
    plain = f"{mantissa if '.' in mantissa else mantissa + '.0'}e{exponent}" if exponent else repr(number)
    return f"It is text; YAML writes floats unquoted and with a point, like 1.0e-4: write {plain}."


def _elements(value, kind, arguments, recursive: bool) -> str | None:
    if kind is tuple and arguments and arguments[-1] is not Ellipsis:
        if len(value) != len(arguments):
            return f"It has {len(value)} elements."
        pairs = list(zip(value, arguments))
    else:
        pairs = [(item, arguments[0]) for item in value] if arguments else []
    for index, (item, inner) in enumerate(pairs):
        if _misfit(item, inner, recursive) is not None:
            return f"Element {index} is {_show(item)}, not {_name(inner)}."
    return None


def _object(node: dict, hint, origin) -> str | None:
    """A nested `_target_` node against the annotation of the argument that receives what it builds."""
    try:
        target = resolve(node["_target_"])
    except UserError:
        return None  # reported when the node itself is checked
    callable_wanted = _is_callable(hint, origin)
    if node.get("_partial_") is True:
        if callable_wanted or getattr(hint, "__name__", "") == "partial" or getattr(hint, "_is_protocol", False):
            return None
        return "A _partial_ node builds a function, not the object; drop _partial_."
    made = target if inspect.isclass(target) else _hints(target).get("return")
    if callable_wanted:
        fits = not inspect.isclass(made) or any("__call__" in vars(kind) for kind in made.__mro__)
        return None if fits else f"{node['_target_']} cannot be called; add _partial_: true."
    wanted = origin or hint
    if not inspect.isclass(made) or not inspect.isclass(wanted) or getattr(wanted, "_is_protocol", False):
        return None
    try:
        fits = issubclass(made, wanted)
    except TypeError:
        return None
    return None if fits else f"{node['_target_']} builds a {made.__name__}."


def _is_callable(hint, origin) -> bool:
    return hint is collections.abc.Callable or origin is collections.abc.Callable or hint is typing.Callable


def _strip(hint):
    """Annotated, NewType, Final and type aliases down to the type they stand for."""
    while True:
        origin = typing.get_origin(hint)
        if origin in (typing.Annotated, typing.Final, typing.ClassVar):
            hint = typing.get_args(hint)[0]
        elif hasattr(hint, "__supertype__"):
            hint = hint.__supertype__
        elif type(hint).__name__ == "TypeAliasType":
            hint = hint.__value__
        elif isinstance(hint, dataclasses.InitVar):
            hint = hint.type
        else:
            return hint


def _name(hint) -> str:
    """The annotation in words: "a float", "one of 'v', 'x'", "a list of int or null"."""
    hint = _strip(hint)
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        return " or ".join(dict.fromkeys(_name(option) for option in arguments))
    if origin is typing.Literal:
        return f"one of {', '.join(map(repr, arguments))}" if len(arguments) > 1 else repr(arguments[0])
    if hint in (None, types.NoneType):
        return "null"
    if _is_callable(hint, origin):
        return "a function"
    kind = origin or hint
    if kind in LISTS:
        if kind is tuple and arguments and arguments[-1] is not Ellipsis:
            return f"a list of {len(arguments)}: ({', '.join(map(_name, arguments))})"
        return f"a list of {_bare(arguments[0])}" if arguments else "a list"
    if kind in DICTS:
        return "a mapping"
    simple = {bool: "true or false", int: "an integer", float: "a number", str: "text"}
    return simple.get(kind) or f"a {getattr(kind, '__name__', str(kind))}"


def _bare(hint) -> str:
    return {int: "integers", float: "numbers", str: "text"}.get(_strip(hint)) or _name(hint)


def _show(value) -> str:
    return words(value)
