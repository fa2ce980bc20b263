import math

import pytest
import torch

from common.errors import UserError
from common.nets import transformer
from common.nets.transformer import (
    BottleneckPatchEmbedding,
    GatedBlock,
    PatchEmbedding,
    RMSNorm,
    ScalarEmbedding,
    class_index,
    per_sample,
    rope_grid,
    rope_line,
    rotate,
    run_block,
    sincos_positions,
    unpatchify,
)


def randn(*shape, dtype=torch.float32):
    return torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(dtype)


def test_unpatchify_undoes_the_cut_into_patches():
    image = randn(2, 3, 8, 8)
    cut = image.unfold(2, 4, 4).unfold(3, 4, 4)  # B, C, rows, columns, p, p
    tokens = cut.permute(0, 2, 3, 4, 5, 1).reshape(2, 4, 4 * 4 * 3)
    assert torch.equal(unpatchify(tokens, 3), image)


@pytest.mark.parametrize("bottleneck", [None, 5])
def test_patch_embeddings_see_each_patch_alone_row_by_row(bottleneck):
    sizes = dict(in_channels=3, patch_size=4, width=6)
    layer = BottleneckPatchEmbedding(bottleneck=5, **sizes) if bottleneck else PatchEmbedding(**sizes)
    image = randn(1, 3, 8, 8)
    tokens = layer(image)
    assert tokens.shape == (1, 4, 6)
    image[:, :, :4, 4:] += 1  # the second patch of the first row
    changed = (layer(image) != tokens).any(dim=2)[0]
    assert changed.tolist() == [False, True, False, False]


def test_sincos_positions_follow_the_formula():
    width, side = 12, 3
    got = sincos_positions(width, side)
    for row in range(side):
        for column in range(side):
            expected = []
            for place in (column, row):
                angles = [place / 10000 ** (i / 3) for i in range(3)]
                expected += [math.sin(a) for a in angles] + [math.cos(a) for a in angles]
            torch.testing.assert_close(got[row * side + column], torch.tensor(expected))


def test_rotation_keeps_lengths_and_depends_on_distance_only():
    angles = rope_line(8, 12)
    rope = angles.cos(), angles.sin()
    q, k = randn(1, 8).expand(12, 8), randn(2, 8)[1:].expand(12, 8)
    turned_q, turned_k = rotate(q, rope), rotate(k, rope)
    torch.testing.assert_close(turned_q.norm(dim=1), q.norm(dim=1))
    products = turned_q @ turned_k.T
    for distance in range(-5, 6):
        line = products.diagonal(distance)
        torch.testing.assert_close(line, line[:1].expand_as(line), rtol=1e-4, atol=1e-5)
    assert products[0, 0] - products[0, 5] != 0
    assert torch.equal(turned_q[0], q[0])


def test_rotation_is_that_of_complex_numbers():
    x, angles = randn(2, 5, 8), rope_line(8, 5)
    expected = torch.view_as_real(torch.view_as_complex(x.view(2, 5, 4, 2)) * torch.polar(torch.ones(5, 4), angles))
    torch.testing.assert_close(rotate(x, (angles.cos(), angles.sin())), expected.flatten(2))


def test_the_compiled_rotation_is_the_same():
    x, angles = randn(2, 5, 8), rope_line(8, 5)
    rope = angles.cos(), angles.sin()
    compiled = torch.compile(rotate, backend="aot_eager", fullgraph=True)(x, rope)
    torch.testing.assert_close(compiled, rotate(x, rope))
    assert rotate(x.bfloat16(), rope).dtype == torch.float32


def test_gradients_and_tangents_pass_through_the_rotation():
    x, angles = randn(2, 5, 8, dtype=torch.float64).requires_grad_(), rope_line(8, 5).double()
    rope = angles.cos(), angles.sin()
    assert torch.autograd.gradcheck(lambda x: rotate(x, rope), x, check_forward_ad=True)


def test_grid_angles_leave_the_prefix_alone_and_split_rows_from_columns():
    angles = rope_grid(8, 3, prefix=2)
    assert angles.shape == (11, 4) and not angles[:2].any()
    grid = angles[2:].view(3, 3, 4)
    frequencies = torch.tensor([1.0, 0.01])
    for place in range(3):
        torch.testing.assert_close(grid[place, :, :2], (place * frequencies).expand(3, 2))
        torch.testing.assert_close(grid[:, place, 2:], (place * frequencies).expand(3, 2))


