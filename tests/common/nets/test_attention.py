import pytest
import torch

from common.nets.attention import FUSED_FROM, attention, in_forward_mode, token_attention


def slow(q, k, v):
    out = torch.empty_like(v)
    for b in range(len(q)):
        for i in range(q.shape[2]):
            weights = torch.stack([(q[b, :, i] * k[b, :, j]).sum() for j in range(k.shape[2])])
            out[b, :, i] = v[b] @ (weights / q.shape[1] ** 0.5).softmax(0)
    return out


def qkv(*shape, dtype=torch.float32):
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(shape, generator=generator).to(dtype) * 2 for _ in range(3)]


@pytest.mark.parametrize("fused", [None, False, True])
def test_equals_the_definition(fused):
    q, k, v = qkv(3, 4, 6)
    torch.testing.assert_close(attention(q, k, v, fused=fused), slow(q, k, v), rtol=1e-5, atol=1e-6)


def test_both_ways_agree_in_value_and_gradient():
    grads = []
    for fused in (False, True):
        inputs = [t.requires_grad_() for t in qkv(2, 8, FUSED_FROM)]
        out = attention(*inputs, fused=fused)
        grads.append([out.detach(), *torch.autograd.grad(out.square().sum(), inputs)])
    for plain, other in zip(*grads, strict=True):
        assert (plain - other).abs().max() < 1e-5 * plain.abs().max()


def test_forward_mode_and_second_derivatives_match_finite_differences():
    q, k, v = qkv(1, 3, 5, dtype=torch.float64)
    out, tangent = torch.func.jvp(
        lambda t: attention(t * q, k, t * v), (torch.tensor(1.0).double(),), (q.new_ones(()),)
    )
    h = 1e-6
    numeric = (attention((1 + h) * q, k, (1 + h) * v) - attention((1 - h) * q, k, (1 - h) * v)) / (2 * h)
    torch.testing.assert_close(out, attention(q, k, v))
    torch.testing.assert_close(tangent, numeric, rtol=1e-6, atol=1e-8)
    inputs = [t.requires_grad_() for t in (q, k, v)]
    assert torch.autograd.gradgradcheck(lambda *t: attention(*t, fused=False), inputs)


def test_long_inputs_also_work_under_forward_mode():
    q, k, v = qkv(1, 2, FUSED_FROM)
    _, tangent = torch.func.jvp(lambda t: attention(q, k, t), (v,), (v,))
    torch.testing.assert_close(tangent, attention(q, k, v, fused=False), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_uses_a_float32_softmax(dtype):
    q, k, v = qkv(2, 16, 12, dtype=dtype)
    exact = attention(q.float(), k.float(), v.float())
    for fused in (False, True):
        out = attention(q, k, v, fused=fused)
        assert out.dtype == dtype
        # Rounding of the weights and the output only: a few units in the last place of values around 4.
        assert (out.float() - exact).abs().max() < 8 * 4 * torch.finfo(dtype).eps


def test_large_scores_stay_finite_in_float16():
    q = torch.full((1, 64, 4), 100.0, dtype=torch.float16)
    assert attention(q, q, q, fused=False).isfinite().all()


@pytest.mark.parametrize("fused", [None, False, True])
def test_tokens_attend_as_channels_do(fused):
    q, k, v = qkv(2 * 3, 4, 6)
    expected = attention(q, k, v).transpose(1, 2).reshape(2, 3, 6, 4)
    got = token_attention(*(t.transpose(1, 2).reshape(2, 3, 6, 4) for t in (q, k, v)), fused=fused)
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("length", [5, FUSED_FROM])
def test_tokens_have_a_tangent_at_any_length(length):
    q, k, v = qkv(1, 2, length, 3, dtype=torch.float64)
    seen = []

    def both(t):
        seen.append(in_forward_mode())
        return token_attention(t * q, k, t * v)

    out, tangent = torch.func.jvp(both, (torch.tensor(1.0).double(),), (q.new_ones(()),))
    h = 1e-6
    numeric = (token_attention((1 + h) * q, k, (1 + h) * v) - token_attention((1 - h) * q, k, (1 - h) * v)) / (2 * h)
    torch.testing.assert_close(out, token_attention(q, k, v))
    torch.testing.assert_close(tangent, numeric, rtol=1e-6, atol=1e-8)
    assert seen == [True] and not in_forward_mode()


@pytest.mark.parametrize("fused", [False, True])
def test_token_attention_keeps_half_precision(fused):
    q, k, v = qkv(2, 2, 12, 16, dtype=torch.bfloat16)
    exact = token_attention(q.float(), k.float(), v.float())
    out = token_attention(q, k, v, fused=fused)
    assert out.dtype == torch.bfloat16 and (out.float() - exact).abs().max() < 8 * 4 * torch.finfo(torch.bfloat16).eps
