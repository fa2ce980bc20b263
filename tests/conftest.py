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
    """experiment_config(name) -> its configuration, composed once per process; a copy, free to change."""
    from hydra import compose, initialize_config_dir

    from common.runtime.cli.launch import register_resolvers

    @cache
    def composed(name: str):
        register_resolvers()
        with initialize_config_dir(str(REPO / "conf"), version_base="1.3"):
            return compose("config", overrides=[f"+experiment={name}", f"run.experiment={name}"])

    return lambda name: composed(name).copy()


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

    Told to use it (DATA_ROOT set) and missing: fails with the fix. Not told and not there: skipped with the reason.
    """
    told = os.environ.get("DATA_ROOT")
    root = Path(told) if told else REPO.parent / "shared" / "data"
    if root.is_dir():
        return root.resolve()
    if told:
        pytest.fail(f"DATA_ROOT={told} is not a folder: point it at the folder that holds cifar10/ and weights/")
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
