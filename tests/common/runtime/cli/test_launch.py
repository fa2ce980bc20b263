"""The entry's decisions: verbs, run names, sentences and exit codes."""

import logging
import warnings
from pathlib import Path

import pytest
from hydra.errors import InstantiationException
from hydra.utils import instantiate
from omegaconf import OmegaConf

from common.errors import UserError
from common.runtime.cli import launch
from common.runtime.training.guard import Interrupted, NonFiniteStop

CONF = Path(__file__).resolve().parents[4] / "conf"


def explained(work) -> tuple:
    try:
        work()
    except Exception as error:
        return launch.explain(error, CONF)
    raise AssertionError("nothing was raised")


def fail(error):
    raise error


@pytest.mark.parametrize(("error", "code"), [
    (UserError("One sentence."), 2), (NonFiniteStop("One sentence."), 3), (Interrupted("One sentence.", 15), 143),
    (Interrupted("One sentence.", 2), 130),
])  # fmt: skip
def test_a_refusal_keeps_its_sentence_and_code(error, code):
    assert explained(lambda: fail(error)) == ("One sentence.", code)


def test_a_refusal_inside_a_constructor_names_the_section():
    tree = OmegaConf.create({"project": {"net": {"_target_": "common.diffusion.ema.ConstantDecay", "decay": 2}}})
    sentence, code = explained(lambda: instantiate(tree.project))
    assert sentence.startswith("project.net: decay must be >= 0 and <= 1, got 2") and code == 2


def test_a_library_that_refuses_is_quoted_with_the_section():
    tree = OmegaConf.create({"trainer": {"_target_": "lightning.pytorch.Trainer", "max_steps": -5, "logger": False}})
    sentence, code = explained(lambda: instantiate(tree.trainer))
    assert code == 2 and sentence.startswith("trainer: ") and "max_steps" in sentence and "\n" not in sentence


def test_a_fault_of_the_program_is_not_explained_away():
    assert explained(lambda: fail(RuntimeError("bug"))) == (None, 1)
    assert explained(lambda: fail(KeyError("bug"))) == (None, 1)
    tree = OmegaConf.create({"net": {"_target_": "collections.deque", "iterable": 3}})
    with pytest.raises(InstantiationException):
        instantiate(tree.net)
    assert explained(lambda: instantiate(tree.net)) == (None, 1)


@pytest.mark.parametrize("error", [PermissionError(13, "Permission denied", "/locked/x"),
                                   NotADirectoryError(20, "Not a directory", "/locked/x"),
                                   OSError(28, "No space left on device", "/locked/x")])  # fmt: skip
def test_an_output_that_cannot_be_written_names_the_place(error):
    sentence, code = explained(lambda: fail(error))
    assert "/locked/x" in sentence and "paths.outputs=" in sentence and code == 2


def test_an_unknown_verb():
    cfg = OmegaConf.create({"task": "smaple"})
    with pytest.raises(UserError, match=r"task=smaple is not a verb. Closest: sample"):
        launch.launch(cfg)


def test_sections_of_free_names_are_open():
    from common.runtime.cli.check import OPEN

    schema = launch.open_sections({"needs": {}, "run": {"dir": "x"}})
    assert schema["needs"] is OPEN and schema["published"] is OPEN and schema["run"] == {"dir": "x"}


def test_quiet_hides_notes_and_keeps_warnings():
    logger = logging.getLogger("lightning.pytorch")
    level = logger.level
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        try:
            launch.quiet()
            warnings.warn("The 'train_dataloader' does not have many workers which may be a bottleneck.", stacklevel=1)
            warnings.warn("something about the run", stacklevel=1)
            assert logger.level == logging.WARNING
        finally:
            logger.setLevel(level)
    assert [str(w.message) for w in seen] == ["something about the run"]


def test_help_names_every_verb_and_group():
    text = launch.help_text(CONF)
    for word in (*(f"task={verb}" for verb in launch.VERBS), "-m", "ect_cifar10", "config groups"):
        assert word in text


def test_moved_targets_are_written_by_their_present_path():
    tree = OmegaConf.create(
        {"a": {"_target_": "common.data.digits.Digits", "b": [{"_target_": "common.runtime.guard.NonFiniteGuard"}, 3]},
         "c": {"_target_": "torch.optim.Adam", "lr": 1.0}, "d": "???"}
    )  # fmt: skip
    launch.move_targets(tree)
    assert tree.a._target_ == "common.data.images.digits.Digits"
    assert tree.a.b[0]._target_ == "common.runtime.training.guard.NonFiniteGuard"
    assert tree.c._target_ == "torch.optim.Adam"


@pytest.mark.parametrize(
    "error",
    [
        MemoryError(),
        RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate 5 bytes"),
        RuntimeError("CUDA out of memory. Tried to allocate 2 GiB"),
    ],
)
def test_too_little_memory_is_one_sentence_that_names_the_section(error):
    wrapped = InstantiationException("Error in call to target\nfull_key: project.net.model")
    wrapped.__cause__ = error
    sentence, code = launch.explain(wrapped, CONF)
    assert code == 2 and sentence.startswith("project.net.model: There is not enough memory. Lower data.batch_size")
    assert launch.explain(RuntimeError("shapes differ"), CONF) == (None, 1)
