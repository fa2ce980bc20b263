import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from common.errors import UserError
from common.nets.dropout import draw_masks, dropout, feed_masks

WEIGHT = torch.zeros(1)


@settings(deadline=None, max_examples=30)
@given(p=st.floats(0.01, 0.95), seed=st.integers(0, 999))
def test_a_drawn_mask_is_the_one_torch_would_draw(p, seed):
    x = torch.linspace(-2, 2, 4 * 3 * 5 * 5).reshape(4, 3, 5, 5)
    torch.manual_seed(seed)
    expected = F.dropout(x, p)
    torch.manual_seed(seed)
    (mask,) = draw_masks([(p, (3, 5, 5))], x, WEIGHT)
    torch.testing.assert_close(dropout(x, p, True, mask), expected, rtol=3e-7, atol=0)
    assert mask.dtype == torch.bool


def test_dropout_is_the_identity_in_evaluation_and_at_zero():
    x = torch.randn(2, 3)
    nothing = torch.zeros(2, 3, dtype=torch.bool)
    assert dropout(x, 0.5, False, nothing) is x
    assert dropout(x, 0.0, True, nothing) is x


def test_mask_scale_and_gradient():
    x = torch.randn(2, 6, dtype=torch.float64, requires_grad=True)
    mask = torch.tensor([[True, False, True, True, False, True]] * 2)
    y = dropout(x, 0.25, True, mask)
    torch.testing.assert_close(y.detach(), x.detach() * mask / 0.75)
    y.sum().backward()
    torch.testing.assert_close(x.grad, mask.double() / 0.75)


def test_a_generator_reproduces_masks_and_leaves_the_global_stream_alone():
    x = torch.zeros(5, 2, 4, 4)
    layers = [(0.3, (2, 4, 4)), (0.6, (7, 2, 2))]
    before = torch.get_rng_state()
    first = draw_masks(layers, x, WEIGHT, torch.Generator().manual_seed(7))
    again = draw_masks(layers, x, WEIGHT, torch.Generator().manual_seed(7))
    assert torch.equal(torch.get_rng_state(), before)
    assert [tuple(m.shape) for m in first] == [(5, 2, 4, 4), (5, 7, 2, 2)]
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))


def test_channels_last_changes_the_layout_of_masks_and_not_their_values():
    x = torch.zeros(2, 3, 4, 4)
    layers = [(0.5, (3, 4, 4)), (0.5, (1,))]
    plain = draw_masks(layers, x, WEIGHT, torch.Generator().manual_seed(0))
    last = draw_masks(layers, x.to(memory_format=torch.channels_last), WEIGHT, torch.Generator().manual_seed(0))
    assert last[0].is_contiguous(memory_format=torch.channels_last) and not last[0].is_contiguous()
    assert all(torch.equal(a, b) for a, b in zip(plain, last, strict=True))


def test_masks_that_do_not_fit_are_refused():
    mask = torch.ones(2, 3, dtype=torch.bool)
    with pytest.raises(UserError, match="holds 1 masks but this network has 2"):
        feed_masks([mask], 2, 2)
    with pytest.raises(UserError, match="2 samples but x holds 3"):
        feed_masks([mask], 1, 3)
    assert feed_masks(None, 4, 2) is None
