"""The segmentation module: the batch contract, exact restarts with the augmentation, whole pictures, class weights."""

import inspect
import math
import re
from itertools import islice
from types import SimpleNamespace

import lightning.pytorch as pl
import pytest
import torch
from omegaconf import OmegaConf

from common.data.sampler import EqualSizes
from common.data.segmentation.augment import PairedAugment
from common.data.segmentation.module import SegmentationDataModule, class_weights
from common.data.source import check_split
from common.errors import UserError
from common.runtime.cli.check import check
from common.targets import resolve

SIZES = [(12, 16), (16, 12), (12, 16), (10, 10), (12, 16), (16, 12), (12, 16)]


class MadeUp:
    """Pictures of several sizes; picture and mask of number i come from i alone."""

    name = "made_up"
    class_names = ("a", "b", "c")
    palette = ((0, 0, 0), (9, 0, 0), (0, 9, 0))
    splits = ("train", "val")

    def __init__(self, broken=None):
        self.broken, self.reads = broken, 0

    def check(self):
        pass

    def load(self, split):
        check_split(split, self.splits, self.name)
        return self

    def __len__(self):
        return len(SIZES)

    def size(self, index):
        return SIZES[index]

    def read(self, index):
        self.reads += 1
        if index == self.broken:
            raise UserError("made_up: the mask b.png cannot be read (cut off). Put an intact copy there.")
        generator = torch.Generator().manual_seed(index)
        mask = torch.randint(0, 3, SIZES[index], dtype=torch.uint8, generator=generator)
        mask[0, 0] = 255
        return (mask * 100).expand(3, -1, -1) + index, mask

    def mask(self, index):
        return self.read(index)[1]

    def fingerprint(self):
        return "0" * 16


def module(**options):
    return SegmentationDataModule(
        **{"source": MadeUp(), "augment": PairedAugment(crop=8), "batch_size": 6, "checked_pairs": 0, **options}
    )


class Recorder(pl.LightningModule):
    def __init__(self):
        super().__init__()
        self.weight, self.seen = torch.nn.Parameter(torch.zeros(())), []

    def training_step(self, batch, batch_idx):
        assert batch["image"].dtype == torch.float32 and batch["mask"].dtype == torch.int64
        self.seen.append((batch["position"].tolist(), batch["image"].clone(), batch["mask"].clone()))
        return self.weight**2

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


class SaveAt(pl.Callback):
    def __init__(self, step, path):
        self.step, self.path = step, path

    def on_train_batch_end(self, trainer, *_):
        if trainer.global_step == self.step:
            trainer.save_checkpoint(self.path)


def fit(steps, data, ckpt=None, callbacks=(), **options):
    recorder = Recorder()
    trainer = pl.Trainer(
        accelerator="cpu", max_steps=steps, max_epochs=-1, logger=False, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False, callbacks=list(callbacks), **options,
    )  # fmt: skip
    trainer.fit(recorder, datamodule=data, ckpt_path=ckpt, weights_only=True if ckpt else None)
    return recorder.seen


def same(first, second):
    return len(first) == len(second) and all(
        a[0] == b[0] and torch.equal(a[1], b[1]) and torch.equal(a[2], b[2]) for a, b in zip(first, second)
    )


def test_batches_are_the_contracts():
    data = module()
    batch = next(iter(data.train_dataloader()))
    assert batch["image"].dtype == batch["mask"].dtype == torch.uint8
    batch = data.on_after_batch_transfer(batch, 0)
    assert batch["image"].shape == (6, 3, 8, 8) and batch["image"].dtype == torch.float32
    assert batch["mask"].shape == (6, 8, 8) and batch["mask"].dtype == torch.int64
    assert batch["image"].min() >= -1 and batch["image"].max() <= 1
    assert batch["position"].tolist() == list(range(6))
    assert (data.num_classes, data.class_names, data.ignore, data.name) == (3, ("a", "b", "c"), 255, "made_up")
    assert set(batch["mask"].unique().tolist()) <= {0, 1, 2, 255}


