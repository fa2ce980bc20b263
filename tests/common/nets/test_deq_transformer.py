"""common/nets/deq_transformer.py: the zoo's numbers, causality, memory, size, and every path a solver needs."""

import json
from functools import partial

import pytest
import torch
from hydra import compose, initialize_config_dir
from torch import nn

from common.deq.grads import Implicit, Unrolled
from common.deq.layer import DEQ
from common.deq.layers import apply_norm, remove_norm, reset
from common.deq.solvers import Picard
from common.errors import UserError
from common.nets.deq_transformer import DEQTransformer, Memory, relative_shift

SMALL = dict(vocabulary=23, width=8, blocks=2, heads=2, head_width=4, inner=12, memory=4, dropout=0.0)
CLUSTERS = dict(cutoffs=(7, 15), divide=2)
WIKITEXT103 = dict(vocabulary=267_735, cutoffs=(20_000, 40_000, 200_000), divide=4)


def unrolled(steps=3, **options):
    never = Picard(max_iter=steps, stop="never")
    return DEQ(solver=Picard(max_iter=0), grad=Unrolled(steps=steps, tau=1.0, **options), eval_solver=never)


def made(deq=None, std=0.3, **options):
    torch.manual_seed(0)
    return DEQTransformer(deq=deq or unrolled(), std=std, **(SMALL | options))


def tokens(batch=2, length=6, seed=1):
    return torch.randint(0, 23, (batch, length), generator=torch.Generator().manual_seed(seed))


def test_golden_numbers_of_the_zoo(repo):
    """Recorded by running TorchDEQ's deq-zoo/deq-lm as it is on weights from this formula: three segments."""
    golden = json.loads((repo / "tests/fixtures/nets/deq_lm_zoo.json").read_text())
    net = made(**CLUSTERS).train()
    with torch.no_grad():
        for number, (name, p) in enumerate(net.named_parameters()):
            values = torch.sin(torch.arange(p.numel(), dtype=torch.float64) * 0.7 + number) * 0.3
            p.copy_(values.reshape(p.shape).float() + (1.0 if name.endswith("norm.weight") else 0.0))
    words = (torch.arange(20).reshape(2, 10) * 7) % 23
    torch.testing.assert_close(net.vocabulary.embed(words[:, :3]), torch.tensor(golden["embedding"]))
    memory = None
    for number, expected in enumerate(golden["segments"]):
        segment = net.segment(words[:, 3 * number : 3 * number + 3], memory)
        memory = segment.memory
        nll = net.nll(segment.hidden[-1], words[:, 3 * number + 1 : 3 * number + 4])
        torch.testing.assert_close(nll, torch.tensor(expected["nll"]), rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(memory.states[:, -1], torch.tensor(expected["state"]), rtol=1e-5, atol=1e-5)


def test_published_size():
    """97,673,888 weights (TorchDEQ's deq-lm, counted there); weight normalisation adds a gain per output row."""
    normed = partial(apply_norm, kind="weight")
    seq = dict(blocks=1, inner=48_000, norm_order="post", head_norm=False, affine=False)
    with torch.device("meta"):
        count = lambda **o: sum(p.numel() for p in DEQTransformer(deq=nn.Identity(), **WIKITEXT103, **o).parameters())
        assert count() == count(norm_order="post") == 97_673_888
        assert count(norm=normed) == 97_673_888 + 3 * (2100 + 700 + 700 + 14800 + 700)
        assert count(**seq) == 97_799_288


@pytest.mark.parametrize("order", ["pre", "post"])
@pytest.mark.parametrize("filled", [0, 4])
def test_changing_a_token_changes_nothing_before_it(order, filled):
    net = made(norm_order=order, **CLUSTERS).eval()
    memory = net.segment(tokens(seed=2)).memory if filled else None
    first = tokens()
    base = net(first, memory)
    for place in range(6):
        other = first.clone()
        other[:, place] = (other[:, place] + 1) % 23
        changed = (net(other, memory) - base).abs().amax(dim=(0, 2)) > 1e-6
        assert not changed[:place].any() and changed[place:].all()


def test_memory_reaches_and_positions_count():
    net = made().eval()
    memory = net.segment(tokens(seed=2)).memory
    assert memory.states.shape == (2, 4, 8) and memory.injections.shape == (2, 4, 16)
    assert not memory.states.requires_grad and not memory.injections.requires_grad
    with_memory, without = net(tokens(), memory), net(tokens())
    assert ((with_memory - without).abs().amax(-1) > 1e-5).all()
    flipped = Memory(memory.states.flip(1), memory.injections.flip(1))
    assert ((net(tokens(), flipped) - with_memory).abs().amax(-1) > 1e-6).all()


@pytest.mark.parametrize("order", ["pre", "post"])
def test_a_remembered_state_counts_like_one_in_the_segment(order):
    """One block: f at later positions is the same whether earlier states are in the segment or in the memory."""
    net = made(blocks=1, norm_order=order).eval()
    z, u = torch.randn(2, 8, 8), torch.randn(2, 8, 24)
    places, causal = net.positions(8), torch.ones(8, 8, dtype=torch.bool).tril()
    run = lambda z, u, past, causal: net.cell(z, u, past, net.cell.masks(z, 8), places, causal)
    whole = run(z, u, net.cell.past(net.blank_memory(2, 0)), causal)
    inward = u[:, :5].unflatten(-1, (2, 3, 4))[..., 1:, :].flatten(-3)
    later = run(z[:, 5:], u[:, 5:], net.cell.past(Memory(z[:, :5], inward)), causal[5:])
    torch.testing.assert_close(later, whole[:, 5:])


def test_memory_lengths_of_training_and_evaluation():
    net = made(memory=4, eval_memory=9)
    kept = lambda: net.segment(tokens(), net.segment(tokens()).memory).memory.states.shape[1]
    assert net.train() and kept() == 4
    assert net.eval() and kept() == 9
    assert made(memory=0).segment(tokens()).memory.states.shape == (2, 0, 8)


def test_relative_shift_is_the_slow_definition():
    scores = torch.randn(2, 3, 4, 7)
    shifted = relative_shift(scores)
    for row in range(4):
        for key in range(row + 4):  # keys a query may see: memory of 3, itself and those before
            torch.testing.assert_close(shifted[..., row, key], scores[..., row, key + 3 - row])


@pytest.mark.parametrize("attention_dropout", [0.0, 0.3])
def test_recomputation_changes_nothing(attention_dropout):
    found = []
    for recompute in (False, True):
        net = made(unrolled(recompute=recompute), dropout=0.3, attention_dropout=attention_dropout,
                   norm=partial(apply_norm, kind="weight"), **CLUSTERS).train()  # fmt: skip
        memory = net.blank_memory(2)
        torch.manual_seed(3)
        reset(net)
        net.nll(net(tokens(), memory), tokens(seed=5)).mean().backward()
        found.append({name: p.grad for name, p in net.named_parameters()})
    assert all(g is not None for g in found[0].values())
    for name, grad in found[0].items():
        torch.testing.assert_close(found[1][name], grad, msg=lambda text, name=name: f"{name}: {text}")


def test_dropout_masks_stay_for_the_solve_and_change_between():
    net = made(dropout=0.5, attention_dropout=0.2).train()
    reset(net)
    first = net(tokens())
    reset(net)
    assert not net(tokens()).equal(first)
    net.eval()
    assert net(tokens()).equal(net(tokens()))


def test_rows_may_leave_the_batch_with_their_masks():
    """Converged rows are taken out in training too; each row's result is that of the row alone."""
    solver = Picard(max_iter=60, tol=1e-5)
    net = made(DEQ(solver=solver, grad=Unrolled(steps=1, tau=1.0)), norm_order="post", std=0.2, dropout=0.2).train()
    seen = []
    cell = net.cell.forward
    net.cell.forward = lambda z, *rest: seen.append(len(z)) or cell(z, *rest)
    words = tokens(batch=12)
    words[:6] = 0  # easier rows
    reset(net)
    net(words)
    assert min(seen) < 12


def test_weight_norm_leaves_the_function_and_implicit_gradients_flow():
    net = made(DEQ(solver=Picard(max_iter=80, tol=1e-6), grad=Implicit()), norm_order="post", std=0.1).eval()
    before = net(tokens())
    apply_norm(net.cell, kind="weight")
    torch.testing.assert_close(net(tokens()), before)
    net.train()
    reset(net)
    net.nll(net(tokens(), net.blank_memory(2)), tokens()).mean().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in net.parameters())
    remove_norm(net.cell)
    torch.testing.assert_close(net.eval()(tokens()), before)


