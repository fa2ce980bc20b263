"""The CPU seconds that tests of one paper may take together: the files that count, and the message above the budget."""

import importlib.util
from pathlib import Path

import pytest

spec = importlib.util.spec_from_file_location("session_hooks", Path(__file__).with_name("conftest.py"))
hooks = importlib.util.module_from_spec(spec)
spec.loader.exec_module(hooks)


@pytest.mark.parametrize(
    ("file", "paper"),
    [
        ("tests/projects/test_ect.py", "ect"),
        ("tests/projects/test_ect_distill.py", "ect"),
        ("tests/projects/deq_flow/test_network.py", "deq_flow"),
        ("tests/projects/test_deq_flow.py", "deq_flow"),
        ("tests/projects/test_phantom_grad.py", "phantom_grad"),
        ("tests/projects/conftest.py", None),
        ("tests/common/deq/test_solve.py", None),
        ("tests/test_cli.py", None),
    ],
)
def test_a_file_belongs_to_its_paper(file, paper):
    assert hooks.paper_of(file) == paper


def test_a_paper_above_the_limit_is_named_with_its_slowest_files():
    spent = {"tests/projects/test_ect.py": 20.0, "tests/projects/test_ect_distill.py": 31.0, "tests/test_cli.py": 90.0}
    assert hooks.over_budget(spent, 51.0) == []
    (line,) = hooks.over_budget(spent, 50.0)
    files = "tests/projects/test_ect_distill.py 31, tests/projects/test_ect.py 20"
    assert line == f"the tests of ect took 51 CPU seconds, of 25: {files}"
