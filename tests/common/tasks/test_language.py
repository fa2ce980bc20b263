"""common/tasks/language.py: metrics with known answers, memory that resumes bit by bit, seeded text."""

import math
from functools import partial

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint

from common.data.text.corpus import Bytes, PlainText
from common.data.text.module import TextDataModule
from common.deq.grads import Unrolled
from common.deq.layer import DEQ
from common.deq.layers import apply_norm
from common.deq.solvers import Picard
from common.errors import UserError
from common.nets.deq_transformer import DEQTransformer
from common.runtime.training.guard import PerStepSeed
from common.tasks.language import STORED, Language, choose


def network(std=0.2, **options):
    torch.manual_seed(0)
    deq = DEQ(solver=Picard(max_iter=0), grad=Unrolled(steps=2, tau=1.0), eval_solver=Picard(max_iter=2, stop="never"))
    small = dict(vocabulary=256, width=8, blocks=1, heads=2, head_width=4, inner=16, memory=5, dropout=0.2)
    return DEQTransformer(deq=deq, std=std, norm=partial(apply_norm, kind="weight"), **(small | options))


def made(net=None, **options):
    known = dict(
        length=7, prompt="\n", text_length=6, temperature=1.0, top_k=None, schedule=None, correction=None,
        optimizer=partial(torch.optim.Adam, lr=1e-2),
    )  # fmt: skip
    return Language(net=net or network(), **(known | options))


@pytest.fixture
def data(tmp_path):
    (tmp_path / "text.txt").write_text("the quick brown fox jumps over the lazy dog\n" * 10)
    source = PlainText(root=str(tmp_path), files=["text.txt"])
    return lambda **o: TextDataModule(source=source, vocabulary=256, batch_size=4, length=7, eval_batch_size=3, **o)


def measured(module, data, split="test"):
    module.eval()
    sums = {}
    with torch.no_grad():
        for batch in data.eval_batches(split):
            for name, (total, count) in module.evaluation_step(batch).items():
                before = sums.get(name, (0, 0))
                sums[name] = (before[0] + float(total), before[1] + float(count))
    return module.finalise({name: total / count for name, (total, count) in sums.items()}), sums


def test_a_model_that_knows_nothing_needs_eight_bits_a_byte(data):
    module = made(network(std=0.0))
    values, sums = measured(module, data())
    assert values["loss"] == pytest.approx(math.log(256), rel=1e-5)
    assert values["bits_per_byte"] == pytest.approx(8, rel=1e-5)
    assert values["perplexity"] == pytest.approx(256, rel=1e-4)
    assert sums["loss"][1] == len(data().tokens("test")) - 1


def test_evaluation_carries_memory_and_begins_anew(data):
    module = made()
    first, _ = measured(module, data())
    assert measured(module, data())[0] == first
    without = made(network(memory=0))
    without.net.load_state_dict(module.net.state_dict())
    assert measured(without, data())[0]["loss"] != pytest.approx(first["loss"], rel=1e-6)


def test_training_follows_the_streams_and_evaluation_does_not_disturb_it(data):
    module = made(network(dropout=0.0))
    batches = [batch for batch, _ in zip(data().train_dataloader(), range(4))]
    memory, plain = None, []
    for batch in batches:
        segment = module.net.train().segment(batch["tokens"], memory)
        memory = segment.memory
        plain.append(segment.hidden[-1])
    module.train()
    for batch, expected in zip(batches, plain):
        torch.testing.assert_close(module.outputs(batch)[-1], expected)
        measured(module, data())
        module.train()
    torch.testing.assert_close(module.outputs(batches[0])[-1], plain[0])  # first: nothing before it


def trained(folder, data, steps, start=None, accumulate=1):
    torch.manual_seed(1)
    module = made()
    trainer = pl.Trainer(
        max_steps=steps, max_epochs=-1, accelerator="cpu", logger=False, enable_progress_bar=False,
        enable_model_summary=False, accumulate_grad_batches=accumulate, use_distributed_sampler=False,
        default_root_dir=folder, limit_val_batches=0, num_sanity_val_steps=0,
        callbacks=[PerStepSeed(seed=3), ModelCheckpoint(dirpath=folder, filename=f"{steps}", save_last=False)],
    )  # fmt: skip
    trainer.fit(module, datamodule=data(), ckpt_path=start, weights_only=True)
    path = folder / f"end-{steps}.ckpt"
    trainer.save_checkpoint(path)
    return path, torch.load(path, weights_only=True)