def test_bfloat16_autocast_keeps_a_float32_state():
    net = made().eval()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        segment = net.segment(tokens())
    assert segment.memory.states.dtype == torch.float32
    torch.testing.assert_close(segment.memory.states, net.segment(tokens()).memory.states, rtol=0.1, atol=0.1)


@pytest.mark.parametrize(
    "options, text",
    [
        (dict(width=7), "width must be a multiple of 2"),
        (dict(norm_order="psot"), "norm_order must be one of pre, post"),
        (dict(blocks=0), "blocks must be"),
        (dict(memory=-1), "memory must be a whole number >= 0"),
        (dict(eval_memory=-1), "eval_memory must be a whole number >= 0"),
        (dict(dropout=1.5), "dropout must be between"),
        (dict(cell_start="zero"), "cell_start must be one of normal, torch"),
    ],
)
def test_refusals(options, text):
    with pytest.raises(UserError, match=text):
        made(**options)


def test_the_cell_of_deq_seq_keeps_torchs_start():
    """Its authors normalise f before they initialise the network: N(0, .01) reaches the rest, and f's biases alone."""
    small = made(std=0.01, inner=400, width=64, norm=apply_norm)
    plain = made(std=0.01, inner=400, width=64, norm=apply_norm, cell_start="torch")
    for net, uniform in ((small, False), (plain, True)):
        layers = [layer for layer in net.cell.modules() if isinstance(layer, nn.Linear)]
        assert layers
        for layer in layers:
            spread = layer.weight.std().item()
            assert spread == pytest.approx((3 * layer.in_features) ** -0.5 if uniform else 0.01, rel=0.1)
            assert layer.bias is None or not layer.bias.any()
        assert net.injection.weight.std().item() == pytest.approx(0.01, rel=0.1)


def test_published_starts(repo):
    with initialize_config_dir(str(repo / "conf"), version_base="1.3"):
        starts = {name: compose("config", [f"+experiment=torchdeq_{name}"]).project.net.cell_start
                  for name in ("lm_wikitext103", "seq_wikitext103")}  # fmt: skip
    assert starts == {"lm_wikitext103": "normal", "seq_wikitext103": "torch"}
