"""The signal data module: which points a step sees, splits, restart."""

import inspect
import itertools

import pytest
import torch
from omegaconf import OmegaConf

from common.errors import UserError
from common.runtime.cli.check import check
from common.targets import resolve
from projects.torchdeq.signal_data import SignalDataModule
from projects.torchdeq.signals import Signal


class Ramp:
    """A signal whose values tell the coordinates."""

    name = "ramp"

    def __init__(self, *grid: int):
        self.grid = grid

    def check(self) -> None: ...

    def load(self) -> Signal:
        bare = Signal("image", torch.zeros(*self.grid, 1))
        return Signal("image", bare.coordinates().sum(-1, keepdim=True) / len(self.grid))


def take(data, steps):
    return list(itertools.islice(data.train_dataloader(), steps))


def test_full_batch_is_every_point_once_in_order():
    data = SignalDataModule(source=Ramp(4, 6), batch_size=24, shuffle=False)
    for batch in take(data, 2):
        assert batch["index"].tolist() == list(range(24))
        assert batch["coords"].shape == (24, 2) and batch["value"].shape == (24, 1)
        assert torch.allclose(batch["coords"].mean(1, keepdim=True), batch["value"])


def test_random_subsets_visit_every_point_once_an_epoch():
    data = SignalDataModule(source=Ramp(4, 6), batch_size=8, seed=3)
    first, second = torch.cat([b["index"] for b in take(data, 3)]), torch.cat([b["index"] for b in take(data, 6)[3:]])
    assert sorted(first.tolist()) == sorted(second.tolist()) == list(range(24))
    assert first.tolist() != second.tolist() and first.tolist() != list(range(24))
    for batch in take(data, 2):
        assert torch.allclose(batch["coords"].mean(1, keepdim=True), batch["value"])


def test_the_stream_restarts_anywhere_and_with_another_batch_size():
    whole = torch.cat([b["index"] for b in take(SignalDataModule(source=Ramp(5, 5), batch_size=10, seed=1), 6)])
    later = SignalDataModule(source=Ramp(5, 5), batch_size=4, seed=1)
    later.load_state_dict({"images_seen": 20, "batches": 0, "seed": 1, "shuffle": True})
    assert torch.cat([b["index"] for b in take(later, 10)]).tolist() == whole[20:].tolist()


def test_stride_two_tests_between_the_training_points():
    data = SignalDataModule(source=Ramp(6, 6), stride=2)
    (train, _), (test, values) = data.points("train"), data.points("test")
    axis = torch.linspace(-1, 1, 6)
    assert len(train) == len(test) == 9
    assert torch.allclose(train[:, 0].unique(), axis[::2]) and torch.allclose(test[:, 0].unique(), axis[1::2])
    assert torch.allclose(test.mean(1, keepdim=True), values)
    whole = SignalDataModule(source=Ramp(6, 6))
    assert torch.equal(whole.points("train")[0], whole.points("test")[0]) and len(whole.points("train")[0]) == 36


def test_eval_batches_are_every_point_in_order():
    data = SignalDataModule(source=Ramp(3, 5), eval_batch_size=4)
    batches = list(data.eval_batches("test"))
    assert [len(b["index"]) for b in batches] == [4, 4, 4, 3]
    assert torch.equal(torch.cat([b["coords"] for b in batches]), data.points("test")[0])


def test_processes_share_the_evaluation_and_the_fingerprint_tells_signals_apart(monkeypatch):
    data = SignalDataModule(source=Ramp(3, 3), eval_batch_size=4)
    found = []
    for rank in (0, 1):
        monkeypatch.setattr(data, "_world", lambda rank=rank: (rank, 2))
        found += [batch["index"] for batch in data.eval_batches("test")]
    assert sorted(torch.cat(found).tolist()) == list(range(9)) and all(len(index) for index in found)
    other = SignalDataModule(source=Ramp(3, 4))
    assert data.fingerprint("test") == SignalDataModule(source=Ramp(3, 3)).fingerprint("test")
    assert len({data.fingerprint("test"), data.fingerprint("train"), other.fingerprint("test")}) == 3


def test_an_axis_of_one_sample_is_kept():
    assert len(SignalDataModule(source=Ramp(1, 4), stride=2).points("test")[0]) == 2


@pytest.mark.parametrize(
    "options, message",
    [
        ({"batch_size": 0}, r"data\.batch_size must be a whole number >= 1"),
        ({"eval_batch_size": 0}, r"data\.eval_batch_size must be a whole number >= 1"),
        ({"stride": 0}, r"data\.stride must be a whole number >= 1"),
        ({}, r"no split 'tset'\. Closest: test"),
    ],
)
def test_bad_settings_are_one_sentence(options, message):
    with pytest.raises(UserError, match=message):
        SignalDataModule(source=Ramp(2, 2), **options).points("tset")


@pytest.mark.parametrize("name", ["photograph", "image_file", "audio", "video"])
def test_configuration_is_the_signature_and_explains_every_key(repo, name):
    path = repo / "conf" / "data" / f"{name}.yaml"
    data = OmegaConf.load(path)
    config = OmegaConf.create({"seed": 0, "paths": {"data": "somewhere"}, "data": data})
    check(config)
    assert resolve(config.data._target_) is SignalDataModule
    assert set(config.data) - {"_target_"} == set(inspect.signature(SignalDataModule).parameters)
    source = resolve(config.data.source._target_)
    keys = set(config.data.source) - {"_target_"}
    assert keys == set(inspect.signature(source).parameters)
    source(**{key: config.data.source[key] for key in keys})
    for line in path.read_text().splitlines():
        assert line.startswith(("#", "_target_", "source:", "  _target_")) or "  # " in line, line
