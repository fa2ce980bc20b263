"""Needed runs: trained first when missing, used when there, one sentence when they fail, one at a time."""

import fcntl
import multiprocessing
import time

import pytest
from hydra.core.override_parser.overrides_parser import OverridesParser
from hypothesis import given, settings
from hypothesis import strategies as st
from omegaconf import OmegaConf

from common.errors import UserError
from common.files import write_checksum, write_json
from common.runtime.cli import needs
from common.runtime.cli.needs import ensure, is_usable, override
from common.runtime.verbs import fit


def finish(folder, value: float = 1.0) -> None:
    """What a finished run leaves behind, as far as `needs` looks."""
    (folder / "export").mkdir(parents=True, exist_ok=True)
    (folder / "export/model.safetensors").write_bytes(b"weights")
    write_checksum(folder / "export/model.safetensors")
    write_json(folder / "result.json", {"objective": value, "step": 2})


@pytest.fixture
def commands(monkeypatch, tmp_path) -> list:
    """The commands that would be run; each finishes its run."""
    seen = []

    def run(command: list[str]) -> int:
        seen.append(command)
        finish(tmp_path / "teacher")
        return 0

    monkeypatch.setattr(needs, "_run", run)
    return seen


@pytest.fixture
def need(tmp_path) -> dict:
    return {"experiment": "edm_tiny", "dir": str(tmp_path / "teacher"), "overrides": ["trainer.max_steps=2"]}


def test_trained_when_missing_and_used_afterwards(need, commands, tmp_path):
    messages = []
    say = lambda text, **_: messages.append(text)
    result = ensure("teacher", need, seed=3, paths={"outputs": tmp_path}, say=say)
    assert result == {"objective": 1.0, "step": 2} and len(commands) == 1
    command = commands[0]
    assert command[1:5] == ["-m", "projects.run", "+experiment=edm_tiny", "seed=3"]
    assert f"run.dir='{tmp_path}/teacher'" in command and command[-1] == "trainer.max_steps=2"
    assert f"paths.outputs='{tmp_path}'" in command
    assert "training it first" in messages[0]
    assert ensure("teacher", need, seed=3, paths={}, say=say) == result and len(commands) == 1
    assert "using the finished edm_tiny run" in messages[-1]


@pytest.mark.parametrize("damage", ["export/model.safetensors", "export/model.safetensors.sha256", "result.json"])
def test_a_run_that_is_not_whole_is_made_again(damage, need, commands, tmp_path):
    finish(tmp_path / "teacher")
    assert is_usable(tmp_path / "teacher")
    if damage.endswith("safetensors"):
        (tmp_path / "teacher" / damage).write_bytes(b"weight5")
    else:
        (tmp_path / "teacher" / damage).unlink()
    assert not is_usable(tmp_path / "teacher")
    ensure("teacher", need, seed=0, paths={})
    assert len(commands) == 1


def test_a_shortened_run_does_not_stand_in_for_a_whole_one(need, commands, tmp_path, experiment_config):
    finish(tmp_path / "teacher")
    messages = []
    whole = {key: value for key, value in need.items() if key != "overrides"}
    with pytest.raises(UserError, match="did not finish"):  # the stand-in above trains 2 steps, whatever is configured
        ensure("teacher", whole, seed=0, paths={}, say=lambda text, **_: messages.append(text))
    assert len(commands) == 1 and "training it first for 8,000 steps" in messages[0]
    command = next(text for text in messages[0].split('"') if "needs.teacher.overrides=" in text)
    assert experiment_config("ect_tiny", command).needs.teacher.overrides == ["trainer.max_steps=20"]


@pytest.mark.parametrize(("code", "exit_code"), [(3, 3), (0, 1), (143, 143)])
def test_a_failing_one_is_one_sentence_with_its_exit_code(code, exit_code, need, monkeypatch):
    monkeypatch.setattr(needs, "_run", lambda command: code)
    with pytest.raises(UserError, match=r"needed first \(teacher: edm_tiny\) did not finish; see above") as error:
        ensure("teacher", need, seed=0, paths={})
    assert error.value.exit_code == exit_code and "\n" not in str(error.value)


def test_unknown_or_missing_keys(need):
    for wrong in ({**need, "folder": "x"}, {"experiment": "edm_tiny"}):
        with pytest.raises(UserError, match=r"needs.teacher must hold experiment and dir"):
            ensure("teacher", wrong, seed=0, paths={})


def test_a_second_run_waits_and_uses_the_first_ones(need, commands, tmp_path):
    """The lock is held by another process that finishes the run: nothing is trained twice."""
    folder = tmp_path / "teacher"
    folder.mkdir()
    held = multiprocessing.get_context("fork").Event()

    def first():
        with open(folder / ".lock", "w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            held.set()
            time.sleep(0.3)
            finish(folder, 7.0)

    child = multiprocessing.get_context("fork").Process(target=first)
    child.start()
    assert held.wait(10)
    assert ensure("teacher", need, seed=0, paths={}) == {"objective": 7.0, "step": 2}
    assert commands == []
    child.join()


@settings(deadline=None, max_examples=50)
@given(
    st.text(
        st.sampled_from(
            "/ab ='\\",
        )
        | st.characters(codec="utf-8", exclude_characters="$\0\n\r"),
        min_size=1,
    )
)
def test_any_path_survives_the_override_grammar(path):
    assert OverridesParser.create().parse_override(override("run.dir", path)).value() == path


def test_the_real_thing(composed, tmp_path, capfd):
    """ECT trains its teacher in a process of its own, starts from its weights, and reuses it the next time."""

    def cfg(name: str):
        made = composed(tmp_path / name, "~needs.random", "table=[]", "trainer.max_steps=2", experiment="ect_tiny")
        small = ["project.net.model.width=16", "project.net.model.depth=1", "evaluate=none", "callbacks.pictures=null"]
        OmegaConf.update(made, "needs.teacher.overrides", ["trainer.max_steps=2", *small], force_add=True)
        return made

    fit.fit_task(cfg("run"))
    out = capfd.readouterr().out
    assert "no finished edm_tiny run" in out and "training it first for 2 steps" in out and "Initial weights:" in out
    assert is_usable(tmp_path / "edm_tiny/seed0")
    fit.fit_task(cfg("again"))
    assert "using the finished edm_tiny run" in capfd.readouterr().out


def test_the_real_thing_failing(composed, tmp_path, capfd):
    cfg = composed(tmp_path / "run", "~needs.random", "table=[]", experiment="ect_tiny")
    OmegaConf.update(cfg, "needs.teacher.overrides", ["data.batch_size=0"], force_add=True)
    with pytest.raises(UserError, match="needed first") as error:
        fit.fit_task(cfg)
    assert error.value.exit_code == 2
    assert "data.batch_size must be a whole number of 1 or more, got 0" in capfd.readouterr().err
    assert not (tmp_path / "run").exists()