@pytest.mark.parametrize("workers", [0, 2])
def test_thirteen_and_seven_steps_are_twenty_augmentation_included(tmp_path, workers):
    path = str(tmp_path / "mid.ckpt")
    straight = fit(20, module(), callbacks=[SaveAt(13, path)])
    assert same(fit(20, module(num_workers=workers), ckpt=path), straight[13:])
    assert len({step[1].numpy().tobytes() for step in straight}) == 20


def test_two_processes_augment_as_one_does():
    whole = list(islice(iter(module().train_dataloader()), 3))
    progress = SimpleNamespace(total=SimpleNamespace(processed=0))
    shares = []
    for rank in range(2):
        data = module()
        data.trainer = SimpleNamespace(
            fit_loop=SimpleNamespace(epoch_loop=SimpleNamespace(batch_progress=progress)), accumulate_grad_batches=1,
            distributed_sampler_kwargs={"rank": rank, "num_replicas": 2}, overfit_batches=0, global_rank=rank,
            world_size=2,
        )  # fmt: skip
        shares.append(list(islice(iter(data.train_dataloader()), 3)))
    for step, batch in enumerate(whole):
        for key in batch:
            assert torch.equal(torch.cat([share[step][key] for share in shares]), batch[key])


def test_seed_and_split_of_the_order_are_said_at_restart():
    data = module()
    state = {**data.state_dict(), "seed": 3, "train_split": "val"}
    with pytest.warns(UserWarning, match=r"seed was 3, is 0; train_split was val, is train"):
        data.load_state_dict(state)


def test_evaluation_gives_whole_pictures_once():
    data = module(augment=PairedAugment(crop=4))
    batches = list(data.eval_batches("val"))
    assert [batch["position"].tolist() for batch in batches] == [[i] for i in range(7)]
    for index, batch in enumerate(batches):
        image, mask = data.pairs("val").read(index)
        assert torch.equal(batch["image"][0], image) and torch.equal(batch["mask"][0], mask)
        assert batch["size"].tolist() == [list(SIZES[index])]
    together = list(module(eval_batch_size=2).eval_batches("val"))
    assert [batch["position"].tolist() for batch in together] == [[0, 2], [1, 5], [4, 6], [3]]
    with pytest.raises(UserError, match="no split 'vla'"):
        data.eval_batches("vla")


def test_eval_fit_resizes_the_picture_and_leaves_the_mask():
    batch = next(iter(module(eval_fit=[100, 24]).eval_batches("val")))
    assert batch["image"].shape == (1, 3, 24, 32) and batch["mask"].shape == (1, 12, 16)
    assert batch["size"].tolist() == [[12, 16]]


