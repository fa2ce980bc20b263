import pytest
import torch

from common.errors import UserError
from common.nets.mit import PREFIX, MiT

TINY = dict(img_resolution=8, in_channels=3, width=32, depth=3, num_heads=4, head_depth=2, v_depth=1, label_dim=4)


def shaken(make=MiT, **changes):
    torch.manual_seed(0)
    net = make(**dict(TINY, **changes))
    with torch.no_grad():
        for p in net.parameters():
            p.add_(0.2 * torch.randn_like(p))
    return net


def inputs():
    z = torch.randn(3, 3, 8, 8, generator=torch.Generator().manual_seed(1))
    t, r, labels = torch.tensor([0.9, 0.5, 0.7]), torch.tensor([0.1, 0.5, 0.6]), torch.tensor([0, 3, 4])
    guidance = torch.tensor([1.0, 2.5, 7.0]), torch.tensor([0.0, 0.2, 0.4]), torch.tensor([1.0, 0.9, 0.6])
    return z, t, r, labels, *guidance


def test_a_fresh_network_returns_zero_and_its_trunk_the_embeddings():
    net = MiT(**TINY)
    u, v = net(*inputs(), heads="both")
    assert not u.any() and not v.any()
    z = inputs()[0]
    assert torch.equal(net.trunk(*inputs())[:, net.prefix_length :], net.x_embedder(z))


def test_twenty_tokens_stand_before_the_image():
    net = MiT(**TINY)
    assert sum(PREFIX.values()) == net.prefix_length == 20
    assert net.trunk(*inputs()).shape == (3, 20 + 16, 32)
    assert MiT(**dict(TINY, label_dim=0)).prefix_length == 12


def test_the_prefix_is_learned_tokens_plus_embeddings_in_the_official_order():
    net = shaken()
    z, t, r, labels, omega, low, high = inputs()
    empty = shaken(depth=2, head_depth=2)  # nothing between the embeddings and the heads
    empty.load_state_dict(net.state_dict(), strict=False)
    expected = [
        empty.class_tokens + empty.y_embedder(labels)[:, None],
        empty.omega_tokens + empty.omega_embedder(1 - 1 / omega)[:, None],
        empty.t_min_tokens + empty.cfg_t_start_embedder(low)[:, None],
        empty.t_max_tokens + empty.cfg_t_end_embedder(high)[:, None],
        empty.time_tokens + empty.h_embedder(t - r)[:, None],
        empty.x_embedder(z),
    ]
    torch.testing.assert_close(empty.trunk(*inputs()), torch.cat(expected, dim=1))


def test_every_condition_is_heard():
    net = shaken()
    base = net(*inputs())
    for place, change in ((1, 0.01), (2, -0.01), (4, 0.5), (5, 0.01), (6, -0.01)):
        args = list(inputs())
        args[place] = args[place] + change
        assert ((net(*args) - base).abs().flatten(1).amax(dim=1) > 1e-5).all()


def test_the_network_hears_the_gap_alone():
    net = shaken()
    z, t, r, *rest = inputs()
    torch.testing.assert_close(net(z, t + 0.05, r + 0.05, *rest), net(z, t, r, *rest), rtol=1e-4, atol=1e-5)


def test_numbers_stand_for_every_sample_and_defaults_for_no_guidance():
    net = shaken()
    z, t, r, labels, *_ = inputs()
    ones = torch.ones(3)
    assert torch.equal(net(z, t, r, labels), net(z, t, r, labels, ones, 0 * ones, ones))
    assert torch.equal(net(z, t, r, labels, 2.0, 0.1, 0.9), net(z, t, r, labels, 2 * ones, 0.1 * ones, 0.9 * ones))


def test_a_head_alone_is_what_both_give_and_leaves_the_other_out():
    net = shaken()
    u, v = net(*inputs(), heads="both")
    calls = []
    net.u_final_layer.register_forward_hook(lambda *_: calls.append("u"))
    net.v_final_layer.register_forward_hook(lambda *_: calls.append("v"))
    assert torch.equal(net(*inputs(), heads="u"), u) and torch.equal(net(*inputs()), u)
    assert torch.equal(net(*inputs(), heads="v"), v)
    assert calls == ["u", "u", "v"]
    assert not torch.equal(u, v)
    z, t, *_ = inputs()
    tokens = net.trunk(*inputs())
    assert torch.equal(net.head("u", tokens, z, t), u) and torch.equal(net.head("v", tokens, z, t), v)


def test_the_v_head_is_optional():
    net = shaken(v_depth=None)
    assert not any(name.startswith("v_") for name in net.state_dict())
    assert torch.equal(net(*inputs()), net(*inputs(), heads="u"))


def test_losses_of_both_heads_reach_every_parameter():
    net = shaken()
    u, v = net(*inputs(), heads="both")
    (u.square().sum() + v.square().sum()).backward()
    assert all(p.grad is not None and p.grad.any() for p in net.parameters())


def test_recomputing_changes_no_gradient():
    nets = [shaken(), shaken(recompute=True)]
    grads = [torch.autograd.grad(net(*inputs(), heads="v").sum(), net.shared_blocks.parameters()) for net in nets]
    assert all(torch.equal(a, b) for a, b in zip(*grads))


def test_initial_weights_have_the_papers_spread():
    torch.manual_seed(0)
    net = MiT(**dict(TINY, width=256, num_heads=4, label_dim=1000))
    block = net.shared_blocks[0]
    assert abs(block.attn.q_proj.weight.std() / (0.32 / 16) - 1) < 0.02
    assert abs(block.mlp.w2.weight.std() / (0.32 / 682**0.5) - 1) < 0.02
    assert abs(net.y_embedder.embedding_table.weight.std() * 16 - 1) < 0.02
    assert abs(net.h_embedder.mlp[2].weight.std() * 16 - 1) < 0.02
    assert abs(net.class_tokens.std() * 16 - 1) < 0.1
    assert block.mlp.w1.weight.shape == (682, 256)  # int(256 * 8 / 3)
    assert MiT(**dict(TINY, width=256, mlp_multiple=8)).shared_blocks[0].mlp.w1.weight.shape == (688, 256)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: MiT(**TINY)(*inputs()[:4], 0.5, 0.0, 1.0), "omega must be >= 1"),
        (lambda: MiT(**TINY)(*inputs()[:4], 2.0, 0.6, 0.4), "t_min <= t_max"),
        (lambda: MiT(**TINY)(*inputs()[:4], 2.0, -0.1, 1.0), "t_min"),
        (lambda: MiT(**TINY)(*inputs(), heads="w"), "heads must be one of u, v, both"),
        (lambda: MiT(**dict(TINY, v_depth=None))(*inputs(), heads="v"), "no v-head"),
        (lambda: MiT(**dict(TINY, head_depth=4)), r"head_depth must be a whole number >= 0 and <= 3"),
        (lambda: MiT(**dict(TINY, width=20)), "heads of a multiple of 2"),
    ],
)
def test_bad_requests_are_named(call, message):
    with pytest.raises(UserError, match=message):
        call()
