"""Hydra's own sections are held to lists while the configuration is loaded: nothing of a hostile one is built."""

import subprocess
import sys
from pathlib import Path

import pytest
from hydra._internal.utils import create_config_search_path
from hydra.types import RunMode

from common.errors import UserError
from common.runtime.cli import launch
from common.runtime.cli.hydra_sections import CheckedConfigLoader, use_checked_loader

CONF = Path(__file__).resolve().parents[4] / "conf"
COMMAND = "touch {marker}"
EVIL = "{{_target_: torch.utils.collect_env.run, command: '{command}'}}"


def compose(*overrides, experiment_text=None, folder=None, mode=RunMode.RUN):
    launch.register_resolvers()
    path = create_config_search_path(str(CONF))
    if experiment_text is not None:
        (folder / "experiment").mkdir()
        header = "# @package _global_\ndefaults: [/experiment/edm_tiny]\n"
        (folder / "experiment" / "sent.yaml").write_text(header + experiment_text)
        path.prepend("command-line", f"file://{folder}")
        overrides = ("+experiment=sent", *overrides)
    else:
        overrides = ("+experiment=edm_tiny", *overrides)
    return CheckedConfigLoader(path).load_configuration("config", list(overrides), run_mode=mode)


SENT = {
    "a callback": "hydra: {callbacks: {x: EVIL}}",
    "a nested one": "hydra: {callbacks: {sweep_table: {inner: [EVIL]}}}",
    "a reference": "needs: {y: EVIL}\nhydra: {callbacks: {x: '${needs.y}'}}",
    "a reference that is something else later": (
        "needs: {y_RUN: EVIL}\nhydra: {callbacks: {x: '${oc.select:needs.y_${hydra.mode},null}'}}"
    ),
    "a target by reference": "needs: {y: os.system}\nhydra: {callbacks: {x: {_target_: '${needs.y}'}}}",
    "a factory of the job's log": "hydra: {job_logging: {version: 1, formatters: {x: {'()': os.system}}}}",
    "a handler of the job's log": "hydra: {job_logging: {version: 1, handlers: {x: {class: os.system}}}}",
    "a factory of Hydra's log": "hydra: {hydra_logging: {version: 1, filters: {x: {'()': os.system}}}}",
    "an object of the log": "hydra: {job_logging: {handlers: {x: {stream: 'ext://os.system'}}}}",
    "a launcher": "hydra: {launcher: {_target_: os.system}}",
    "a sweeper": "hydra: {sweeper: {_target_: torch.hub.load}}",
    "a program's search path": "hydra: {job: {env_set: {PATH: /tmp}}}",
    "a switch of torch": "hydra: {job: {env_set: {TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD: '1'}}}",
}  # fmt: skip


@pytest.mark.parametrize("text", SENT.values(), ids=SENT.keys())
@pytest.mark.parametrize("mode", [RunMode.RUN, RunMode.MULTIRUN])
def test_an_experiment_file_cannot_make_hydra_run_code(text, mode, tmp_path):
    marker = tmp_path / "marker"
    text = text.replace("EVIL", EVIL.format(command=COMMAND.format(marker=marker)))
    with pytest.raises(UserError) as error:
        compose(experiment_text=text, folder=tmp_path, mode=mode)
    assert str(error.value).startswith("hydra.") and not marker.exists()


TYPED = [
    "+hydra.callbacks.x={_target_:torch.utils.collect_env.run,command:true}",
    "hydra.launcher._target_=os.system",
    "hydra.sweeper._target_=os.system",
    "+hydra.job_logging.handlers={x:{class:os.system}}",
    "hydra.searchpath=[pkg://this]",
    "+hydra.job.env_set.LD_PRELOAD=x.so",
]


@pytest.mark.parametrize("override", TYPED)
def test_nor_can_the_command_line(override):
    with pytest.raises(UserError, match="hydra"):
        compose(override)


def test_a_search_space_by_function_is_refused():
    with pytest.raises(UserError, match="custom_search_space would call a function"):
        compose("hydra/sweeper=search", "hydra.sweeper.custom_search_space=os.system", mode=RunMode.MULTIRUN)


def test_shell_commands_of_a_cluster_are_typed_and_not_sent(tmp_path):
    slurm = "hydra/launcher=submit_slurm"
    config = compose(slurm, "hydra.launcher.setup=[module load cuda]", mode=RunMode.MULTIRUN)
    assert config.hydra.launcher.setup == ["module load cuda"]
    with pytest.raises(UserError, match=r"hydra.launcher.setup runs commands in a shell: type it"):
        compose(slurm, experiment_text="hydra: {launcher: {setup: [x]}}", folder=tmp_path, mode=RunMode.MULTIRUN)
    with pytest.raises(UserError, match=r"hydra.launcher.partition must be one line"):
        compose(slurm, 'hydra.launcher.partition="a\nrm -r x"', mode=RunMode.MULTIRUN)


@pytest.mark.parametrize("choice", ["hydra/launcher=parallel", "hydra/launcher=submit_local", "hydra/sweeper=search"])
def test_our_own_choices_pass(choice):
    assert compose(choice, mode=RunMode.MULTIRUN).hydra.callbacks.sweep_table
    assert compose("+hydra.job.env_set={OMP_NUM_THREADS:'2'}").seed == 0


def test_jobs_of_a_sweep_are_checked_where_they_are_composed(tmp_path):
    master = compose(mode=RunMode.MULTIRUN)
    loader = CheckedConfigLoader(create_config_search_path(str(CONF)))
    with pytest.raises(UserError, match=r"hydra.launcher._target_=os.system is not allowed"):
        loader.load_sweep_config(master, ["hydra.launcher._target_=os.system", "+experiment=edm_tiny"])


def test_hydra_loads_through_the_checked_loader():
    import hydra._internal.hydra as entry

    before = entry.ConfigLoaderImpl
    try:
        use_checked_loader()
        assert type(entry.Hydra.create_main_hydra2("x", create_config_search_path(str(CONF))).config_loader) is (
            CheckedConfigLoader
        )
    finally:
        entry.ConfigLoaderImpl = before
        from hydra.core.global_hydra import GlobalHydra

        GlobalHydra.instance().clear()


def test_a_pickled_job_is_refused_before_hydra_opens_it(tmp_path):
    done = subprocess.run(
        [sys.executable, "-m", "projects.run", f"--experimental-r={tmp_path / 'job.pickle'}"],
        cwd=CONF.parent, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 2 and "reads a pickle" in done.stderr
