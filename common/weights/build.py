"""Objects from `_target_` dictionaries without Hydra, so that an exported network loads in a plain Python session."""

import functools
import importlib
import inspect
from collections.abc import Mapping, Sequence
from typing import Any

from common.errors import UserError, nearest

ALLOWED = ("common.", "projects.", "torch.", "torchvision.", "timm.", "lightning.")
_OWN_KEYS = ("_target_", "_partial_", "_args_", "_convert_", "_recursive_")


def resolve(target: str, allowed: Sequence[str] = ALLOWED) -> Any:
    """The class or function at a dotted path. Imports only modules below `allowed`.

    Names after the module may only step through classes: `torch.serialization.os.system` reaches a module through a
    module and is refused, as is anything defined outside `allowed` that a module merely imported.
    Raises UserError for a path that is not allowed or does not exist.
    """
    if not isinstance(target, str) or not target.startswith(tuple(allowed)):
        raise UserError(f"_target_ {target!r} is not allowed. Use a dotted path below {', '.join(allowed)}.")
    parts = target.split(".")
    for cut in range(len(parts) - 1, 0, -1):
        name = ".".join(parts[:cut])
        try:
            found: Any = importlib.import_module(name)
        except ModuleNotFoundError as error:
            if error.name and (name == error.name or name.startswith(error.name + ".")):
                continue
            raise
        for part in parts[cut:]:
            if not hasattr(found, part):
                raise UserError(
                    f"_target_ {target!r} does not exist: {name} has no {part}. "
                    f"{nearest(part, dir(found))}Check the path."
                )
            found = getattr(found, part)
            home = getattr(found, "__module__", None) or ""
            if not callable(found) or not f"{home}.".startswith(tuple(a.split(".")[0] + "." for a in allowed)):
                raise UserError(f"_target_ {target!r} is not a class or function below {', '.join(allowed)}.")
        return found
    raise UserError(f"_target_ {target!r} does not exist: no module {parts[0]}.{parts[1]}. Check the path.")


def build(config: Any, *, allowed: Sequence[str] = ALLOWED) -> Any:
    """The objects a tree of plain Python data describes; data without `_target_` comes back as it is.

    `{"_target_": "torch.nn.Linear", "in_features": 2, "out_features": 3}` -> the layer. Nested dictionaries and lists
    are built first; `_partial_: True` gives a functools.partial, `_args_` positional arguments.
    Raises UserError for a target that is not allowed, does not exist, or does not take the arguments given.
    """
    if isinstance(config, Mapping):
        values = {key: build(value, allowed=allowed) for key, value in config.items() if key not in _OWN_KEYS}
        if "_target_" not in config:
            return values
        target = resolve(config["_target_"], allowed)
        args = [build(value, allowed=allowed) for value in config.get("_args_", ())]
        if config.get("_partial_", False):
            return functools.partial(target, *args, **values)
        _check_arguments(config["_target_"], target, args, values)
        return target(*args, **values)
    if isinstance(config, list | tuple):
        return [build(value, allowed=allowed) for value in config]
    return config


def _check_arguments(name: str, target: Any, args: list, values: dict) -> None:
    try:
        signature = inspect.signature(target)
    except ValueError:  # some C functions have none
        return
    known = list(signature.parameters)
    open_ended = any(p.kind is p.VAR_KEYWORD for p in signature.parameters.values())
    unknown = next((key for key in values if key not in known and not open_ended), None)
    if unknown is not None:
        raise UserError(f"{unknown} is not an option of {name}. {nearest(unknown, known)}Options: {', '.join(known)}.")
    try:
        signature.bind(*args, **values)
    except TypeError as error:
        raise UserError(f"{name}: {error}. Options: {', '.join(known)}.") from error
