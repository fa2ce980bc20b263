"""common/data/text/module.py: every token once, streams that go on, restart from the row count alone."""

import inspect
from itertools import islice
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from omegaconf import OmegaConf

from common.data.text.corpus import Bytes, PlainText, Words
from common.data.text.module import IGNORED, Streams, TextDataModule, TrainBatches
from common.errors import UserError
from common.targets import resolve


class Counting:
    """Tokens 0, 1, 2, ... so that a token says its place."""

    name, splits = "counting", ("train", "test")

    def __init__(self, size=103, vocabulary=256):
        self.size, self.known = size, vocabulary

    def check(self):
        pass

    def vocabulary(self):
        return Words([f"w{number}" for number in range(self.known)])

    def load(self, split):
        return np.arange(self.size, dtype=np.int32)


def module(**options):
    return TextDataModule(**(dict(source=Counting(), batch_size=4, length=7, eval_batch_size=3) | options))


def trainer(processed=0, accumulate=1, rank=0, world=1, overfit=0):
    progress = SimpleNamespace(total=SimpleNamespace(processed=processed))
    return SimpleNamespace(
        accumulate_grad_batches=accumulate, global_rank=rank, world_size=world, overfit_batches=overfit,
        distributed_sampler_kwargs=None, fit_loop=SimpleNamespace(epoch_loop=SimpleNamespace(batch_progress=progress)),
    )  # fmt: skip


def batches(data, count):
    return list(islice(iter(data.train_dataloader()), count))


def same(a, b):
    return len(a) == len(b) and all(x["tokens"].equal(y["tokens"]) and x["first"] == y["first"] for x, y in zip(a, b))


def test_every_token_once_an_epoch_in_streams_that_go_on():
    seen = batches(module(), 2 * 4)  # 102 positions, 25 a stream, 4 segments of 7, 7, 7, 4
    for epoch in (seen[:4], seen[4:]):
        assert [b["first"] for b in epoch] == [True, False, False, False]
        rows = torch.cat([b["tokens"] for b in epoch], dim=1)
        assert rows.equal(torch.arange(100).reshape(4, 25))  # the last 2 positions do not fill the streams
        assert torch.cat([b["targets"] for b in epoch], dim=1).equal(rows + 1)
    assert seen[3]["tokens"].shape == (4, 4)


@settings(max_examples=40, deadline=None)
@given(size=st.integers(2, 200), rows=st.integers(1, 9), length=st.integers(1, 30))
def test_evaluation_reads_every_position_once(size, rows, length):
    data = module(source=Counting(size), eval_batch_size=rows, eval_length=length)
    seen = list(data.eval_batches("test"))
    assert seen[0]["first"] and not any(b["first"] for b in seen[1:])
    targets = torch.cat([b["targets"] for b in seen], dim=1)
    assert sorted(targets[targets != IGNORED].tolist()) == list(range(1, size))
    for batch in seen:
        inside = batch["targets"] != IGNORED
        assert batch["tokens"][inside].equal(batch["targets"][inside] - 1)
        assert (batch["bytes"] > 0).equal(inside)


def test_evaluation_shares_split_the_streams():
    whole = list(module().eval_batches("test"))
    parts = []
    for rank in range(2):
        data = module()
        data.trainer = trainer(rank=rank, world=2)
        parts.append(list(data.eval_batches("test")))
    for together, *shares in zip(whole, *parts, strict=True):
        assert torch.cat([share["targets"] for share in shares]).equal(together["targets"])


@pytest.mark.parametrize("accumulate, world", [(1, 1), (2, 1), (1, 2), (2, 2)])
def test_shares_and_micro_batches_are_the_joint_batch(accumulate, world):
    joint = batches(module(), 6)
    parts = []
    for rank in range(world):
        data = module()
        data.trainer = trainer(rank=rank, world=world, accumulate=accumulate)
        parts.append(batches(data, 6 * accumulate))
    for step, whole in enumerate(joint):
        micro = range(step * accumulate, (step + 1) * accumulate)
        found = torch.cat([parts[rank][m]["tokens"] for m in micro for rank in range(world)])
        assert found.equal(whole["tokens"])
        assert all(parts[rank][m]["first"] == whole["first"] for m in micro for rank in range(world))