@pytest.mark.parametrize("accumulate", [1, 2])
def test_resumes_bit_by_bit(tmp_path, data, accumulate):
    """9 steps straight equal 4 + 5: weights, and the memory of every stream. A stream has 14 segments here."""
    _, straight = trained(tmp_path / "a", data, 9, accumulate=accumulate)
    path, half = trained(tmp_path / "b", data, 4, accumulate=accumulate)
    assert half[STORED]["states"].shape == (4, 5, 8) and half[STORED]["states"].abs().sum() > 0
    _, resumed = trained(tmp_path / "c", data, 9, start=path, accumulate=accumulate)
    for name, value in straight["state_dict"].items():
        assert value.equal(resumed["state_dict"][name]), name
    for name, value in straight[STORED].items():
        assert value.equal(resumed[STORED][name]), name

    half.pop(STORED)
    torch.save(half, tmp_path / "forgot.ckpt")
    _, other = trained(tmp_path / "d", data, 9, start=tmp_path / "forgot.ckpt", accumulate=accumulate)
    assert not all(v.equal(other["state_dict"][n]) for n, v in straight["state_dict"].items())


def test_memory_of_other_streams_is_not_used():
    module = made().train()
    module.on_load_checkpoint({STORED: {n: torch.ones(6, 5, 8) for n in ("states", "injections")}})
    tokens = torch.zeros(4, 7, dtype=torch.int64)
    with pytest.warns(UserWarning, match="remembers 6 streams, this run reads 4"):
        module.outputs({"tokens": tokens, "first": False})


def test_memory_is_handed_out_by_process_and_micro_batch():
    rows = torch.arange(12.0).reshape(12, 1, 1)
    module = made()
    module._trainer = type("T", (), {"global_rank": 1, "world_size": 3})()
    found = module._hand_out({"states": rows, "injections": rows}, parts=2, share=2)
    assert {place: memory.states.flatten().tolist() for place, memory in found.items()} == {0: [2, 3], 1: [8, 9]}


def test_planning_sees_a_full_memory():
    module = made().train()
    batch = module.fake_batch(2)
    assert batch["tokens"].shape == (2, 7) and not batch["first"]
    module.training_step(batch, 0).backward()
    assert all(p.grad is not None for p in module.parameters())


def test_choice_inverts_the_distribution():
    log_probs = torch.tensor([[0.1, 0.6, 0.3]]).log().expand(5, 3)
    uniform = torch.tensor([0.0, 0.59, 0.61, 0.89, 0.95])
    assert choose(log_probs, uniform, 1.0, None).tolist() == [1, 1, 2, 2, 0]
    assert choose(log_probs, uniform, 1.0, 2).tolist() == [1, 1, 1, 2, 2]
    assert choose(log_probs, uniform, 0.0, None).tolist() == [1] * 5
    assert choose(log_probs, uniform, 0.01, None).tolist() == [1] * 5
    draws = choose(log_probs[:1].expand(4000, 3), torch.linspace(0, 1, 4001)[:-1], 2.0, None)
    share = torch.bincount(draws, minlength=3) / 4000
    torch.testing.assert_close(share, torch.tensor([0.1, 0.6, 0.3]).sqrt() / 1.6398, rtol=0.01, atol=0.002)


def test_text_depends_on_seed_and_number_alone():
    module = made().eval()
    prompt = torch.tensor([10, 65])
    four = module.generate(prompt, samples=4, seed=5)
    assert four.shape == (4, 6) and four.max() < 256
    assert module.generate(prompt, samples=2, seed=5).equal(four[:2])
    assert not module.generate(prompt, samples=4, seed=6).equal(four)
    assert not four[0].equal(four[1])


