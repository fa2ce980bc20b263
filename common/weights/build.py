"""Objects from `_target_` dictionaries without Hydra, so that an exported network loads in a plain Python session."""

import functools
import inspect
from collections.abc import Mapping, Sequence
from typing import Any

from common.errors import UserError, nearest
from common.targets import CONFIGURATION, resolve

_OWN_KEYS = ("_target_", "_partial_", "_args_", "_convert_", "_recursive_")


def build(config: Any, *, allowed: Sequence[str] = CONFIGURATION) -> Any:
    """The objects a tree of plain Python data describes; data without `_target_` is returned unchanged.

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