@settings(max_examples=20, deadline=None)
@given(done=st.integers(0, 30))
def test_restart_goes_on_at_the_very_row(done):
    whole = batches(module(), 40)
    before = module()
    before.trainer = trainer(processed=done)
    state = before.state_dict()
    assert state == {"rows_seen": 4 * done, "batches": done, "batch_size": 4, "length": 7}

    after = module()
    after.load_state_dict(state)
    after.trainer = trainer(processed=done)  # Lightning restores its counter too
    assert same(batches(after, 40 - done), whole[done:])
    after.trainer = trainer(processed=done + 3)
    assert same(batches(after, 5), whole[done + 3 : done + 8])


def test_another_batch_size_goes_on_as_far_in_the_text():
    data = module(batch_size=2)
    with pytest.warns(UserWarning, match="streams change from here on: data batch_size was 4, is 2"):
        data.load_state_dict({"rows_seen": 8, "batches": 2, "batch_size": 4, "length": 7})
    assert data.start_samples == 8  # as many tokens: 4 steps of 2 rows


def test_overfitting_repeats_the_same_batch():
    data = module()
    data.trainer = trainer(processed=5, overfit=1)
    assert batches(data, 1)[0]["first"]


def test_bytes_of_targets_are_those_of_the_text(tmp_path):
    (tmp_path / "t.txt").write_text("abc " * 50)
    data = TextDataModule(source=PlainText(root=str(tmp_path), files=["t.txt"]), eval_batch_size=2, length=6)
    assert isinstance(data.vocabulary, Bytes)
    found = list(data.eval_batches("test"))
    assert sum(int(b["bytes"].sum()) for b in found) == 20 - 1


def test_fingerprint_follows_the_content():
    assert module().fingerprint("test") == module().fingerprint("train")
    assert module().fingerprint("test") != module(source=Counting(90)).fingerprint("test")


def test_segments_need_no_loop_over_rows():
    streams = Streams(np.arange(1_000_001), rows=1000, length=50, whole=True)
    tokens, targets = streams.segment(3, np.arange(1000))
    assert tokens.shape == targets.shape == (1000, 50) and int(tokens[999, 0]) == 999_150
    loader = TrainBatches(streams, micro=1000, rank=0, world_size=1, start=0)
    assert next(iter(loader))["tokens"].dtype == torch.int64


@pytest.mark.parametrize(
    "options, text",
    [
        (dict(batch_size=0), "data.batch_size must be a whole number >= 1"),
        (dict(length=0), "data.length must be a whole number >= 1"),
        (dict(eval_length=0), "data.eval_length must be a whole number >= 1"),
        (dict(eval_batch_size=0), "data.eval_batch_size"),
    ],
)
def test_bad_numbers(options, text):
    with pytest.raises(UserError, match=text):
        module(**options)


def test_refusals():
    with pytest.raises(UserError, match=r"256 different tokens, the run is set up for 300. Set data.vocabulary=256"):
        module(vocabulary=300).tokens("train")
    with pytest.raises(UserError, match="has 4 tokens, fewer than 5 for 4 streams"):
        module(source=Counting(4)).train_dataloader()
    with pytest.raises(UserError, match="holds token 102, of 50"):
        module(source=Counting(vocabulary=50)).tokens("train")
    with pytest.raises(UserError, match="no split 'valid'"):
        next(module().eval_batches("valid"))
    data = module()
    data.trainer = trainer(world=3)
    with pytest.raises(UserError, match=r"multiple of 3 \(processes"):
        data.setup("fit")


@pytest.mark.parametrize("name", ["tinyshakespeare", "wikitext2", "wikitext103"])
def test_configurations_are_the_signatures_and_say_where_the_files_belong(repo, tmp_path, name):
    from hydra.utils import instantiate

    data = OmegaConf.load(repo / "conf" / "data" / f"{name}.yaml")
    cfg = OmegaConf.create({"paths": {"data": str(tmp_path), "cache": str(tmp_path / "cache")}, "data": data})
    assert set(cfg.data) - {"_target_"} == set(inspect.signature(TextDataModule).parameters)
    source = resolve(cfg.data.source._target_)
    assert set(cfg.data.source) - {"_target_"} <= set(inspect.signature(source).parameters)
    made = instantiate(cfg.data)
    with pytest.raises(UserError, match=rf"not found: looked for {tmp_path}/.*get it from https://"):
        made.check()
    assert made.splits == (("train", "valid", "test") if name == "wikitext103" else ("train", "test"))
