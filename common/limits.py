"""Range checks of plain Python numbers a user gives; one sentence each. Tensors are never checked: that would wait for
the device.
"""

import math
from numbers import Real

from common.errors import UserError, nearest


def number(
    name: str,
    value,
    *,
    above: float | None = None,
    least: float | None = None,
    below: float | None = None,
    most: float | None = None,
):
    """Return `value` when it is a finite-or-inf real number inside the limits, else raise `UserError`.

    above   value must be > above
    least   value must be >= least
    below   value must be < below
    most    value must be <= most
    """
    wanted = [f"> {above:g}"] if above is not None else []
    wanted += [f">= {least:g}"] if least is not None else []
    wanted += [f"< {below:g}"] if below is not None else []
    wanted += [f"<= {most:g}"] if most is not None else []
    allowed = " and ".join(wanted) or "a number"
    good = isinstance(value, Real) and not isinstance(value, bool) and not math.isnan(value)
    good = good and (above is None or value > above)
    good = good and (least is None or value >= least)
    good = good and (below is None or value < below)
    good = good and (most is None or value <= most)
    if not good:
        raise UserError(f"{name} must be {allowed}, got {value!r}. Set {name} to a number in that range.")
    return value


def whole(name: str, value, *, least: int = 0):
    """Return `value` when it is an int >= least, else raise `UserError`."""
    if not isinstance(value, int) or isinstance(value, bool) or value < least:
        raise UserError(f"{name} must be a whole number >= {least}, got {value!r}. Set {name}={max(least, 1)} or more.")
    return value


def sigma(name: str, value):
    """Return a noise level given as a Python number when it is > 0, else raise `UserError`.

    The network is told ln(sigma), so zero or a negative sigma would only show up much later as nan.
    """
    if not isinstance(value, Real) or isinstance(value, bool) or not value > 0:
        what = "negative sigma" if isinstance(value, Real) and value < 0 else "sigma"
        raise UserError(f"{what}: {name} must be > 0, got {value!r}. Set {name} to a positive noise level, e.g. 0.002.")
    return value


def sigma_range(low, high, names: tuple[str, str] = ("sigma_min", "sigma_max")) -> None:
    """Raise `UserError` unless 0 < low < high < inf."""
    sigma(names[0], low)
    sigma(names[1], high)
    if not low < high < math.inf:
        raise UserError(
            f"{names[0]} must be below {names[1]} and both finite, got {low!r} and {high!r}. "
            f"Set for example {names[0]}=0.002 {names[1]}=80."
        )


def choice(name: str, value, options) -> str:
    """Return `value` when it is one of `options`, else raise `UserError` with the nearest one."""
    if value not in options:
        raise UserError(
            f"{name} must be one of {', '.join(options)}, got {value!r}. {nearest(str(value), options)}"
            f"Set {name}={next(iter(options))}."
        )
    return value
