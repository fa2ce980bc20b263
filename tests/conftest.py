"""Fixtures every test file may use. No test reaches the network or writes outside its tmp_path."""

import os
import sys
from functools import cache
from pathlib import Path

import pytest

REPO = Path(__file__).resolve().parent.parent
os.environ.setdefault("WANDB_MODE", "offline")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("OMP_NUM_THREADS", "1")


BUDGET = 25  # CPU seconds that the own tests of one paper may take, on two idle cores
TOO_MUCH = 3 * BUDGET  # fails: processors and neighbours change CPU seconds by a factor of 2.5
PAPERS = sorted(path.parent.name for path in REPO.glob("projects/*/README.md"))
spent: dict[str, float] = {}  # CPU seconds of this process by test file; of all workers in the process that steers them


def cpu_seconds() -> float:
    """Of this process and the children it has waited for."""
    return sum(os.times()[:4])


def paper_of(file: str) -> str | None:
    """tests/projects/<paper>/... and tests/projects/test_<paper>*.py; the longest name that fits. Else None."""
    parts = Path(file).parts
    if parts[:2] != ("tests", "projects"):
        return None
    name = parts[2].removeprefix("test_").removesuffix(".py")
    return max((p for p in PAPERS if name == p or name.startswith(f"{p}_")), key=len, default=None)


def over_budget(spent: dict[str, float], limit: float) -> list[str]:
    """One line per paper whose test files took more than `limit` CPU seconds together."""
    files: dict[str, dict[str, float]] = {}
    for file, seconds in spent.items():
        if paper := paper_of(file):
            files.setdefault(paper, {})[file] = seconds
    lines = []
    for paper, own in files.items():
        if sum(own.values()) > limit:
            slowest = ", ".join(f"{file} {own[file]:.0f}" for file in sorted(own, key=own.get, reverse=True)[:3])
            lines.append(f"the tests of {paper} took {sum(own.values()):.0f} CPU seconds, of {BUDGET}: {slowest}")
    return lines


def pytest_runtest_logstart(nodeid, location):
    global since
    since = cpu_seconds()


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item, call):
    global since
    report, now = (yield), cpu_seconds()
    report.cpu_seconds, since = now - since, now
    return report


def pytest_runtest_logreport(report):
    file = report.nodeid.split("::")[0]
    spent[file] = spent.get(file, 0) + getattr(report, "cpu_seconds", 0)


def pytest_sessionfinish(session, exitstatus):
    workers_do_not_judge = hasattr(session.config, "workerinput")
    if not workers_do_not_judge and over_budget(spent, TOO_MUCH) and exitstatus == 0:
        session.exitstatus = pytest.ExitCode.TESTS_FAILED


def pytest_terminal_summary(terminalreporter):
    for line in over_budget(spent, TOO_MUCH):
        terminalreporter.write_line(f"FAILED {line}. Make them smaller, or mark what only make check needs as full.")
    for line in set(over_budget(spent, BUDGET)) - set(over_budget(spent, TOO_MUCH)):
        terminalreporter.write_line(f"note: {line}")


def pytest_addoption(parser):
    parser.addoption("--full", action="store_true", help="also step every experiment at its published depth")


def pytest_collection_modifyitems(config, items):
    if not config.getoption("--full"):
        left_out = [item for item in items if item.get_closest_marker("full")]
        items[:] = [item for item in items if not item.get_closest_marker("full")]
        config.hook.pytest_deselected(items=left_out)


@pytest.fixture(scope="session")
def repo() -> Path:
    return REPO


@pytest.fixture(scope="session")
def experiment_config():
    """experiment_config(name, *overrides) -> its configuration, composed once per process; a copy, free to change."""
    from hydra import compose, initialize_config_dir

    from common.runtime.cli.launch import register_resolvers

    @cache
    def composed(name: str, *overrides: str):
        register_resolvers()
        with initialize_config_dir(str(REPO / "conf"), version_base="1.3"):
            return compose("config", overrides=[f"+experiment={name}", f"run.experiment={name}", *overrides])

    return lambda name, *overrides: composed(name, *overrides).copy()


@pytest.fixture(scope="session")
def forked_command():
    """forked_command(words, folder, before=None, **environment) -> started child that runs `python -m projects.run
    <words>` in `folder`, after calling `before()`. It writes stdout.txt and stderr.txt there. `join()` it and read
    `exitcode`.

    A fork has torch and Lightning imported already: a fresh interpreter takes 6 CPU seconds for that.
    """
    import multiprocessing

    from projects import run

    def start(words, folder: Path, before=None, **environment: str):
        def work():
            sys.stdout, sys.stderr = (open(folder / f"{name}.txt", "w") for name in ("stdout", "stderr"))  # noqa: SIM115
            os.dup2(sys.stdout.fileno(), 1)
            os.dup2(sys.stderr.fileno(), 2)
            os.chdir(folder)
            os.environ.update(environment)
            sys.argv = ["projects/run.py", *map(str, words)]
            if before is not None:
                before()
            sys.exit(run.main())

        child = multiprocessing.get_context("fork").Process(target=work)
        child.start()
        return child

    return start


@pytest.fixture(scope="session")
def data_root() -> Path:
    """The folder with cifar10/, weights/, ... : $DATA_ROOT, else ../shared/data beside the checkout.

    DATA_ROOT set but missing: fails with the fix. Not set and not found: skipped with the reason.
    """
    given = os.environ.get("DATA_ROOT")
    root = Path(given) if given else REPO.parent / "shared" / "data"
    if root.is_dir():
        return root.resolve()
    if given:
        pytest.fail(f"DATA_ROOT={given} is not a folder: point it at the folder that holds cifar10/ and weights/")
    pytest.skip("no data folder: set DATA_ROOT to the folder that holds cifar10/ and weights/ to run this test")


@pytest.fixture(scope="session")
def data_folder(data_root):
    """data_folder("mnist") -> that folder of the data root; missing: fails when DATA_ROOT was set, else skips."""

    def find(name: str) -> Path:
        folder = data_root / name
        if folder.is_dir():
            return folder
        if os.environ.get("DATA_ROOT"):
            pytest.fail(f"{folder} is missing: put it there, or point DATA_ROOT at the folder that holds {name}/")
        pytest.skip(f"no {name}/ in {data_root}: set DATA_ROOT to the folder that holds it to run this test")

    return find


@pytest.fixture(autouse=True)
def _single_thread():
    import torch

    torch.set_num_threads(1)
    torch.manual_seed(0)
