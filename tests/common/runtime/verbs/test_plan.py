"""What a run would cost, without allocating it."""

from contextlib import nullcontext

import pytest
import torch
from hydra.utils import instantiate
from torch._subclasses.fake_tensor import FakeTensorMode

from common.errors import UserError
from common.runtime.verbs.plan import (
    fake_training_step,
    flop_counter,
    make_plan,
    micro_batch,
    optimizer_bytes_per_element,
    plan_task,
    world_size,
)

ADAM = 8  # bytes per parameter: two float32 moments


@pytest.fixture
def plan_of(composed, tmp_path):
    return lambda *words, **kw: make_plan(composed(tmp_path / "run", *words, **kw))


def test_the_numbers_of_a_small_run(plan_of, composed, tmp_path):
    plan = plan_of("trainer.max_steps=50")
    real = instantiate(composed(tmp_path / "run").project, _convert_="all")
    count = sum(p.numel() for p in real.net.raw.parameters())
    assert plan.parameters == plan.trainable == count
    assert plan.optimizer_bytes == ADAM * count
    assert plan.gradient_bytes == plan.average_bytes == 4 * count
    assert plan.weight_bytes >= 4 * count and plan.activation_bytes > 0
    assert (plan.steps, plan.images, plan.micro_batch, plan.world_size) == (50, 50 * 64, 64, 1)
    assert plan.total_bytes == sum((plan.weight_bytes, plan.gradient_bytes, plan.optimizer_bytes, plan.average_bytes,
                                    plan.activation_bytes))  # fmt: skip


def test_flops_are_those_of_the_matrix_products(plan_of, composed, tmp_path):
    """A layer of n x m costs 2 n m per image forward, as much for its weights backward and again for its input."""
    real = instantiate(composed(tmp_path / "run").project, _convert_="all")
    entries = sum(p.numel() for p in real.net.raw.parameters() if p.dim() == 2)
    assert 4 * 64 * entries <= plan_of().flops_per_step <= 6 * 64 * entries
    assert plan_of("data.batch_size=128").flops_per_step == 2 * plan_of("data.batch_size=64").flops_per_step


def test_averages_and_activations_scale(plan_of):
    one, several = plan_of(), plan_of("+ema.profiles.other={_target_: common.diffusion.ema.ConstantDecay, decay: 0.5}")
    assert several.average_bytes == 2 * one.average_bytes
    assert plan_of("trainer.accumulate_grad_batches=2").activation_bytes < one.activation_bytes
    assert plan_of("trainer.accumulate_grad_batches=2").flops_per_step == one.flops_per_step


def test_half_precision_keeps_fewer_activation_bytes(plan_of):
    assert plan_of("trainer.precision=bf16-mixed").activation_bytes < plan_of().activation_bytes


def test_fsdp_divides_what_it_shards(plan_of):
    """Four processes: a quarter of the weights, gradients and optimiser state, the local batch's activations."""
    alone = plan_of()
    for trainer, shard in (("ddp", 1), ("fsdp", 4)):
        plan = plan_of(f"trainer={trainer}", "trainer.devices=4")
        assert (plan.world_size, plan.micro_batch) == (4, 16)
        for part in ("weight_bytes", "gradient_bytes", "optimizer_bytes"):
            assert getattr(plan, part) == getattr(alone, part) // shard, (trainer, part)
        assert plan.activation_bytes < alone.activation_bytes / 3
        assert plan.flops_per_step == pytest.approx(alone.flops_per_step)


@pytest.mark.parametrize(("optimizer", "size"), [
    (torch.optim.Adam, 8), (torch.optim.RAdam, 8), (torch.optim.AdamW, 8), (torch.optim.SGD, 0),
])  # fmt: skip
def test_optimiser_state_is_measured(optimizer, size):
    assert optimizer_bytes_per_element(lambda parameters: optimizer(parameters, lr=0.1)) == size


def test_a_batch_that_cannot_be_split():
    assert micro_batch(128, 4, 2) == 16
    with pytest.raises(UserError, match=r"data.batch_size must be >= 1, got 0"):
        micro_batch(0, 1, 1)
    with pytest.raises(UserError, match=r"data.batch_size=10 cannot be split over 2 processes x 2 .* multiple of 4"):
        micro_batch(10, 2, 2)


@pytest.mark.parametrize(("words", "count"), [
    (("trainer.devices=3",), 3), (("trainer.devices=[0,2]",), 2), (("trainer.devices=auto",), 1),
    (("trainer.devices=-1",), 1), (("trainer.devices='2'",), 2), (("trainer.devices=2", "trainer.num_nodes=3"), 6),
])  # fmt: skip
def test_world_size(words, count, composed, tmp_path):
    assert world_size(composed(tmp_path / "run", *words)) == count


def test_the_table_and_the_refusal_of_another_size(composed, tmp_path, capsys):
    total = plan_task(composed(tmp_path / "run", "plan.peak_tflops=10"))
    out = capsys.readouterr().out
    for word in ("parameters of the network", "optimiser state", "FLOPs per optimiser step", "sum per", "hours"):
        assert word in out
    assert total > 0
    with pytest.raises(UserError, match=r"parameters, the published setting 5 \(plan.parameters\)"):
        plan_task(composed(tmp_path / "run", "plan.parameters=5"))
    assert not (tmp_path / "run").exists()


def test_a_fake_step_holds_no_memory(composed, tmp_path):
    module, flops, kept = fake_training_step(composed(tmp_path / "run", "project.net.model.width=20000"), images=2)
    assert all(isinstance(p, torch._subclasses.FakeTensor) for p in module.parameters())
    assert flops > 1e9 and kept > 0


@pytest.mark.parametrize("fake", [True, False])
def test_fused_attention_is_counted(fake):
    """Two products of 2 N^2 D FLOPs per head forward; the backward computes the scores again: five products."""
    with FakeTensorMode() if fake else nullcontext(), flop_counter() as counter:
        q, k, v = (torch.ones(2, 3, 16, 8, requires_grad=True) for _ in range(3))
        out = torch.nn.functional.scaled_dot_product_attention(q, k, v)
        one = 2 * (2 * 3) * 16 * 16 * 8
        assert counter.get_total_flops() == 2 * one
        out.sum().backward()
        assert counter.get_total_flops() == (2 + 5) * one
