"""Batches of flow: the contract, mixtures, exact restart, evaluation sets."""

from itertools import islice
from types import SimpleNamespace

import lightning.pytorch as pl
import numpy as np
import pytest
import torch

from common.data.flow.augment import ColourAugment, DenseAugment, SparseAugment
from common.data.flow.module import EvaluationSet, FlowData, Mixture, TrainingSet
from common.data.flow.pairs import FilePairs
from common.data.flow.sources import Pairs
from common.data.flow.synth import SynthFlow
from common.errors import UserError

SIZES = [(40, 56), (48, 64), (40, 56), (40, 56), (48, 64)]


class MadeUp:
    """Five pairs of two sizes."""

    splits = ("train", "val")
    endless = False

    def __init__(self, name="made_up", value=0, fails=False):
        self.name, self.value, self.fails, self.checked = name, value, fails, []

    def check(self, split):
        self.checked.append(split)
        if self.fails:
            raise UserError(f"{self.name} not found. Set data.root.")

    def load(self, split):
        return self

    def __len__(self):
        return len(SIZES)

    def size(self, index):
        return SIZES[index]

    def fingerprint(self):
        return "0" * 16

    def read(self, index):
        if self.fails:
            raise UserError(f"{self.name}: The flow a.flo cannot be read.")
        generator = torch.Generator().manual_seed(index)
        height, width = SIZES[index]
        image = torch.randint(0, 256, (2, 3, height, width), generator=generator, dtype=torch.uint8)
        flow = torch.full((2, height, width), float(self.value))
        return {"first": image[0], "second": image[1], "flow": flow, "valid": torch.ones(height, width)}


def dense():
    return DenseAugment(crop=(24, 32), eraser=False)


def module(**options):
    train = {"made_up": TrainingSet(source=MadeUp(), augment=dense())}
    evaluation = {"made_up": EvaluationSet(source=MadeUp(), split="val")}
    return FlowData(**{"train": train, "evaluation": evaluation, "crop": (24, 32), "batch_size": 4, **options})


def synthetic(**options):
    source = SynthFlow(size=(24, 32), pairs=20, layers=1)
    train = {"synthflow": TrainingSet(source=source, augment=ColourAugment(erased_side=(4, 8)))}
    return module(train=train, evaluation={"held_out": EvaluationSet(source=source, split="held_out")}, **options)


def test_batches_are_the_contracts():
    for data, extra in ((module(), set()), (synthetic(), {"occluded"})):
        batch = next(iter(data.train_dataloader()))
        assert batch["first"].dtype == batch["second"].dtype == torch.uint8
        batch = data.on_after_batch_transfer(batch, 0)
        assert set(batch) == {"first", "second", "flow", "valid", "position"} | extra
        for name, shape in (("first", (4, 3, 24, 32)), ("second", (4, 3, 24, 32)), ("flow", (4, 2, 24, 32))):
            assert batch[name].shape == shape and batch[name].dtype == torch.float32
        assert batch["valid"].shape == (4, 24, 32) and batch["valid"].dtype == torch.float32
        assert batch["first"].min() >= -1 and batch["first"].max() <= 1 and batch["first"].min() < 0
        assert batch["position"].tolist() == [0, 1, 2, 3]
        again = data.on_after_batch_transfer(batch, 0)
        assert torch.equal(again["first"], batch["first"])


def test_shares_of_a_mixture_are_the_weights():
    train = {
        name: TrainingSet(source=MadeUp(name, value), augment=dense(), weight=weight)
        for name, value, weight in (("a", 1, 100), ("b", 2, 5), ("c", 3, 1), ("d", 4, 0))
    }
    mixture = Mixture(train)
    assert len(mixture) == 530 and mixture.shares() == {"a": 500 / 530, "b": 25 / 530, "c": 5 / 530, "d": 0}
    located = [mixture.locate(index) for index in range(530)]
    assert all(
        located.count((part, number)) == times for part, times in ((0, 100), (1, 5), (2, 1)) for number in range(5)
    )
    data = module(train=train, batch_size=53)
    plain = {
        "a": TrainingSet(source=MadeUp("a", 1), augment=dense()),
        "b": TrainingSet(source=MadeUp("b", 2), augment=dense()),
    }
    assert set(data.train) == {"a", "b", "c"}
    values = []
    for batch in islice(iter(module(train=plain, batch_size=10).train_dataloader()), 1):
        values = batch["flow"][:, 0].abs().amax((1, 2)).tolist()
    # one pass holds five pairs of flow 1 and five of flow 2, stretched by less than 2^0.7
    assert sum(value < 0.9 for value in values) == 0 and len(values) == 10


