"""Where runs and sweeps lie, decided before Hydra makes a folder."""

from pathlib import Path

import pytest

from common.errors import UserError
from common.runtime.cli.paths import expanded, remove_empty, run_dir, sweep_dir


def test_the_folder_of_a_run(monkeypatch):
    monkeypatch.setenv("HOME", "/home/someone")
    assert run_dir("out", "edm_tiny", "seed0") == "out/edm_tiny/seed0"
    assert run_dir("~/runs", "edm_tiny", "a/b") == "/home/someone/runs/edm_tiny/a/b"
    assert expanded("~/x", "paths.data") == "/home/someone/x"


@pytest.mark.parametrize(("outputs", "name", "words"), [
    ("", "seed0", "paths.outputs is empty"), (" ", "seed0", "paths.outputs is empty"),
    (None, "seed0", "paths.outputs is empty"), ("out", "../../x", r"run.name=../../x leads out of paths.outputs"),
    ("out", "/x", "leads out"), ("out", "", "leads out"), ("out", "a/../../../x", "leads out"),
])  # fmt: skip
def test_folders_outside_the_outputs_are_refused(outputs, name, words):
    with pytest.raises(UserError, match=words):
        run_dir(outputs, "edm_tiny", name)


def test_the_same_sweep_has_the_same_folder_and_another_one_has_not():
    words = ["+experiment=edm_tiny", "project.optimizer.lr=1e-3,1e-4"]
    first = sweep_dir("out", words)
    assert first.startswith("out/multirun/edm_tiny/sweep-")
    for same in ("task=test", "resume=never", "speed.threads=1", "hydra/launcher=parallel"):
        assert sweep_dir("out", [*words, same]) == first
    for other in ("seed=0,1", "trainer.max_steps=9", "project.omega=1", "evaluate.samplers.heun.steps=1,2"):
        assert sweep_dir("out", [*words, other]) != first
    assert "/experiments/" in sweep_dir("out", ["+experiment=edm_tiny,ect_tiny"])


def test_only_empty_folders_go_and_none_above_the_outputs(tmp_path):
    outputs = tmp_path / "outputs"
    (outputs / "a/one").mkdir(parents=True)
    (outputs / "b").mkdir()
    remove_empty(outputs / "a/one", outputs)
    assert sorted(p.name for p in outputs.iterdir()) == ["b"]
    remove_empty(outputs / "b", outputs)
    assert not outputs.exists() and tmp_path.exists()
    (tmp_path / "kept").mkdir()
    (tmp_path / "kept/file").write_text("x")
    remove_empty(tmp_path / "kept", outputs)
    assert (tmp_path / "kept/file").is_file()
    (tmp_path / "own/run").mkdir(parents=True)
    remove_empty(tmp_path / "own/run", Path("elsewhere"))
    assert (tmp_path / "own").is_dir(), "a folder outside the outputs is the user's"
