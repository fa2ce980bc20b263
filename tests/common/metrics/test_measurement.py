"""Records refuse to be compared when they are not alike."""

import dataclasses
import json
import math

import pytest

from common.errors import UserError
from common.metrics.measurement import Measurement, compare, ratio

A = Measurement(
    name="FD-resnet56", value=6.0, extractor="resnet56", extractor_hash="0" * 16, reference="cifar10/train",
    reference_hash="1" * 16, samples=5000, rounding="edm", ddof=1,
)  # fmt: skip


def test_alike_records_compare():
    b = dataclasses.replace(A, value=2.0)
    assert compare(A, b) == 4.0
    assert ratio(A, b) == 3.0
    assert ratio(A, dataclasses.replace(A, value=0.0)) == math.inf


@pytest.mark.parametrize("field", [f.name for f in dataclasses.fields(Measurement) if f.name != "value"])
def test_every_other_field_must_agree(field):
    old = getattr(A, field)
    b = dataclasses.replace(A, **{field: old + 1 if isinstance(old, int) else "other"})
    for function in (compare, ratio):
        with pytest.raises(UserError, match=rf"differ in {field}: "):
            function(A, b)
    assert compare(A, b, ignoring=(field,)) == 0


def test_ignoring_must_name_fields():
    with pytest.raises(UserError, match="no field of a measurement: sample"):
        compare(A, A, ignoring=("sample",))


def test_dict_round_trip_through_json():
    assert Measurement.from_dict(json.loads(json.dumps(A.as_dict()))) == A


@pytest.mark.parametrize(
    "change, words",
    [({"samples": None}, "samples has the wrong type"), ({"value": "6"}, "value has"), ({"x": 1}, "unknown: x")],
)
def test_bad_dicts_are_named(change, words):
    with pytest.raises(UserError, match=words):
        Measurement.from_dict({**A.as_dict(), **change})
    with pytest.raises(UserError, match="missing: ddof"):
        Measurement.from_dict({k: v for k, v in A.as_dict().items() if k != "ddof"})


def test_text_names_everything():
    text = str(A)
    for word in ("FD-resnet56", "6", "5000", "0" * 16, "1" * 16, "edm", "ddof 1", "cifar10/train"):
        assert word in text
