"""The table of ranges of configuration numbers. Range checks of single arguments are tested where they are used."""

import math
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from common.limits import COUNT, FINITE, RANGES, SHARE, configuration_problems, range_of
from common.runtime.cli.check import check

CONF = Path(__file__).resolve().parents[2] / "conf"


def problems(path, value):
    tree = value
    for part in reversed(path.split(".")):
        tree = {part: tree}
    return list(configuration_problems(tree))


@pytest.mark.parametrize(
    ("path", "wrong", "right"),
    [
        ("speed.threads", [100_000, -1, 0, 1.5], [1, 64]),
        ("trainer.log_every_n_steps", [0, -1], [1]),
        ("trainer.accumulate_grad_batches", [0, -2], [1, 8]),
        ("trainer.devices", [-1, 0, [-1]], [1, 8, [0, 1], "auto"]),
        ("trainer.max_steps", [0, -1], [1, 5_004_000]),
        ("trainer.max_epochs", [-2], [-1, 3]),
        ("trainer.gradient_clip_val", [math.nan, math.inf, -1.0], [0.1, None]),
        ("seed", [10**29, -1, 2**32], [0, 1234, 2**32 - 1]),
        ("sample.seed", [-3], [0]),
        ("sample.classes", [[-1], [0, 10**30]], [[0, 3], None]),
        ("sample.samples", [0], [64]),
        ("data.batch_size", [0, -5, 10**30], [1, 308_700]),
        ("data.num_workers", [-1, 5000], [0, 16]),
        ("project.optimizer.lr", [-1e-3, math.nan, math.inf], [0.0, 3e-4]),
        ("project.net.deq.solver.tol", [-1.0, 2.0, math.nan], [0.0, 1e-6]),
        ("project.net.dropout", [-0.1, 1.1], [0.0, 1.0]),
        ("project.a_new_key_of_a_new_paper", [math.nan, math.inf, -math.inf, 10**29], [-3, 0.5]),
        ("evaluate.samplers.heun.s_max", [math.nan, -1.0], [math.inf, 50.0]),
    ],
)
def test_a_number_out_of_its_range_is_one_sentence(path, wrong, right):
    for value in wrong:
        (sentence,) = problems(path, value)
        assert (
            sentence.startswith(f"{path}") and " must be " in sentence and ", got " in sentence and len(sentence) < 150
        )
    for value in right:
        assert not problems(path, value)


@given(st.floats(allow_nan=False) | st.integers())
def test_ranges_hold_what_they_say(value):
    assert SHARE.holds(value) == (0 <= value <= 1)
    assert COUNT.holds(value) == (1 <= value <= 2**53 and value == int(value))
    assert FINITE.holds(value) == (abs(value) <= 2**53)


def test_the_longest_end_of_a_path_counts():
    assert range_of("project.net.backbone.stages") is FINITE and range_of("project.stages") is COUNT
    assert range_of("project.nothing") is None


def test_numbers_that_are_only_printed_are_free():
    assert not list(configuration_problems({"published": [{"value": math.nan}], "table": [], "needs": {"x": -1}}))
    assert problems("project.published.steps", 0)


@pytest.mark.parametrize(
    ("node", "word"),
    [
        ({"solver": {"max_iter": 0}, "grad": {"_target_": "x"}}, "solver.max_iter"),
        ({"solver": {"max_iter": 0}}, "solver.max_iter"),
        ({"solver": {"max_iter": 9}, "eval_solver": {"max_iter": 0}}, "eval_solver.max_iter"),
        ({"solver": {"max_iter": 9}, "eval_factor": 0.1}, "eval_factor"),
    ],
)
def test_a_layer_that_would_not_solve_is_refused(node, word):
    (sentence,) = problems("project.net.deq", node)
    assert sentence.startswith(f"project.net.deq.{word} must be") and "no step" in sentence


def test_unrolled_steps_stand_in_for_the_solver():
    assert not problems("project.net.deq", {"solver": {"max_iter": 0}, "grad": {"steps": 12}})
    assert not problems("project.net.deq", {"solver": {"max_iter": 9}, "eval_factor": 1.5})


def test_no_key_of_the_table_is_misspelt():
    """Every key stands in some configuration file, or is an argument of Lightning's Trainer or of a class of ours."""
    words = set()
    for folder, pattern in ((CONF, "*.yaml"), (CONF.parent / "common", "*.py"), (CONF.parent / "projects", "*.py")):
        for path in folder.rglob(pattern):
            words |= set(path.read_text(encoding="utf-8").replace(":", " ").replace("{", " ").split())
    trainer = {"limit_train_batches", "limit_test_batches", "limit_predict_batches", "overfit_batches",
               "val_check_interval", "check_val_every_n_epoch"}  # fmt: skip
    keys = {key.rpartition(".")[2].removesuffix("[]") for key in RANGES}
    assert keys <= words | trainer


def test_the_check_reports_a_bad_number_where_it_was_given():
    from omegaconf import OmegaConf

    from common.errors import UserError

    tree = {"trainer": {"max_steps": 0}, "project": {"schedule": {"total": "${trainer.max_steps}"}}}
    with pytest.raises(UserError) as error:
        check(OmegaConf.create(tree))
    assert str(error.value) == "trainer.max_steps must be a whole number of 1 or more, got 0."
