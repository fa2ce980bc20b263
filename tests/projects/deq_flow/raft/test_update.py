"""The update block against its formulas written out, and what the equilibrium asks of it."""

import pytest
import torch
import torch.nn.functional as F

from common.deq.layers import apply_norm, reset
from projects.deq_flow.raft.correlation import AllPairs
from projects.deq_flow.raft.network import grid
from projects.deq_flow.raft.update import Aggregate, Attention, SepConvGRU, UpdateBlock

B, H, W = 3, 4, 6


def block(attention=False, all_grad=False):
    torch.manual_seed(0)
    return UpdateBlock(
        lookup=AllPairs(1, 1), lookup_channels=9, hidden_channels=5, context_channels=4, corr_channels=(6, 5),
        flow_channels=(4, 3), motion_channels=7, head_channels=8, attention=attention, all_grad=all_grad,
    )  # fmt: skip


def inputs(cell, attention=None):
    torch.manual_seed(1)
    origin = grid(B, H, W)
    context = torch.randn(B, 4, H, W)
    pyramid = cell.lookup.prepare(torch.randn(B, 8, H, W), torch.randn(B, 8, H, W))
    z = (torch.randn(B, 5, H, W), origin + torch.randn(B, 2, H, W))
    return z, (cell.gru.inject(context), pyramid, origin, () if attention is None else attention(context))


def test_the_recurrent_unit_is_its_formula():
    torch.manual_seed(0)
    gru = SepConvGRU(5, 4, 3)
    h, context, motion = (torch.randn(2, c, H, W) for c in (5, 4, 3))
    expected, x = h, torch.cat([context, motion], dim=1)
    for layer in (gru.rows, gru.columns):
        parts = [
            lambda v, w=w, b=b, p=layer.padding: F.conv2d(v, w, b, padding=p)
            for w, b in zip(layer.weight.chunk(3), layer.bias.chunk(3))
        ]
        z, r = (torch.sigmoid(parts[k](torch.cat([expected, x], dim=1))) for k in (0, 1))
        n = torch.tanh(parts[2](torch.cat([r * expected, x], dim=1)))
        expected = (1 - z) * expected + z * n
    torch.testing.assert_close(gru(h, motion, gru.inject(context)), expected)


def test_the_motion_features_end_with_the_flow_and_move_by_the_head():
    cell = block()
    (h, c), args = inputs(cell)
    features = cell.motion(cell.lookup(args[1], c), c - args[2])
    torch.testing.assert_close(features[:, -2:], c - args[2])
    assert features.shape[1] == 7 and (features[:, :-2] >= 0).all()
    new_h, new_c = cell((h, c), *args)
    torch.testing.assert_close(new_h, cell.gru(h, features, args[0]))
    torch.testing.assert_close(new_c, c + cell.head(new_h))


def test_attention_gathers_with_rows_that_sum_to_one_and_starts_without_effect():
    torch.manual_seed(0)
    attention, rows, gather = Attention(4), Attention(4, whole=False), Aggregate(7)
    rows.load_state_dict(attention.state_dict())
    context, motion = torch.randn(2, 4, H, W), torch.randn(2, 7, H, W)
    (weights,) = attention(context)
    torch.testing.assert_close(weights.sum(2), torch.ones(2, H * W))
    assert torch.equal(gather(motion, (weights,)), motion)
    with torch.no_grad():
        gather.scale.fill_(0.7)
    query, key = F.conv2d(context, attention.query_key.weight).flatten(2).chunk(2, dim=1)
    expected = torch.softmax(torch.einsum("bdi,bdj->bij", query, key) / 2, dim=2)
    value = gather.value(motion).flatten(2)
    expected = motion + 0.7 * torch.einsum("bij,bcj->bci", expected, value).view_as(motion)
    torch.testing.assert_close(gather(motion, (weights,)), expected)
    torch.testing.assert_close(gather(motion, rows(context)), expected)


@pytest.mark.parametrize("whole", [True, False])
def test_samples_do_not_see_each_other_and_any_rows_may_leave(whole):
    cell, attention = block(attention=True), Attention(4, whole=whole)
    with torch.no_grad():
        cell.gather.scale.fill_(0.5)
    z, args = inputs(cell, attention)
    some = torch.tensor([2, 0])
    take = lambda tree: torch.utils._pytree.tree_map(lambda t: t[some], tree)
    for whole_batch, part in zip(cell(z, *args), cell(take(z), *take(args)), strict=True):
        torch.testing.assert_close(whole_batch[some], part, rtol=1e-5, atol=1e-6)


def test_only_all_grad_lets_gradients_through_the_coordinates():
    for all_grad in (False, True):
        cell = block(all_grad=all_grad)
        (h, c), args = inputs(cell)
        h, c = h.requires_grad_(), c.requires_grad_()
        new_h, new_c = cell((h, c), *args)
        through_h, through_c = torch.autograd.grad(new_h.sum() + new_c.sum(), (h, c), allow_unused=True)
        assert through_h.abs().sum() > 0
        assert (through_c is not None and through_c.abs().sum() > 0) == all_grad


def test_a_normalisation_covers_every_convolution_and_keeps_the_function():
    cell = block(attention=True)
    attention = Attention(4)
    z, args = inputs(cell, attention)
    before = cell(z, *args)
    layers = apply_norm(cell, "weight")
    assert len(layers) == sum(isinstance(m, torch.nn.Conv2d) for m in cell.modules()) == 10
    # one length per gate and channel: the gates put together are normalised as each by itself
    assert cell.gru.rows.parametrizations.weight.original0.shape == (15, 1, 1, 1)
    reset(cell)
    for a, b in zip(before, cell(z, *args), strict=True):
        torch.testing.assert_close(a, b)


def test_compiles_into_one_graph():
    cell, attention = block(attention=True, all_grad=True), Attention(4)
    z, args = inputs(cell, attention)
    apply_norm(cell, "weight")
    reset(cell)
    plain = cell(z, *args)
    torch._dynamo.reset()
    compiled = torch.compile(cell, backend="aot_eager", fullgraph=True)(z, *args)
    for a, b in zip(plain, compiled, strict=True):
        torch.testing.assert_close(a, b)


def test_runs_in_mixed_precision_with_coordinates_in_full():
    cell = block()
    z, args = inputs(cell)
    plain = cell(z, *args)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        mixed = cell(z, *args)
    assert mixed[1].dtype == torch.float32
    torch.testing.assert_close(plain, mixed, rtol=0.05, atol=0.05, check_dtype=False)
