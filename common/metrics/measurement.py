"""A number with everything one must know before putting it beside another number."""

import dataclasses
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from common.errors import UserError

_TYPES = {"value": (int, float), "samples": int, "ddof": int}


@dataclass(frozen=True, kw_only=True)
class Measurement:
    """One measured value and how it was measured. Only records equal in every field but `value` may be compared.

    name            "FID" for the 2015 Inception network alone, else "FD-resnet56", "FD-efflite0", "FD-digits",
                    "FD-pixels", "IS-...", "precision-...", "recall-..."
    value           the number
    extractor       name of the feature extractor;  extractor_hash  16 hex of its weights and preprocessing
    reference       what it was compared with, e.g. "cifar10/train (50000 images)", "none" for the inception score
    reference_hash  16 hex of the data set's fingerprint, its count and the extractor
    samples         images measured
    rounding        rule that made them 8-bit (`common.metrics.images.to_uint8`)
    ddof            divisor n - ddof of the covariance; 0 where there is none
    """

    name: str
    value: float
    extractor: str
    extractor_hash: str
    reference: str
    reference_hash: str
    samples: int
    rounding: str
    ddof: int

    def as_dict(self) -> dict[str, str | int | float]:
        """Plain values, ready for JSON or CSV."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, record: Mapping) -> "Measurement":
        """The inverse of `as_dict`. Raises UserError naming a missing, unknown or ill-typed field."""
        names = [field.name for field in dataclasses.fields(cls)]
        missing, unknown = [n for n in names if n not in record], [n for n in record if n not in names]
        if missing or unknown:
            raise UserError(
                f"a measurement needs the fields {', '.join(names)}; missing: {', '.join(missing) or 'none'}, "
                f"unknown: {', '.join(map(str, unknown)) or 'none'}. Write records with Measurement.as_dict()."
            )
        for name in names:
            if isinstance(record[name], bool) or not isinstance(record[name], _TYPES.get(name, str)):
                raise UserError(
                    f"measurement field {name} has the wrong type: {record[name]!r}. Write records with as_dict()."
                )
        return cls(**{**record, "value": float(record["value"])})

    def __str__(self) -> str:
        source = "" if self.reference_hash == "none" else f", against {self.reference} [{self.reference_hash}]"
        return (
            f"{self.name} {self.value:.4g} ({self.samples} images, extractor {self.extractor} "
            f"[{self.extractor_hash}]{source}, rounding {self.rounding}, ddof {self.ddof})"
        )


def require_alike(a: Measurement, b: Measurement, *, ignoring: Iterable[str] = ()) -> None:
    """Raises UserError naming every field (but `value`) in which the two records differ.

    ignoring  fields whose difference the caller takes responsibility for, e.g. ("samples",) for a floor measured on
              fewer held-out images
    """
    ignoring = {"value", *ignoring}
    names = [field.name for field in dataclasses.fields(Measurement)]
    wrong = sorted(ignoring - set(names))
    if wrong:
        raise UserError(f"ignoring names no field of a measurement: {', '.join(wrong)}. Fields: {', '.join(names)}.")
    different = [n for n in names if n not in ignoring and getattr(a, n) != getattr(b, n)]
    if different:
        detail = "; ".join(f"{n}: {getattr(a, n)!r} and {getattr(b, n)!r}" for n in different)
        raise UserError(f"these two measurements must not be compared, they differ in {detail}. Measure both alike.")


def compare(a: Measurement, b: Measurement, *, ignoring: Iterable[str] = ()) -> float:
    """a.value - b.value of two comparable records; raises UserError otherwise."""
    require_alike(a, b, ignoring=ignoring)
    return a.value - b.value


def ratio(a: Measurement, b: Measurement, *, ignoring: Iterable[str] = ()) -> float:
    """a.value / b.value of two comparable records; raises UserError otherwise. x/0 is inf (nan for 0/0)."""
    require_alike(a, b, ignoring=ignoring)
    if b.value == 0:
        return math.nan if a.value == 0 else math.copysign(math.inf, a.value)
    return a.value / b.value