def test_greedy_text_is_the_likeliest_next_token_each_time():
    module = made(network(std=1.0), temperature=0.0).eval()
    prompt = torch.tensor([10, 65, 66])
    written = module.generate(prompt, samples=1, seed=0)
    expected, segment = [], module.net.segment(prompt[None])
    for _ in range(6):
        expected.append(module.net.log_probs(segment.hidden[-1][:, -1]).argmax(-1))
        segment = module.net.segment(expected[-1][None], segment.memory)
    assert written.equal(torch.stack(expected, dim=1))


def test_show_writes_text(tmp_path, data):
    module = made(prompt="the ").eval()
    (path,) = module.show(data(), tmp_path / "shown", samples=3, seed=0)
    text = path.read_text()
    assert path.name == "text.txt" and text.count("--- text") == 3 and text.count("\nthe ") == 3
    (preview,) = module.preview(data(), tmp_path / "step-5", samples=1, seed=0)
    assert preview == tmp_path / "step-5.txt" and preview.is_file()
    assert Bytes().decode(Bytes().encode("the ")) == "the "


def test_training_learns_the_text(tmp_path, data):
    module = made(network(dropout=0.0))
    before, _ = measured(module, data())
    trainer = pl.Trainer(
        max_steps=60, accelerator="cpu", logger=False, enable_progress_bar=False, enable_model_summary=False,
        enable_checkpointing=False, default_root_dir=tmp_path, limit_val_batches=0, use_distributed_sampler=False,
    )  # fmt: skip
    trainer.fit(module, datamodule=data())
    after, _ = measured(module, data())
    assert after["bits_per_byte"] < before["bits_per_byte"] - 2


@pytest.mark.parametrize(
    "options, text",
    [
        (dict(prompt=""), "project.prompt must hold"),
        (dict(text_length=0), "project.text_length must be a whole number >= 1"),
        (dict(top_k=0), "project.top_k must be a whole number >= 1"),
        (dict(temperature=-1.0), "project.temperature must be >= 0"),
        (dict(length=0), "project.length must be a whole number >= 1"),
    ],
)
def test_refusals(options, text):
    with pytest.raises(UserError, match=text):
        made(**options)


def test_published_settings_of_the_sheet(repo):
    """torchdeq.md and phantom_grad.md, read from the composed configurations."""
    from hydra import compose, initialize_config_dir

    from common.runtime.cli.launch import register_resolvers

    register_resolvers()
    with initialize_config_dir(str(repo / "conf"), version_base="1.3"):
        lm = compose("config", ["+experiment=torchdeq_lm_wikitext103"])
        orders = [compose("config", [f"+experiment=phantom_grad_lm_wikitext103_{o}"]) for o in ("preln", "postln")]
        seq = compose("config", ["+experiment=torchdeq_seq_wikitext103"])
    net, deq = lm.project.net, lm.project.net.deq
    assert (net.blocks, net.width, net.heads, net.head_width, net.inner) == (3, 700, 10, 70, 14800)
    assert (net.divide, list(net.cutoffs), net.memory, net.dropout) == (4, [20_000, 40_000, 200_000], 150, 0.05)
    assert (deq.solver.max_iter, deq.eval_solver.max_iter, deq.eval_solver.stop, deq.eval_solver.tol) == (
        0, 12, "rel", 1e-3,
    )  # fmt: skip
    assert (deq.grad.steps, deq.grad.tau, deq.grad.recompute, net.norm.kind) == (12, 1.0, True, "weight")
    assert (lm.data.batch_size, lm.data.length, net.vocabulary) == (56, 150, 267_735)
    assert (lm.project.optimizer.lr, lm.project.schedule.warmup, lm.trainer.max_steps) == (2.5e-4, 8000, 150_000)
    assert [cfg.project.net.norm_order for cfg in orders] == ["pre", "post"]
    assert all(cfg.project.net.deq.grad._target_.endswith("Unrolled") for cfg in orders)
    assert (seq.project.net.blocks, seq.project.net.inner, seq.project.net.norm_order) == (1, 48_000, "post")
    assert seq.project.net.deq.grad.solver.max_iter == seq.project.net.deq.solver.max_iter == 35
