"""One training process per run folder; the lock goes with its holder."""

import multiprocessing
import os
import signal
import time

import pytest
from lightning.pytorch.utilities import rank_zero_only

from common.errors import UserError
from common.runtime.cli.lock import only_run

fork = multiprocessing.get_context("fork")


@pytest.fixture
def holder(tmp_path):
    """A child that holds the lock of tmp_path/run until it is killed."""
    ready, tell = fork.Pipe(duplex=False)

    def hold():
        with only_run(tmp_path / "run"):
            tell.send("held")
            time.sleep(30)

    child = fork.Process(target=hold)
    child.start()
    assert ready.poll(10)
    yield child
    child.kill()
    child.join(10)


def test_a_second_process_is_refused(holder, tmp_path):
    with pytest.raises(UserError, match=r"Another process is training in .*run\. Wait"), only_run(tmp_path / "run"):
        pytest.fail("entered")
    with only_run(tmp_path / "other"):
        pass


def test_the_lock_of_a_killed_process_is_free_at_once(holder, tmp_path):
    os.kill(holder.pid, signal.SIGKILL)
    holder.join(10)
    with only_run(tmp_path / "run"):
        pass


def test_the_lock_ends_with_the_body_also_when_it_raises(tmp_path):
    with pytest.raises(RuntimeError), only_run(tmp_path / "run"):
        raise RuntimeError

    def enter():
        with only_run(tmp_path / "run"):
            pass

    child = fork.Process(target=enter)
    child.start()
    child.join(10)
    assert child.exitcode == 0


def test_the_other_ranks_of_a_run_take_no_lock(holder, tmp_path, monkeypatch):
    monkeypatch.setattr(rank_zero_only, "rank", 1)
    with only_run(tmp_path / "run"):
        pass
