import torch

from common.torchdeq.initial import mixed_init, normal, zeros


def test_mixed_init_is_half_zero_and_half_normal():
    torch.manual_seed(0)
    z = mixed_init((200, 500))
    kept = z[z != 0]
    assert abs(kept.numel() / z.numel() - 0.5) < 0.01
    assert abs(kept.mean()) < 0.02 and abs(kept.std() - 1) < 0.02


def test_draws_are_reproducible_and_typed():
    for start in (normal, mixed_init):
        a = start((3, 4), generator=torch.Generator().manual_seed(1))
        assert torch.equal(a, start((3, 4), generator=torch.Generator().manual_seed(1)))
        assert start((3, 4), dtype=torch.float64).dtype == torch.float64
        assert start((3, 4), device="meta").device.type == "meta"
        torch.manual_seed(5)
        first = start((3, 4))
        torch.manual_seed(5)
        assert torch.equal(first, start((3, 4)))
    assert abs(normal((1000, 100), std=3.0).std() - 3) < 0.05


def test_zeros():
    z = zeros((2, 3), dtype=torch.bfloat16)
    assert z.shape == (2, 3) and z.dtype == torch.bfloat16 and not z.any()
