import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from common.deq.dropout import (
    VariationalDropout,
    VariationalDropout1d,
    VariationalDropout2d,
    VariationalDropout3d,
    VariationalDropToken1d,
    VariationalDropToken2d,
    VariationalDropToken3d,
)
from common.deq.layers import reset
from common.errors import UserError

CHANNELS = (VariationalDropout1d, VariationalDropout2d, VariationalDropout3d)
TOKENS = (VariationalDropToken1d, VariationalDropToken2d, VariationalDropToken3d)
SIZES = (4, 5, 6)


def tokens_first(places):
    return (3, *SIZES[:places], 7)


@pytest.mark.parametrize("places", [1, 2, 3])
@pytest.mark.parametrize("first", [True, False])
def test_mask_shapes(places, first):
    tokens, channels = SIZES[:places], 7
    shape = (3, *tokens, channels) if first else (3, channels, *tokens)
    ones = (1,) * places
    x = torch.randn(shape)
    drop = CHANNELS[places - 1](0.5, token_first=first)
    assert drop.mask_for(x).shape == ((3, *ones, channels) if first else (3, channels, *ones))
    drop = TOKENS[places - 1](0.5, token_first=first)
    assert drop.mask_for(x).shape == ((3, *tokens, 1) if first else (3, 1, *tokens))
    assert VariationalDropout(0.5).mask_for(x).shape == x.shape


@settings(deadline=None, max_examples=30)
@given(p=st.sampled_from([0.1, 0.25, 0.5, 0.9]), places=st.integers(1, 3), token=st.booleans(), first=st.booleans())
def test_values_are_zero_or_scaled_and_whole_groups_fall(p, places, token, first):
    torch.manual_seed(1)
    drop = (TOKENS if token else CHANNELS)[places - 1](p, token_first=first)
    x = torch.rand(tokens_first(places)) + 0.5
    y = drop(x)
    kept = y != 0
    torch.testing.assert_close(y[kept], x[kept] / (1 - p))
    channel = x.ndim - 1 if first else 1
    for axis in [axis for axis in range(1, x.ndim) if (axis == channel) == token]:
        assert (kept == kept.select(axis, 0).unsqueeze(axis)).all()


def test_the_fraction_is_right():
    drop = VariationalDropout(0.3)
    mask = drop.mask_for(torch.empty(200, 500))
    assert abs((mask == 0).float().mean() - 0.3) < 5 * (0.21 / 1e5) ** 0.5
    assert abs(mask.mean() - 1) < 0.01


def test_one_mask_until_reset():
    drop = VariationalDropout(0.5)
    x = torch.ones(4, 100)
    first = drop(x)
    assert all(torch.equal(drop(x), first) for _ in range(3))
    assert not torch.equal(first[0], first[1])  # every sample its own
    reset(drop)
    assert not torch.equal(drop(x), first)


def test_masks_come_from_the_global_generator():
    x = torch.ones(4, 10)
    drop = VariationalDropout(0.5)
    torch.manual_seed(3)
    first = drop(x)
    reset(drop)
    torch.manual_seed(3)
    assert torch.equal(drop(x), first)


def test_rows_follow_their_samples():
    drop = VariationalDropout(0.5)
    x = torch.randn(6, 20)
    mask = drop.mask_for(x)
    whole = drop(x, mask)
    rows = torch.tensor([4, 1])
    assert torch.equal(drop(x[rows], mask[rows]), whole[rows])
    assert drop.mask is None  # a mask that is given is not kept


def test_fewer_rows_than_the_kept_mask_say_how_to_pass_it():
    drop = VariationalDropout(0.5)
    drop(torch.randn(6, 20))
    with pytest.raises(UserError, match=r"mask_for\(z0\).*args"):
        drop(torch.randn(2, 20))
    with pytest.raises(UserError, match="reset"):
        drop(torch.randn(7, 20))
    with pytest.raises(UserError, match="Select the same rows"):
        drop(torch.randn(7, 20), torch.ones(6, 20))


def test_evaluation_and_zero_are_the_identity():
    x = torch.randn(2, 5)
    drop = VariationalDropout(0.5).eval()
    assert drop(x) is x and drop(x, torch.zeros(2, 5)) is x
    assert torch.equal(drop.mask_for(x), torch.ones(2, 5))
    assert VariationalDropout(0.0)(x) is x
    assert torch.equal(VariationalDropout(1.0)(x), torch.zeros(2, 5))


def test_dtype_and_layout_follow_the_input():
    x = torch.randn(2, 3, 4, 4).to(memory_format=torch.channels_last)
    drop = VariationalDropout(0.5)
    torch.manual_seed(0)
    mask = drop.mask_for(x)
    assert mask.is_contiguous(memory_format=torch.channels_last)
    torch.manual_seed(0)
    assert torch.equal(mask, drop.mask_for(x.contiguous()))  # the layout does not change the values
    assert drop.mask_for(x.bfloat16()).dtype == torch.bfloat16
    y = drop(x)
    low = drop(x.bfloat16())  # the kept mask serves another dtype
    assert low.dtype == torch.bfloat16 and torch.equal(low == 0, y == 0)
    assert drop.mask_for(x.to("meta")).device.type == "meta"


def test_masks_are_no_state():
    net = nn.Sequential(nn.Linear(3, 3), VariationalDropout(0.5))
    net(torch.randn(2, 3))
    assert set(net.state_dict()) == {"0.weight", "0.bias"} and not list(net.buffers())
    twin = copy.deepcopy(net)
    assert torch.equal(twin[1].mask, net[1].mask) and twin[1].mask is not net[1].mask


def test_gradients_go_through_what_stays():
    drop = VariationalDropout(0.5)
    x = torch.randn(3, 8, dtype=torch.float64, requires_grad=True)
    mask = drop.mask_for(x)
    drop(x, mask).sum().backward()
    assert torch.equal(x.grad, mask)
    assert torch.autograd.gradcheck(drop, (x,))  # draws once, then keeps


def test_compiled():
    drop = VariationalDropout(0.5)
    run = torch.compile(drop, backend="aot_eager", fullgraph=True)
    x = torch.ones(4, 30)
    first = run(x)
    assert torch.equal(run(x), first) and 0 < (first == 0).float().mean() < 1
    mask = drop.mask_for(x)
    assert torch.equal(run(x[1:], mask[1:]), mask[1:])


def test_a_mask_drawn_inside_a_jvp_stays():
    drop = VariationalDropout(0.5)
    x = torch.ones(3, 20)
    y, tangent = torch.func.jvp(drop, (x,), (x,))
    assert torch.equal(drop(x), y) and torch.equal(tangent, y) and 0 < (y == 0).sum() < 60
    reset(drop)
    grad = torch.func.grad(lambda x: torch.func.jvp(drop, (x,), (x,))[1].sum())(x)
    assert torch.equal(drop.mask, grad)


def test_an_empty_batch():
    assert VariationalDropout1d(0.5)(torch.empty(0, 3, 4)).shape == (0, 3, 4)


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda: VariationalDropout(1.5), "dropout must be between 0 and 1"),
        (lambda: VariationalDropout2d(-0.1), "dropout must be between 0 and 1"),
        (lambda: VariationalDropout2d(0.1)(torch.randn(2, 3, 4)), "takes 4 axes"),
    ],
)
def test_bad_input(call, message):
    with pytest.raises(UserError, match=message):
        call()