def test_scalar_embedding_starts_from_the_sinusoids():
    layer = ScalarEmbedding(width=4, frequencies=6)
    seen = []
    layer.mlp[0].register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    layer(torch.tensor([0.0, 0.5]))
    angles = [0.5 * 10000 ** (-i / 3) for i in range(3)]
    expected = [[1.0] * 3 + [0.0] * 3, [math.cos(a) for a in angles] + [math.sin(a) for a in angles]]
    torch.testing.assert_close(seen[0], torch.tensor(expected))


def test_rms_norm_has_unit_mean_square_in_any_precision():
    layer = RMSNorm(64)
    x = 7 * randn(3, 64) + 1
    assert torch.allclose(layer(x).square().mean(dim=1), torch.ones(3), atol=1e-5)
    half = (300 * x).half()  # squares overflow float16
    assert layer(half).dtype == torch.float16
    assert torch.allclose(layer(half).float(), layer(x), atol=2e-3)


def test_a_fresh_gated_block_is_the_identity():
    block = GatedBlock(width=8, num_heads=2, hidden=12, gain=0.32)
    x, angles = randn(2, 5, 8), rope_line(4, 5)
    assert torch.equal(block(x, (angles.cos(), angles.sin())), x)


def test_recomputing_changes_no_gradient_and_gives_way_to_forward_mode(monkeypatch):
    block = GatedBlock(width=8, num_heads=2, hidden=12, gain=1.0)
    torch.nn.init.ones_(block.attn_scale)
    torch.nn.init.ones_(block.mlp_scale)
    x, angles = randn(2, 5, 8), rope_line(4, 5)
    rope = angles.cos(), angles.sin()
    grads = []
    for recompute in (False, True):
        out = run_block(block, x, rope, recompute=recompute)
        grads.append(torch.autograd.grad(out.square().sum(), list(block.parameters())))
    assert all(torch.equal(a, b) for a, b in zip(*grads))
    monkeypatch.setattr(transformer, "checkpoint", lambda *_, **__: pytest.fail("recomputes without tangents"))
    torch.func.jvp(lambda x: run_block(block, x, rope, recompute=True), (x,), (x,))
    with torch.no_grad():
        run_block(block, x, rope, recompute=True)


# Conditions -----------------------------------------------------------------------------------------------------------


def test_per_sample_takes_numbers_scalars_and_columns():
    z = randn(3, 1, 2, 2)
    for value in (0.5, torch.tensor(0.5), torch.full((3, 1, 1, 1), 0.5), torch.tensor([0.5])):
        assert torch.equal(per_sample("t", value, z), torch.full((3,), 0.5))
    assert per_sample("t", 0.5, z.double()).dtype == torch.float64
    assert per_sample("t", 0.5, z.half()).dtype == torch.float32
    with pytest.raises(UserError, match=r"t must hold one value or one per sample \(3\), got shape \(2,\)"):
        per_sample("t", torch.zeros(2), z)


def test_class_index_takes_numbers_one_hot_rows_and_nothing():
    z = randn(3, 1)
    hot = torch.eye(4)[[2, 0, 1]]
    hot[1] = 0  # no class
    assert class_index(hot, 4, z).tolist() == [2, 4, 1]
    assert class_index(hot.long(), 4, z).tolist() == [2, 4, 1]
    assert class_index(torch.tensor([3, 4, 0]), 4, z).tolist() == [3, 4, 0]
    assert class_index(torch.tensor([3]), 4, z).tolist() == [3, 3, 3]
    assert class_index(hot[:1], 4, z).tolist() == [2, 2, 2]
    assert class_index(None, 4, z).tolist() == [4, 4, 4]


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        (torch.zeros(3, 5), "3 whole numbers or one-hot"),
        (torch.zeros(3), "3 whole numbers or one-hot"),
        (torch.zeros(2, dtype=torch.int64), "3 whole numbers or one-hot"),
        (torch.tensor([0, 1, 5]), "must lie in 0..3, or be 4 for no class, got 5"),
        (torch.tensor([0, -1, 3]), "must lie in 0..3, or be 4 for no class, got -1"),
    ],
)
def test_labels_that_do_not_fit_are_named(labels, message):
    with pytest.raises(UserError, match=message):
        class_index(labels, 4, randn(3, 1))