def test_an_endless_part_gives_new_pairs_in_every_pass():
    source = SynthFlow(size=(24, 32), pairs=4, layers=0)
    data = module(train={"synthflow": TrainingSet(source=source)}, evaluation={})
    batches = list(islice(iter(data.train_dataloader()), 3))
    flows = torch.cat([batch["flow"] for batch in batches])
    assert len({flow.numpy().tobytes() for flow in flows}) == 12
    assert torch.equal(flows[7], source.load("train").read(7)["flow"])  # pair 7 is the seventh drawn
    both = {"synthflow": TrainingSet(source=source), "real": TrainingSet(source=MadeUp(), augment=dense(), weight=2)}
    mixed = module(train=both, batch_size=14)
    assert mixed.mixture().shares() == {"synthflow": 4 / 14, "real": 10 / 14}
    batch = next(iter(mixed.train_dataloader()))
    assert "occluded" not in batch and len(batch["flow"]) == 14


class Recorder(pl.LightningModule):
    def __init__(self):
        super().__init__()
        self.weight, self.seen = torch.nn.Parameter(torch.zeros(())), []

    def training_step(self, batch, batch_idx):
        assert batch["first"].dtype == torch.float32
        self.seen.append((batch["position"].tolist(), *(batch[name].clone() for name in ("first", "second", "flow"))))
        return self.weight**2

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


class SaveAt(pl.Callback):
    def __init__(self, step, path):
        self.step, self.path = step, path

    def on_train_batch_end(self, trainer, *_):
        if trainer.global_step == self.step:
            trainer.save_checkpoint(self.path)


def fit(steps, data, ckpt=None, callbacks=()):
    recorder = Recorder()
    trainer = pl.Trainer(
        accelerator="cpu", max_steps=steps, max_epochs=-1, logger=False, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False, callbacks=list(callbacks),
    )  # fmt: skip
    trainer.fit(recorder, datamodule=data, ckpt_path=ckpt, weights_only=True if ckpt else None)
    return recorder.seen


@pytest.mark.parametrize("make, workers", [(module, 0), (synthetic, 2)])
def test_seven_and_four_steps_are_eleven_augmentation_included(tmp_path, make, workers):
    path = str(tmp_path / "mid.ckpt")
    straight = fit(11, make(), callbacks=[SaveAt(7, path)])
    resumed = fit(11, make(num_workers=workers), ckpt=path)
    assert len(resumed) == 4
    for a, b in zip(resumed, straight[7:]):
        assert a[0] == b[0] and all(torch.equal(x, y) for x, y in zip(a[1:], b[1:]))
    assert len({step[1].numpy().tobytes() for step in straight}) == 11


def test_two_processes_draw_and_augment_as_one_does():
    progress = SimpleNamespace(total=SimpleNamespace(processed=0))
    for make in (module, synthetic):
        whole = list(islice(iter(make().train_dataloader()), 3))
        shares = []
        for rank in range(2):
            data = make()
            data.trainer = SimpleNamespace(
                fit_loop=SimpleNamespace(epoch_loop=SimpleNamespace(batch_progress=progress)),
                accumulate_grad_batches=1, distributed_sampler_kwargs={"rank": rank, "num_replicas": 2},
                overfit_batches=0, global_rank=rank, world_size=2,
            )  # fmt: skip
            shares.append(list(islice(iter(data.train_dataloader()), 3)))
        for step, batch in enumerate(whole):
            for key in batch:
                assert torch.equal(torch.cat([share[step][key] for share in shares]), batch[key])


def test_seed_and_mixture_of_the_order_are_said_at_restart():
    data = module()
    state = {**data.state_dict(), "seed": 3, "mixture": "2 made_up"}
    with pytest.warns(
        UserWarning, match=r"order of the pairs .* seed was 3, is 0; mixture was 2 made_up, is 1 made_up"
    ):
        data.load_state_dict(state)


def test_evaluation_gives_whole_pairs_once():
    batches = list(module().eval_batches("made_up"))
    assert [batch["position"].tolist() for batch in batches] == [[i] for i in range(5)]
    assert [tuple(batch["flow"].shape[2:]) for batch in batches] == SIZES
    assert all(torch.equal(b["first"][0], MadeUp().read(i)["first"]) for i, b in enumerate(batches))
    together = list(module(eval_batch_size=2).eval_batches("made_up"))
    assert [batch["position"].tolist() for batch in together] == [[0, 2], [1, 4], [3]]
    assert module().splits == ("made_up",) and module().fingerprint("made_up") == "0" * 16
    with pytest.raises(UserError, match=r"no split 'mede_up'\. Closest: made_up"):
        module().eval_batches("mede_up")
    held_out = list(islice(iter(synthetic().eval_batches("held_out")), 2))
    assert held_out[0]["occluded"].shape == (1, 24, 32)


def test_an_evaluation_set_may_say_its_padding():
    kitti = EvaluationSet(source=MadeUp(), split="val", padding="kitti")
    data = module(evaluation={"plain": EvaluationSet(source=MadeUp(), split="val"), "kitti": kitti})
    assert [data.padding(split) for split in data.splits] == [None, "kitti"]
    assert {batch.get("padding") for batch in data.eval_batches("kitti")} == {"kitti"}
    assert not any("padding" in batch for batch in data.eval_batches("plain"))
    with pytest.raises(UserError, match="padding must be one of sintel, kitti, got 'chairs'"):
        EvaluationSet(source=MadeUp(), split="val", padding="chairs")


