"""The counting that every data module shares, on its own; exact restarts of whole runs are tested with each module."""

from types import SimpleNamespace

import pytest

from common.data.restart import Batches, RestartingDataModule
from common.errors import UserError


class Plain(RestartingDataModule):
    sampled = "things"

    def __init__(self, batch_size=12, seed=0, shuffle=True):
        super().__init__()
        self.batch_size, self.seed, self.shuffle = batch_size, seed, shuffle


def trainer(done=0, accumulate=1, rank=0, world_size=1, overfit=0):
    progress = SimpleNamespace(total=SimpleNamespace(processed=done))
    return SimpleNamespace(
        fit_loop=SimpleNamespace(epoch_loop=SimpleNamespace(batch_progress=progress)),
        accumulate_grad_batches=accumulate,
        distributed_sampler_kwargs={"rank": rank, "num_replicas": world_size},
        global_rank=rank,
        world_size=world_size,
        overfit_batches=overfit,
    )


def test_samples_are_counted_in_joint_micro_batches_and_a_restart_counts_on():
    data = Plain()
    assert data.samples_seen() == 0 and data.micro_batch_size == 12
    data.trainer = trainer(done=5, accumulate=3, world_size=2)
    assert data.micro_batch_size == 4 and data.samples_seen() == 20
    state = data.state_dict()
    assert state == {"images_seen": 20, "batches": 5, "seed": 0, "shuffle": True}
    later = Plain(batch_size=6)  # another batch size goes on at the same sample
    later.load_state_dict(state)
    later.trainer = trainer(done=5)
    assert later.samples_seen() == 20
    later.trainer = trainer(done=7)
    assert later.samples_seen() == 32


def test_a_changed_order_is_said():
    data = Plain(seed=1, shuffle=False)
    with pytest.warns(
        UserWarning, match=r"order of the things changes .* seed was 0, is 1; shuffle was True, is False"
    ):
        data.load_state_dict({"images_seen": 8, "batches": 1, "seed": 0, "shuffle": True})


def test_processes_share_the_draws_of_one_process():
    whole = next(iter(Plain()._train_sampler(50)))
    shares = []
    for rank in range(3):
        data = Plain()
        data.trainer = trainer(rank=rank, world_size=3)
        shares += next(iter(data._train_sampler(50)))
    assert shares == whole


def test_overfitting_begins_anew_and_uneven_shares_are_refused():
    data = Plain()
    data.trainer = trainer(done=4, overfit=2)
    assert next(iter(data._train_sampler(50)))[0][1] == 0
    data.trainer = trainer(done=4, accumulate=5)
    with pytest.raises(UserError, match=r"multiple of 5 \(processes x trainer\.accumulate_grad_batches\), got 12"):
        data._train_sampler(50)


def test_no_more_workers_than_cores(monkeypatch, recwarn):
    monkeypatch.setattr("os.sched_getaffinity", lambda process: {0, 1}, raising=False)
    made = [Batches([0], [[0]], num_workers=asked, pin_memory=False).loader.num_workers for asked in (0, 1, 8)]
    assert made == [0, 1, 2] and not [w for w in recwarn if "suggested max number of worker" in str(w.message)]