@pytest.mark.parametrize("world", [1, 2, 3])
@pytest.mark.parametrize("batch", [1, 2, 4, 100])
def test_equal_sizes_share_every_picture_once(world, batch):
    seen = []
    for rank in range(world):
        sampler = EqualSizes(count=7, sizes=SIZES, batch_size=batch, rank=rank, world_size=world)
        assert len(list(sampler)) == len(sampler)
        for draws in sampler:
            assert len({SIZES[index] for index, _ in draws}) == 1 and len(draws) <= max(1, batch // world)
            seen += [index for index, _ in draws]
    assert sorted(seen) == list(range(7))


def test_class_weights_by_hand():
    # picture 1: 6 of class 0, 2 of class 1; picture 2: 4 of class 0; class 2 nowhere, void not counted
    masks = [
        torch.tensor([[0, 0, 0, 0, 0], [0, 1, 1, 255, 255]], dtype=torch.uint8),
        torch.zeros(2, 2, dtype=torch.uint8),
    ]
    # f_0 = 10 / 12, f_1 = 2 / 8; median 13 / 24
    assert class_weights(masks, 3, "median_frequency").tolist() == pytest.approx([0.65, 13 / 6, 1])
    expected = [1 / math.log(1.02 + p) for p in (10 / 12, 2 / 12, 0)]
    assert class_weights(masks, 3, "inverse_log").tolist() == pytest.approx(expected)
    with pytest.raises(UserError, match="every pixel of the training split is void"):
        class_weights([torch.full((2, 2), 255, dtype=torch.uint8)], 3, "inverse_log")
    assert module().class_weights() is None
    assert module(class_weighting="inverse_log").class_weights().shape == (3,)


def test_the_check_reads_what_it_is_told_and_once():
    for checked, reads in ((0, 0), (3, 6), (None, 14)):
        data = module(checked_pairs=checked)
        data.check()
        data.prepare_data()
        assert data.source.reads == reads
    with pytest.raises(UserError, match=r"the mask b\.png cannot be read"):
        module(source=MadeUp(broken=3), checked_pairs=None).check()


@pytest.mark.parametrize("workers", [0, 1])
def test_a_damaged_mask_is_one_sentence_even_from_a_worker(workers):
    data = module(source=MadeUp(broken=3), num_workers=workers)
    with pytest.raises(UserError, match=r"the mask b\.png cannot be read"):
        fit(3, data)
    data.teardown("fit")
    with pytest.raises(UserError, match=r"the mask b\.png cannot be read"):
        list(data.eval_batches("val"))


def test_kept_pairs_are_decoded_once_and_are_the_same():
    kept, plain = module(keep=True), module()
    for _ in range(2):
        for a, b in zip(islice(iter(kept.train_dataloader()), 4), islice(iter(plain.train_dataloader()), 4)):
            assert all(torch.equal(a[key], b[key]) for key in a)
    assert kept.source.reads == 7


@pytest.mark.parametrize(
    ("option", "match"),
    [
        (dict(batch_size=0), r"data\.batch_size must be a whole number >= 1"),
        (dict(eval_batch_size=0), r"data\.eval_batch_size must be a whole number >= 1"),
        (dict(eval_fit=[1, 2]), r"data\.eval_fit must be"),
        (dict(train_split="trian"), r"data\.train_split: made_up has no split 'trian'\. Closest: train"),
        (dict(class_weighting="median"), r"data\.class_weighting must be one of .* Closest: median_frequency"),
        (dict(checked_pairs=-1), r"data\.checked_pairs must be a whole number >= 0"),
        (dict(num_workers=-1), r"data\.num_workers must be a whole number >= 0"),
    ],
)
def test_bad_options_are_refused(option, match):
    with pytest.raises(UserError, match=match):
        module(**option)


NAMES = ("voc2012", "voc2012_aug", "pascal_context", "ade20k", "cityscapes", "camvid")


@pytest.mark.parametrize("name", NAMES)
def test_configurations_are_the_signatures_and_explain_themselves(repo, name):
    path = repo / "conf" / "data" / f"{name}.yaml"
    config = OmegaConf.create({"seed": 0, "paths": {"data": "somewhere"}, "data": OmegaConf.load(path)})
    check(config)
    for node in (config.data, config.data.source, config.data.augment):
        assert set(node) - {"_target_"} == set(inspect.signature(resolve(node._target_)).parameters)
    source = resolve(config.data.source._target_)(**{k: v for k, v in config.data.source.items() if k != "_target_"})
    assert config.data.train_split in source.splits
    augment = {key: value for key, value in OmegaConf.to_container(config.data.augment).items() if key != "_target_"}
    PairedAugment(**augment)
    for line in path.read_text().splitlines():
        if not re.match(r"\s*(_target_|source:|augment:|seed|#|root: \$\{data\.root\})", line):
            assert "  # " in line, line


def test_camvid_trains_and_evaluates(data_folder):
    from common.data.segmentation.camvid import CamVid

    data = SegmentationDataModule(
        source=CamVid(root=str(data_folder("camvid").parent)), augment=PairedAugment(crop=64), batch_size=4,
        eval_batch_size=8,
    )  # fmt: skip
    data.check()
    batch = data.on_after_batch_transfer(next(iter(data.train_dataloader())), 0)
    assert batch["image"].shape == (4, 3, 64, 64) and set(batch["mask"].unique().tolist()) <= {*range(11), 255}
    sizes = [len(batch["mask"]) for batch in islice(iter(data.eval_batches("val")), 2)]
    assert sizes == [8, 8] and len(data.eval_batches("val")) == 13
