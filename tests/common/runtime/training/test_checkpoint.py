"""Files: whole or not there, checked by sum, plain data only. (Whole runs: tests/test_resume.py.)"""

import pickle

import pytest
import torch

from common.errors import UserError
from common.files import checksum_path, verify_checksum, write_checksum
from common.runtime.training.checkpoint import (
    Checkpoints,
    SafeCheckpointIO,
    latest_complete,
    list_checkpoints,
    read_checkpoint,
)


@pytest.fixture
def folder(tmp_path):
    """step-9, step-10 and step-100 with their number inside."""
    for step in (9, 10, 100):
        SafeCheckpointIO().save_checkpoint({"step": step, "w": torch.ones(3)}, tmp_path / f"step-{step:08d}.ckpt")
    return tmp_path


def test_round_trip_with_checksum_and_no_leftovers(tmp_path):
    path = tmp_path / "deep" / "step-00000001.ckpt"
    SafeCheckpointIO().save_checkpoint({"w": torch.arange(3)}, path)
    assert verify_checksum(path) is True
    assert torch.equal(SafeCheckpointIO().load_checkpoint(path)["w"], torch.arange(3))
    assert sorted(p.name for p in path.parent.iterdir()) == [path.name, path.name + ".sha256"]
    SafeCheckpointIO().remove_checkpoint(path)
    assert list(path.parent.iterdir()) == []


def test_newest_first_by_number_and_strangers_ignored(folder):
    (folder / "step-00000200.ckpt.sha256").write_text("left behind")
    (folder / ".tmp-1-step-00000300.ckpt").write_text("cut short")
    (folder / "last.ckpt").write_text("not ours")
    assert [p.name for p in list_checkpoints(folder)] == [f"step-{n:08d}.ckpt" for n in (100, 10, 9)]
    assert list_checkpoints(folder / "nowhere") == []


def test_a_damaged_one_is_named_and_passed_over(folder):
    newest = folder / "step-00000100.ckpt"
    newest.write_bytes(newest.read_bytes()[:-1])
    messages = []
    assert latest_complete(folder, say=messages.append) == folder / "step-00000010.ckpt"
    assert len(messages) == 1 and str(newest) in messages[0]
    with pytest.raises(UserError, match="does not match its checksum") as error:
        read_checkpoint(newest)
    assert str(newest) in str(error.value)
    for path in list_checkpoints(folder):
        path.write_bytes(b"")
    assert latest_complete(folder, say=messages.append) is None and len(messages) == 4


def test_missing_file(tmp_path):
    with pytest.raises(UserError, match=r"No checkpoint at .*step-00000001.ckpt"):
        read_checkpoint(tmp_path / "step-00000001.ckpt")


class Hostile:
    def __reduce__(self):
        return (open, ("executed", "w"))


def test_code_in_a_checkpoint_is_not_run_even_with_a_matching_checksum(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for number, content in enumerate((pickle.dumps(Hostile()), None)):
        path = tmp_path / f"step-0000000{number}.ckpt"
        if content is None:
            torch.save({"state_dict": Hostile()}, path)
        else:
            path.write_bytes(content)
        write_checksum(path)
        with pytest.raises(UserError, match=r"only tensors and plain data are read|is damaged"):
            read_checkpoint(path)
    assert not (tmp_path / "executed").exists()


def test_what_is_not_plain_data_shows_when_it_is_read_back(tmp_path):
    """Guards the rule that hyper-parameters stay plain: a path object in a checkpoint would lock the run out."""
    path = tmp_path / "step-00000001.ckpt"
    SafeCheckpointIO().save_checkpoint({"where": tmp_path}, path)
    with pytest.raises(UserError):
        read_checkpoint(path)


def test_the_checksum_file_has_the_format_of_sha256sum(folder):
    path = folder / "step-00000009.ckpt"
    digest, name = checksum_path(path).read_text().split()
    assert len(digest) == 64 and name == path.name


@pytest.mark.parametrize("options", [{"every_n_steps": 0}, {"keep": 0}])
def test_settings_out_of_range(options):
    with pytest.raises(UserError, match="every_n_steps >= 1 and keep >= 1"):
        Checkpoints(dirpath="x", **options)


def test_the_newest_are_kept(composed, tmp_path):
    from common.runtime.verbs.fit import fit_task

    fit_task(composed(tmp_path / "run", "trainer.max_steps=7", "callbacks.checkpoints.every_n_steps=2",
                      "callbacks.checkpoints.keep=3"))  # fmt: skip
    kept = [p.name for p in list_checkpoints(tmp_path / "run/checkpoints")]
    assert kept == [f"step-{n:08d}.ckpt" for n in (7, 6, 4)]
    assert len(list((tmp_path / "run/checkpoints").iterdir())) == 6