def test_the_check_looks_at_every_set_and_says_which():
    good, bad = MadeUp(), MadeUp("sintel", fails=True)
    data = module(
        train={"good": TrainingSet(source=good, augment=dense())}, evaluation={"clean": EvaluationSet(source=bad)}
    )
    with pytest.raises(UserError, match=r"data\.evaluation\.clean: sintel not .*data\.evaluation\.clean=null"):
        data.check()
    assert good.checked == ["train"]
    with pytest.raises(UserError, match=r"data\.train\.bad: sintel not found. Set data\.root\.$"):
        module(train={"bad": TrainingSet(source=bad, augment=dense())}).check()
    both = {name: TrainingSet(source=source, augment=dense()) for name, source in (("good", good), ("bad", bad))}
    with pytest.raises(UserError, match=r"data\.train\.bad: sintel not .*data\.train\.bad\.weight=0"):
        module(train=both).check()
    module(evaluation={"clean": None}).check()


@pytest.mark.parametrize("workers", [0, 1])
def test_a_damaged_file_is_one_sentence(workers):
    data = module(
        train={"bad": TrainingSet(source=MadeUp("sintel", fails=True), augment=dense())}, num_workers=workers,
        evaluation={"bad": EvaluationSet(source=MadeUp("sintel", fails=True))},
    )  # fmt: skip
    for batches in (data.train_dataloader(), data.eval_batches("bad")):
        with pytest.raises(UserError, match=r"sintel: The flow a\.flo cannot be read"):
            next(iter(batches))
    data.teardown("fit")


def test_wrong_numbers():
    with pytest.raises(UserError, match=r"data\.crop must be \[height, width\], multiples of 8, got \[24, 33\]"):
        module(crop=(24, 33))
    with pytest.raises(
        UserError, match=r"data\.train\.made_up gives pairs of \[24, 32\], but data\.crop is \[32, 32\]"
    ):
        module(crop=(32, 32))
    with pytest.raises(UserError, match=r"data\.train\.synthflow gives pairs of \[96, 128\]"):
        module(train={"synthflow": TrainingSet(source=SynthFlow())})
    with pytest.raises(UserError, match=r"no set with a weight above 0"):
        module(train={"a": TrainingSet(source=MadeUp(), augment=dense(), weight=0), "b": None})
    with pytest.raises(UserError, match=r"weight must be a whole number >= 0, got -1"):
        TrainingSet(source=MadeUp(), weight=-1)
    with pytest.raises(UserError, match=r"made_up has no split 'tst'"):
        EvaluationSet(source=MadeUp(), split="tst")
    with pytest.raises(UserError, match=r"num_workers must be a whole number >= 0"):
        module(num_workers=-1)
    with pytest.raises(UserError, match=r"made_up holds no pairs"):
        FilePairs(name="made_up", images=[], flows=[])


def test_the_real_pairs_together(data_folder):
    """Sparse and dense pairs in one batch, and each real set evaluated; the pictures fit the flow better than none."""
    root = str(data_folder("flow").parent)
    train = {
        "chairs": TrainingSet(source=Pairs(root=root), split="chairs_train", augment=DenseAugment(crop=(96, 128))),
        "kitti": TrainingSet(
            source=Pairs(root=root), split="kitti", augment=SparseAugment(crop=(96, 128), flip=True), weight=4
        ),
    }
    evaluation = {
        f"pairs_{split}": EvaluationSet(source=Pairs(root=root), split=split) for split in ("chairs", "sintel", "kitti")
    }
    data = FlowData(train=train, evaluation=evaluation, crop=(96, 128), batch_size=17)
    data.check()
    assert data.mixture().shares() == {"chairs": 9 / 17, "kitti": 8 / 17}
    batch = next(iter(data.train_dataloader()))
    dense_rows = batch["valid"].flatten(1).mean(1) > 0.99
    assert dense_rows.sum() == 9 and batch["first"].shape == (17, 3, 96, 128)
    counts = {split: len(list(data.eval_batches(split))) for split in data.splits}
    assert counts == {"pairs_chairs": 3, "pairs_sintel": 1, "pairs_kitti": 2}
    for pair in data.eval_batches("pairs_chairs"):
        first, second = (data.on_after_batch_transfer(pair, 0)[name][0] for name in ("first", "second"))
        y, x = np.mgrid[0:384, 0:512]
        u, v = pair["flow"][0].numpy()
        px, py = np.rint(x + u).astype(int), np.rint(y + v).astype(int)
        inside = (px >= 0) & (py >= 0) & (px < 512) & (py < 384)
        moved = (second[:, py.clip(0, 383), px.clip(0, 511)] - first).abs().mean(0)[torch.from_numpy(inside)].mean()
        assert moved < 0.7 * (second - first).abs().mean(0)[torch.from_numpy(inside)].mean()
