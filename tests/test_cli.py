"""The command line: help is instant, every mistake is one clear sentence and a non-zero exit, nothing is lost by it."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from hydra.core.singleton import Singleton

from projects import run

REPO = Path(__file__).resolve().parent.parent
QUICK = ("evaluate=none", "callbacks.pictures=null", "callbacks.progress=null", "speed.threads=1")


@pytest.fixture
def cli(tmp_path, monkeypatch, capfd):
    """`cli(*words)` -> (exit code, stdout, stderr) of `python -m projects.run`, in this process, into tmp_path."""
    state = Singleton.get_state()
    monkeypatch.setenv("ONESTEP_OUTPUTS", str(tmp_path / "outputs"))
    monkeypatch.setenv("ONESTEP_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("ONESTEP_WEIGHTS", str(tmp_path / "weights"))
    monkeypatch.delenv("DATA_ROOT", raising=False)
    monkeypatch.setenv("HYDRA_FULL_ERROR", "1")  # restored after the test; main sets it

    def call(*words: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["projects/run.py", *words])
        capfd.readouterr()
        code = run.main()
        return code, *capfd.readouterr()

    yield call
    Singleton.set_state(state)


def refused(answer, *words: str) -> str:
    """The one sentence of a refusal; it must hold `words`."""
    code, _, err = answer
    assert code == 2, err
    assert err.startswith("error: ") and err.count("\n") == 1 and len(err.split()) > 6, err
    assert "Traceback" not in err
    for word in words:
        assert word in err, err
    return err


def files(folder: Path) -> list[Path]:
    """What a run left, without Hydra's own record of the command."""
    return [p for p in sorted(folder.rglob("*")) if p.is_file() and ".hydra" not in p.parts]


