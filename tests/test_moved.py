"""What an older version left behind stays usable: its run folder continues, its exports load and sample.

The files in fixtures/run_a39c4bd were written by commit a39c4bd, before classes moved (`common.targets.MOVED`): an
edm_tiny of width 8 and depth 1 stopped after 3 of 6 steps, its export after 6, and an export of a DEQ-INR.
"""

import shutil
from pathlib import Path

import pytest
import torch
from hydra import compose, initialize_config_dir
from safetensors.torch import load_file

from common.errors import UserError
from common.runtime.cli.launch import quiet, register_resolvers
from common.runtime.verbs.fit import fit_task
from common.targets import MOVED, current, resolve
from common.weights.export import load

REPO = Path(__file__).resolve().parent.parent
OLD = REPO / "tests" / "fixtures" / "run_a39c4bd"
SAME = (
    "trainer=cpu", "evaluate=none", "callbacks.pictures=null", "callbacks.progress=null", "data.batch_size=32",
    "project.net.model.width=8", "project.net.model.depth=1", "trainer.max_steps=6", "plan.parameters=null",
    "callbacks.checkpoints.every_n_steps=3", "speed.threads=1", "run.experiment=edm_tiny",
)  # fmt: skip


def composed(folder: Path, *overrides: str):
    register_resolvers()
    quiet()
    with initialize_config_dir(str(REPO / "conf"), version_base="1.3"):
        return compose("config", ["+experiment=edm_tiny", *SAME, f"run.dir={folder}", *overrides])


@pytest.fixture
def old_run(tmp_path) -> Path:
    """A copy of the run folder, its export left out."""
    folder = tmp_path / "run"
    shutil.copytree(OLD, folder, ignore=shutil.ignore_patterns("export*"))
    return folder


def test_an_old_run_goes_on_to_the_weights_it_would_have_had(old_run, capsys):
    fit_task(composed(old_run))
    assert "continuing step-00000003.ckpt" in capsys.readouterr().out
    expected, found = (load_file(folder / "export" / "model.safetensors") for folder in (OLD, old_run))
    assert expected.keys() == found.keys()
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=1e-4, atol=1e-6, msg=name)


def test_an_old_run_with_other_settings_is_still_refused(old_run):
    with pytest.raises(UserError, match=r"other settings: project\.time\.mean"):
        fit_task(composed(old_run, "project.time.mean=-1.0"))


def test_old_exports_load_and_sample():
    images = load(OLD / "export").sample(2, seed=0)
    assert images.shape == (2, 1, 8, 8) and images.isfinite().all()
    network = load(OLD / "export_inr").net
    assert type(network).__module__ == "projects.torchdeq.inr_networks"


@pytest.mark.parametrize("old", sorted(MOVED))
def test_what_moved_exists_at_its_new_place(old):
    new = MOVED[old]
    assert (REPO / f"{new.replace('.', '/')}.py").is_file() or callable(resolve(new))
    if new.rpartition(".")[2][0].islower():  # a module: what is asked for is a class in it
        old, new = f"{old}.Name", f"{new}.Name"
    assert current(old) == current(new) == new
