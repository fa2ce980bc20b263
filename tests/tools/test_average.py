"""tools.average on a real run of two widths and three checkpoints: against an average that was tracked all along."""

import pytest
import torch
from hydra import compose, initialize_config_dir

from common.runtime.cli.launch import quiet, register_resolvers
from common.runtime.verbs.export import export_task
from common.runtime.verbs.fit import fit_task
from common.weights.export import load
from tools import average

# Wide profiles: in 24 steps a width of 0.1 already spans several of them.
WIDTHS = {"narrow": 0.10, "wide": 0.20, "tracked": 0.15}
SMALL = (
    "trainer=cpu", "evaluate=none", "callbacks.pictures=null", "callbacks.progress=null", "data.batch_size=32",
    "project.net.model.width=8", "project.net.model.depth=1", "trainer.max_steps=24", "plan.parameters=null",
    "callbacks.checkpoints.every_n_steps=4", "callbacks.checkpoints.keep=6", "speed.threads=1",
    "run.experiment=edm_tiny",
    "project.optimizer.lr=0.01", "schedule@project.schedule=constant",
    *(f"+ema.profiles.{name}={{_target_: {average.POWER}, std: {std}}}" for name, std in WIDTHS.items()),
)  # fmt: skip


@pytest.fixture(scope="module")
def composed(repo):
    def build(folder, *overrides):
        register_resolvers()
        quiet()
        with initialize_config_dir(str(repo / "conf"), version_base="1.3"):
            return compose("config", ["+experiment=edm_tiny", *SMALL, f"run.dir={folder}", *overrides])

    return build


@pytest.fixture(scope="module")
def run(composed, tmp_path_factory):
    """A finished run whose stored configuration no longer names the average that will be asked for."""
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("average") / "run"
    fit_task(composed(folder))
    export_task(composed(folder, "evaluate.average=tracked"))
    stored = folder / "config.yaml"
    stored.write_text(stored.read_text().replace("    tracked:", "    untracked:"))
    return folder


def weights(folder) -> dict:
    return {name: value for name, value in load(folder).net.state_dict().items() if value.is_floating_point()}


def test_a_run_gives_the_average_that_was_tracked(run, capsys):
    assert average.main([str(run), "--std", "0.15"]) == 0
    shown = capsys.readouterr().out
    assert shown.count(", step ") == 12 and "step-00000024.ckpt:wide, std 0.2, step 24" in shown
    made, tracked = weights(run / "average-0.15"), weights(run / "export")
    assert average.main([str(run), "--std", "0.05", "--out", str(run / "narrow")]) == 0
    narrow = weights(run / "narrow")
    error = sum(float((made[name] - tracked[name]).square().sum()) for name in tracked)
    apart = sum(float((narrow[name] - tracked[name]).square().sum()) for name in tracked)
    assert error < 0.01 * apart, (error, apart)
    exported = load(run / "average-0.15")
    assert exported.meta["average"] == "power_150 reconstructed" and exported.meta["step"] == 24
    assert exported.sample(2, seed=0).isfinite().all()


def test_exports_give_the_same_as_their_run(run, composed, tmp_path, capsys):
    folders = []
    for name in ("narrow", "wide"):
        for step in (20, 24):
            cfg = composed(run, f"evaluate.average={name}", f"resume={run}/checkpoints/step-{step:08d}.ckpt")
            export_task(cfg)
            folders.append((run / "export").rename(tmp_path / f"{name}{step}"))
    assert average.main([*map(str, folders), "--std", "0.15", "--out", str(tmp_path / "made")]) == 0
    assert capsys.readouterr().out.count("step 24") == 2
    made = load(tmp_path / "made")
    assert made.meta["profile"] == {"_target_": average.POWER, "std": 0.15}
    assert made.sample(1).isfinite().all()


def test_one_sentence_for_what_cannot_be_made(run, tmp_path, capsys):
    for words, sentence in [
        ([tmp_path, "--out", tmp_path / "x"], "is neither a run (config.yaml) nor an export"),
        ([tmp_path], "Name a new folder with --out"),
        ([run, run], "give it alone"),
        ([run, "--step", 3], "no stored average up to step 3"),
    ]:
        assert average.main([*map(str, words), "--std", "0.1"]) == 2
        assert sentence in capsys.readouterr().err
    assert average.main([str(run), "--std", "0.5"]) == 2 and "std must be > 0 and <= 0.28868" in capsys.readouterr().err
