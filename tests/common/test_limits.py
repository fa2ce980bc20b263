import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from common import limits
from common.errors import UserError

NAN = float("nan")


@pytest.mark.parametrize(
    "bounds, inside, outside, allowed",
    [
        ({}, [-1, 0.5, math.inf], [NAN, "1", None, True], "a number"),
        ({"above": 0}, [1e-9, 3], [0, -1, NAN], "> 0"),
        ({"least": 0, "most": 1}, [0, 1, 0.5], [-1e-9, 1.1], ">= 0 and <= 1"),
        ({"least": 0, "below": 1}, [0, 0.999], [1, 2], ">= 0 and < 1"),
    ],
)
def test_numbers(bounds, inside, outside, allowed):
    for value in inside:
        assert limits.number("x.y", value, **bounds) is value
    for value in outside:
        with pytest.raises(UserError) as error:
            limits.number("x.y", value, **bounds)
        assert str(error.value) == f"x.y must be {allowed}, got {value!r}. Set x.y to a number in that range."


@pytest.mark.parametrize("p", [-0.1, 1, 1.5, NAN])
def test_probabilities(p):
    assert limits.probability("dropout", 0.0) == 0
    with pytest.raises(UserError, match=r"dropout must be >= 0 and < 1, got .*probability"):
        limits.probability("dropout", p)


@pytest.mark.parametrize("value", [0, -3, 1.0, True, "2", None])
def test_whole_numbers(value):
    with pytest.raises(UserError, match=r"n must be a whole number >= 1, got .* Set n=1 or more"):
        limits.whole("n", value, least=1)
    with pytest.raises(UserError, match=r"a\[1\] must be a whole number >= 1"):
        limits.positive(**{"a[0]": 1, "a[1]": value})
    with pytest.raises(UserError, match=r"n must be a whole number >= 1 and <= 4, got .*Set n to 1 \.\. 4"):
        limits.whole("n", value, least=1, most=4)


def test_hints_replace_the_advice():
    with pytest.raises(UserError, match=r"^rank must be a whole number >= 1, got 0\. The paper uses 64\.$"):
        limits.whole("rank", 0, least=1, hint="The paper uses 64.")


@given(value=st.integers(-50, 500), divisor=st.integers(1, 40))
def test_multiples(value, divisor):
    if value > 0 and value % divisor == 0:
        assert limits.multiple_of("width", value, divisor) == value
        return
    with pytest.raises(UserError, match=rf"width must be a multiple of {divisor} \(heads\), got {value}") as error:
        limits.multiple_of("width", value, divisor, "heads")
    proposed = int(str(error.value).rsplit("=", 1)[1].rstrip("."))
    assert proposed > 0 and proposed % divisor == 0 and (value < 1 or abs(proposed - value) <= divisor)


def test_choices_name_the_nearest():
    assert limits.choice("loss", "l2", ("l1", "l2")) == "l2"
    with pytest.raises(UserError, match=r"one of edm, uniform, got 'unifrm'\. Closest: uniform\. Set k=uniform"):
        limits.choice("k", "unifrm", ("edm", "uniform"))
    with pytest.raises(UserError, match=r"k must be one of 1, 3, got 2\. Set k=1\."):
        limits.choice("k", 2, (1, 3))


def test_noise_levels():
    limits.sigma_range(0.1, 2)
    for low, high, words in [(-1.0, 2, "negative sigma: low must be > 0, got -1.0"), (0, 2, "sigma: low must be > 0"),
                             (2, 2, "low must be below high"), (1, math.inf, "both finite")]:  # fmt: skip
        with pytest.raises(UserError, match=words):
            limits.sigma_range(low, high, ("low", "high"))