TINY = "+experiment=edm_tiny"
MISTAKES = {
    "unknown experiment": (["+experiment=edm_tny"], "'edm_tny' does not exist", "Closest: edm_tiny"),
    "no experiment": ([], "No experiment given", "+experiment=<name>"),
    "experiment without its plus": (["experiment=edm_tiny"], "Write +experiment=edm_tiny"),
    "unknown verb": ([TINY, "task=fti"], "task=fti is not a verb", "Closest: fit"),
    "typo in a key": ([TINY, "trainer.max_step=3"], "trainer.max_step is not an option", "Closest: trainer.max_steps"),
    "typo in a section": ([TINY, "trainr.max_steps=3"], "trainr", "Closest: trainer"),
    "typo in a choice": ([TINY, "data=digts"], "data=digts does not exist", "Closest: digits"),
    "wrong type": ([TINY, "trainer.max_steps=abc"], "trainer.max_steps must be an integer, got 'abc'"),
    "wrong type of a number": ([TINY, "project.optimizer.lr=fast"], "project.optimizer.lr must be a number", "'fast'"),
    "missing data root": (
        ["+experiment=edm_cifar10", "data.root=/no/such/place"],
        "CIFAR-10 not found",
        "/no/such/place",
        "data.root",
    ),
    "batch size 0": ([TINY, "data.batch_size=0"], "data.batch_size must be a whole number of 1 or more, got 0"),
    "batch size below 0": ([TINY, "data.batch_size=-8"], "data.batch_size must be a whole number of 1 or more, got -8"),
    "batch that cannot be split": ([TINY, "trainer.accumulate_grad_batches=3"], "Choose a multiple of 3"),
    "no samples": (
        [TINY, "task=sample", "sample.samples=0"],
        "sample.samples must be a whole number of 1 or more, got 0",
    ),
    "no samples to measure": (
        [TINY, "evaluate.samples=0"],
        "evaluate.samples must be a whole number of 1 or more, got 0",
    ),
    "negative sigma of the network": (
        ["+experiment=ect_tiny", "needs=null", "table=[]", "init.file=null", "project.net.sigma_min=-1"],
        "project.net.sigma_min must be a number of 0 or more",
        "got -1",
    ),
    "negative sigma of the sampler": (
        [TINY, "sample.sampler.sigma_max=-1", *QUICK[2:], "evaluate=none"],
        "sample.sampler.sigma_max must be a number above 0",
        "got -1",
    ),
    "negative sigma of the data": (
        [TINY, "project.net.sigma_data=-0.5"],
        "project.net.sigma_data must be a number above 0",
    ),
    "negative learning rate": (
        [TINY, *QUICK, "project.optimizer.lr=-1"],
        "project.optimizer.lr must be a number of 0 or more",
    ),
    "decay above 1": ([TINY, "ema.profiles.ema.decay=2"], "ema.profiles.ema.decay must be a number from 0 to 1, got 2"),
    "unknown average": ([TINY, "evaluate.average=emma"], "'emma'", "Closest: ema"),
    "an average taken away": ([TINY, *QUICK, "ema=none"], "ema.profiles.ema is no average", "ema.profiles.ema=null"),
    "unknown precision": (
        [TINY, *QUICK, "trainer.precision=bf16"],
        "trainer.precision=bf16 is not known",
        "bf16-mixed",
    ),
    "negative steps": ([TINY, *QUICK, "trainer.max_steps=-5"], "trainer", "max_steps", "-5"),
    "nothing trained": ([TINY, "task=sample"], "No trained weights in", "task=fit", "init.file="),
    "nothing to measure": ([TINY, "task=test", "evaluate=none"], "Nothing to measure"),
    "weights missing": (
        ["+experiment=ect_tiny", "needs=null", "table=[]", "init.file=/no/such/export", "evaluate=none"],
        "Initial weights /no/such/export do not exist",
        "python -m projects.run +experiment=edm_tiny",
    ),
    "wrong type that others refer to": (["+experiment=ect_tiny", "trainer.max_steps=abc"], "trainer.max_steps must be"),
    "a mistake that would show only after the teacher": (
        ["+experiment=ect_tiny", "sample.sampler.sigma_max=-1"],
        "sample.sampler.sigma_max must be a number above 0",
        "got -1",
    ),
    "a place that cannot be made": (
        [TINY, *QUICK, "paths.outputs=/proc/nowhere"],
        "Cannot write /proc/nowhere",
        "paths.outputs=<folder>",
    ),
    "resume from nowhere": ([TINY, "resume=nowhere.ckpt"], "resume=nowhere.ckpt is no checkpoint file"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_is_one_sentence_and_exit_2(mistake, cli, tmp_path):
    words, *expected = MISTAKES[mistake]
    refused(cli(*words), *expected)
    assert [p for p in files(tmp_path / "outputs") if p.suffix in (".ckpt", ".safetensors", ".csv")] == []


def test_published_weights_missing(cli, data_root, tmp_path):
    """Data there, weights not: the file, its place and the command that makes it; nothing else is printed."""
    refused(
        cli("+experiment=ect_cifar10", f"data.root={data_root}", "trainer=cpu"),
        f"{tmp_path}/weights/edm-cifar10-32x32-uncond-vp/model.safetensors do not exist",
        "python -m tools.import_weights edm edm-cifar10-32x32-uncond-vp.pkl",
        "python -m projects.run +experiment=edm_cifar10",
    )
    assert files(tmp_path / "outputs") == []


def test_a_mistake_inside_an_experiment_file(cli, tmp_path):
    folder = tmp_path / "conf/experiment"
    folder.mkdir(parents=True)
    (folder / "typo_key.yaml").write_text("# @package _global_\ndefaults: [edm_tiny, _self_]\ntrainer: {max_step: 3}\n")
    (folder / "typo_type.yaml").write_text(
        "# @package _global_\ndefaults: [edm_tiny, _self_]\nproject: {net: {model: {width: wide}}}\n"
    )
    (folder / "typo_section.yaml").write_text(
        "# @package _global_\ndefaults: [edm_tiny, _self_]\nevaluat: {every: 3}\n"
    )
    own = ["--config-dir", str(tmp_path / "conf")]
    refused(cli(*own, "+experiment=typo_key"), "trainer.max_step is not an option", "Closest: max_steps")
    refused(cli(*own, "+experiment=typo_type"), "project.net.model.width must be an integer, got 'wide'")
    refused(cli(*own, "+experiment=typo_section"), "evaluat is not a section", "Closest: evaluate")


def test_an_output_folder_that_cannot_be_written(cli, tmp_path):
    (tmp_path / "file").write_text("in the way")
    refused(cli(TINY, *QUICK, f"paths.outputs={tmp_path}/file/x"), f"Cannot write {tmp_path}/file/x", "paths.outputs=")
    refused(cli(TINY, *QUICK, f"run.dir={tmp_path}/file"), f"{tmp_path}/file", "paths.outputs=")
    assert (tmp_path / "file").read_text() == "in the way"


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write into read-only folders; the case above stands in for it")
def test_a_read_only_output_folder(cli, tmp_path):
    (tmp_path / "locked").mkdir(mode=0o500)
    refused(cli(TINY, *QUICK, f"paths.outputs={tmp_path}/locked"), f"{tmp_path}/locked", "paths.outputs=")


def test_weights_of_another_architecture(cli, tmp_path):
    folder = tmp_path / "teacher"
    code, out, err = cli(TINY, *QUICK, "trainer.max_steps=1", f"run.dir={folder}", "project.net.model.width=16")
    assert code == 0 and err == "" and f"weights: {folder}/export" in out
    for file in (folder / "export", folder / "checkpoints/step-00000001.ckpt"):
        refused(
            cli(TINY, *QUICK, "trainer.max_steps=2", f"init.file={file}", "project.net.model.width=32"),
            str(file), "does not fit EDMPrecond", "mismatched tensors, first model.", "in the file", "in the network",
        )  # fmt: skip
    code, out, _ = cli(TINY, *QUICK, "trainer.max_steps=2", f"init.file={folder}/export", "project.net.model.width=16")
    assert code == 0 and "Initial weights:" in out
    # and as a finished run to be sampled under other settings
    refused(cli(TINY, "task=sample", f"run.dir={folder}", "project.net.model.width=32"), "does not fit")


@pytest.mark.parametrize("workers", [0, 2])
def test_a_corrupt_image_is_named_with_its_path(workers, cli, tmp_path, monkeypatch):
    from PIL import Image

    monkeypatch.setattr("torch.utils.data._utils.MP_STATUS_CHECK_INTERVAL", 0.2)
    pictures = tmp_path / "pictures"
    pictures.mkdir()
    for index in range(6):
        pixels = np.full((8, 8), 40 * index, dtype=np.uint8)
        Image.fromarray(pixels).save(pictures / f"{index}.png")
    bad = pictures / "3.png"
    bad.write_bytes(bad.read_bytes()[:40])
    refused(
        cli(TINY, *QUICK, "data=folder", f"data.root={pictures}", "data.source.resolution=8", "data.source.channels=1",
            "data.source.fit=exact", "data.batch_size=6", "trainer.max_steps=2", f"data.num_workers={workers}"),
        str(bad), "cannot be read", "Replace or delete that file",
    )  # fmt: skip
    assert not list(tmp_path.rglob("*.ckpt"))


def test_help_lists_experiments_and_imports_neither_torch_nor_lightning():
    code = (
        "import sys; sys.argv = ['run', '--help']\n"
        "from projects.run import main\n"
        "code = main()\n"
        "print([m for m in ('torch', 'lightning', 'hydra', 'numpy') if m in sys.modules], code)"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=REPO, capture_output=True, text=True, check=True)
    *text, last = done.stdout.splitlines()
    assert last == "[] 0" or last == "['hydra'] 0"
    names = [p.stem for p in sorted((REPO / "conf/experiment").glob("*.yaml"))]
    for name in names:
        line = next(line for line in text if line.split()[:1] == [name])
        assert len(line.split()) > 3, "each experiment is followed by its first comment line"
    for verb in ("fit", "test", "sample", "export", "plan"):
        assert any(line.strip().startswith(f"task={verb}") for line in text)


def test_refusals_import_no_torch_either():
    """A typo is answered before anything heavy is loaded."""
    code = (
        "import sys; sys.argv = ['run', '+experiment=edm_tny']\n"
        "from projects.run import main\n"
        "code = main()\n"
        "print([m for m in ('torch', 'lightning') if m in sys.modules], code)"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=REPO, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[] 2" and "Closest: edm_tiny" in done.stderr


def test_a_run_folder_explains_itself(cli, tmp_path):
    folder = tmp_path / "run"
    words = (TINY, *QUICK, "trainer.max_steps=3", "trainer.log_every_n_steps=1", f"run.dir={folder}", "seed=5")
    code, out, err = cli(*words)
    assert code == 0 and err == "", err
    for name in ("config.yaml", "overrides.yaml", "environment.json", "metrics.csv", "result.json",
                 "checkpoints/step-00000003.ckpt", "export/model.safetensors", "export/config.json",
                 "pictures/loss.png"):  # fmt: skip
        assert (folder / name).stat().st_size > 0, name
    assert "${" not in (folder / "config.yaml").read_text(), "resolved"
    assert "seed=5" in (folder / "overrides.yaml").read_text()
    assert f"run folder: {folder}" in out
    # the same command again: nothing is left to train, nothing breaks
    code, out, err = cli(*words)
    assert code == 0 and "finished: edm_tiny has trained 3 of 3 steps" in out, err


def test_measuring_is_switched_off_where_an_experiment_sets_keys_of_another_evaluation(cli, tmp_path):
    """hamburger_tiny sets evaluate.curve_split, which conf/evaluate/none.yaml does not have."""
    code, out, err = cli("+experiment=hamburger_tiny", "evaluate=none", "task=plan")
    assert code == 0 and "plan of hamburger_tiny" in out, err


def test_places_are_checked_before_any_folder_is_made(cli, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    refused(cli(TINY, *QUICK, "paths.outputs="), "paths.outputs is empty")
    refused(cli(TINY, *QUICK, "paths.data="), "paths.data is empty")
    refused(cli(TINY, *QUICK, "run.name=../../x"), "run.name=../../x leads out of paths.outputs")
    refused(cli(TINY, *QUICK, "data.batch_size=0"), "data.batch_size must be a whole number of 1 or more")
    refused(cli(TINY, "task=sample"), "No trained weights in")
    assert [p for p in tmp_path.rglob("*") if "cache" not in p.parts] == [], "refused commands leave no folders"
    assert cli(TINY, *QUICK, "trainer.max_steps=1", 'paths.outputs="~/runs"')[0] == 0
    assert (tmp_path / "home/runs/edm_tiny/seed0/result.json").is_file() and not (tmp_path / "~").exists()


def test_the_run_name_tells_settings_apart(monkeypatch):
    from common.runtime.cli.launch import run_name

    assert run_name(0, ["+experiment=edm_tiny", "trainer.max_steps=5", "logger=wandb", "task=sample"]) == "seed0"
    one, two = (run_name(3, ["+experiment=edm_tiny", f"project.optimizer.lr={lr}"]) for lr in (1e-3, 1e-4))
    assert one.startswith("seed3-") and two.startswith("seed3-") and one != two
    assert one == run_name(3, ["project.optimizer.lr=0.001", "+experiment=edm_tiny"]), "order does not matter"


def test_a_started_run_continues_without_its_initial_weights(cli, tmp_path):
    first = tmp_path / "outputs/edm_tiny/seed0"
    steps = "trainer.max_steps=2"
    assert cli(TINY, *QUICK, steps, "callbacks.checkpoints.every_n_steps=1")[0] == 0
    tuned = ("+experiment=ect_tiny", *QUICK, "needs=null", "table=[]", "project.schedule.total=4")
    weights = f"init.file={first / 'export/model.safetensors'}"
    assert cli(*tuned, steps, weights)[0] == 0
    (first / "export/model.safetensors").unlink()
    code, out, err = cli(*tuned, "trainer.max_steps=4", weights)
    assert code == 0 and "continuing step-00000002.ckpt" in out, err
    refused(cli(*tuned, steps, weights, "resume=never"), "model.safetensors do not exist")
