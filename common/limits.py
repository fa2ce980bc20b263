"""Range checks of plain Python values a user gives; one sentence each, which names the field. Tensors are never
checked: that would wait for the device. `hint` says what to set instead of the sentence's own advice.
"""

import math
from collections.abc import Collection
from numbers import Real
from typing import Any, TypeVar

from common.errors import UserError, nearest

Value = TypeVar("Value")


def number(
    name: str,
    value: Value,
    *,
    above: float | None = None,
    least: float | None = None,
    below: float | None = None,
    most: float | None = None,
    hint: str = "",
) -> Value:
    """Return `value` when it is a real number (infinity included) inside the limits, else raise `UserError`.

    above, least   value must be > above, >= least
    below, most    value must be < below, <= most
    """
    bounds = (("> ", above), (">= ", least), ("< ", below), ("<= ", most))
    allowed = " and ".join(f"{sign}{bound:g}" for sign, bound in bounds if bound is not None) or "a number"
    good = isinstance(value, Real) and not isinstance(value, bool) and not math.isnan(value)
    if good:
        x = float(value)  # type: ignore[arg-type]  # a Real, as checked
        good = (above is None or x > above) and (least is None or x >= least)
        good = good and (below is None or x < below) and (most is None or x <= most)
    if not good:
        raise _error(name, allowed, value, hint or f"Set {name} to a number in that range.")
    return value


def probability(name: str, value: Value, hint: str = "") -> Value:
    """Return `value` when it is a number in [0, 1), the probability to drop something; else raise `UserError`."""
    return number(name, value, least=0, below=1, hint=hint or f"Set {name} to a probability such as 0.1.")


def whole(name: str, value: Value, *, least: int = 0, most: int | None = None, hint: str = "") -> Value:
    """Return `value` when it is an int in least .. most (None: no upper end), else raise `UserError`."""
    good = isinstance(value, int) and not isinstance(value, bool) and value >= least and (most is None or value <= most)
    if not good:
        allowed = f"a whole number >= {least}" + (f" and <= {most}" if most is not None else "")
        advice = f"Set {name}={max(least, 1)} or more." if most is None else f"Set {name} to {least} .. {most}."
        raise _error(name, allowed, value, hint or advice)
    return value


def positive(**fields: Any) -> None:
    """Raise `UserError` for the first field that is no whole number >= 1. Names that are no Python identifiers are
    passed as `**{"project.net.width": width}`.
    """
    for name, value in fields.items():
        whole(name, value, least=1)


def multiple_of(name: str, value: int, divisor: int, why: str = "", hint: str = "") -> int:
    """Return `value` when it is a whole number >= 1 and a multiple of `divisor` >= 1, else raise `UserError`.

    why  what the divisor is, e.g. "the number of groups"
    """
    if not isinstance(value, int) or isinstance(value, bool) or value < 1 or value % divisor:
        reason = f" ({why})" if why else ""
        closest = max(round(value / divisor), 1) * divisor if isinstance(value, Real) else divisor
        raise _error(name, f"a multiple of {divisor}{reason}", value, hint or f"Set {name}={closest}.")
    return value


def sigma(name: str, value: Value) -> Value:
    """Return a noise level given as a Python number when it is > 0, else raise `UserError`.

    Networks are conditioned on ln(sigma), so zero or a negative sigma would only show up much later as nan.
    """
    if not isinstance(value, Real) or isinstance(value, bool) or not float(value) > 0:
        what = "negative sigma: " if isinstance(value, Real) and float(value) < 0 else "sigma: "
        raise _error(f"{what}{name}", "> 0", value, f"Set {name} to a positive noise level, e.g. 0.002.")
    return value


def sigma_range(low: float, high: float, names: tuple[str, str] = ("sigma_min", "sigma_max")) -> None:
    """Raise `UserError` unless 0 < low < high < inf."""
    sigma(names[0], low)
    sigma(names[1], high)
    if not low < high < math.inf:
        raise UserError(
            f"{names[0]} must be below {names[1]} and both finite, got {low!r} and {high!r}. "
            f"Set for example {names[0]}=0.002 {names[1]}=80."
        )


def choice(name: str, value: Value, options: Collection[Value], hint: str = "") -> Value:
    """Return `value` when it is one of `options`, else raise `UserError` with the nearest one."""
    if value not in options:
        words = [str(option) for option in options]
        closest = nearest(str(value), words)
        proposed = closest.removeprefix("Closest: ").removesuffix(". ") or words[0]
        raise _error(name, f"one of {', '.join(words)}", value, closest + (hint or f"Set {name}={proposed}."))
    return value


def _error(name: str, allowed: str, value: Any, advice: str) -> UserError:
    return UserError(f"{name} must be {allowed}, got {value!r}. {advice}".rstrip())
