import ast
import os
import re
import shutil
import subprocess
import sys
from types import SimpleNamespace

import pytest
import yaml

from common.errors import UserError
from common.losses.denoising import DenoisingLoss
from tools import claim, zoo
from tools.new_paper import FILES, class_name, new_paper

PAPER = dict(title="Widget Flow: α to β", venue="ICLR 2030", arxiv="3001.01234")


def test_the_new_paper_passes_its_own_tests_and_ours(tmp_path, repo):
    """A copy of the tree with the new paper in it: its test, its card, its experiment's header, its imports."""
    for folder in ("conf", "projects", "tools"):
        shutil.copytree(repo / folder, tmp_path / folder, ignore=shutil.ignore_patterns("__pycache__"))
    (tmp_path / "common").symlink_to(repo / "common")
    (tmp_path / "tests").mkdir()
    for name in ("tests/conftest.py", "tests/test_cards.py", "tests/test_layers.py", "pyproject.toml", "Makefile"):
        shutil.copy(repo / name, tmp_path / name)
    files = new_paper("widget_flow", root=tmp_path, **PAPER)
    assert all(path.is_file() for path in files) and len(files) == len(FILES)
    assert claim.load_claim("widget_flow", tmp_path / "conf")["runs"]["ours"]["experiment"] == "widget_flow_tiny"
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-k", "widget_flow", "tests"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, env={**os.environ, "PYTHONPATH": ""})
    assert done.returncode == 0, done.stdout
    assert int(re.search(r"(\d+) passed", done.stdout)[1]) >= 10, done.stdout
    assert re.search(r"\b1 xfailed\b", done.stdout), done.stdout  # the equation's case is not filled in yet
    zoo.rendered(tmp_path / "projects/widget_flow/README.md", "widget_flow", tmp_path)
    assert zoo.projects(tmp_path)["widget_flow"].title == PAPER["title"]


# (sigma^2 + sd^2) / (sigma sd)^2 |0 - y|^2 for y = [1, -0.5], sigma = 1.5, sd = 0.75: 2.8125 / 1.265625 * 1.25
RIGHT = 2.8125 / 1.265625 * 1.25


@pytest.mark.parametrize(("answer", "outcome"), [(None, "xfailed"), (RIGHT, "passed"), (1.01 * RIGHT, "failed")])
def test_the_generated_test_of_the_equation_can_fail(tmp_path, answer, outcome):
    """It runs as it is written, with a case filled in and a right, a wrong and no answer."""
    new_paper("widget", root=tmp_path, **PAPER)
    source = (tmp_path / "tests/projects/test_widget.py").read_text()
    scope = {}
    exec(compile(source, "test_widget.py", "exec"), scope)
    if answer is not None:
        scope["CASE"] = {"y": [[[[1.0, -0.5]]]], "sigma": [1.5], "noise": [[[[0.3, 2.0]]]]}
        scope["ANSWER"] = [answer]
    module = SimpleNamespace(loss=DenoisingLoss(sigma_data=0.75))
    try:
        scope["test_the_equation_on_a_case_with_a_known_answer"](module)
        found = "passed"
    except pytest.xfail.Exception as reason:
        assert "unfinished: fill in CASE and ANSWER of tests/projects/test_widget.py" in str(reason)
        found = "xfailed"
    except AssertionError:
        found = "failed"
    assert found == outcome


def test_parameters_and_configuration_name_the_same_things(tmp_path):
    """Defaults live once: the module's parameters have none, the YAML has every one (rule R5)."""
    new_paper("widget", root=tmp_path, **PAPER)
    module = ast.parse((tmp_path / "projects/widget/module.py").read_text())
    init = next(node for node in ast.walk(module) if isinstance(node, ast.FunctionDef) and node.name == "__init__")
    assert not init.args.args[1:] and all(default is None for default in init.args.kw_defaults)
    names = {argument.arg for argument in init.args.kwonlyargs}
    keys = set(yaml.safe_load((tmp_path / "conf/project/widget.yaml").read_text()))
    assert {"net", "optimizer", "schedule"} <= names
    assert keys == {"defaults", "_target_", *(names - {"net", "optimizer", "schedule"})}


def test_nothing_is_overwritten(tmp_path):
    (tmp_path / "conf/claim").mkdir(parents=True)
    (tmp_path / "conf/claim/widget.yaml").write_text("mine")
    with pytest.raises(UserError, match=r"conf/claim/widget\.yaml exists already; nothing was written"):
        new_paper("widget", root=tmp_path, **PAPER)
    assert (tmp_path / "conf/claim/widget.yaml").read_text() == "mine"
    assert not (tmp_path / "projects").exists()


@pytest.mark.parametrize("slug", ["", "Widget", "2d", "a-b", "a__b", "../a", "class", "a/b"])
def test_bad_slugs(tmp_path, slug):
    with pytest.raises(UserError, match="slug must be"):
        new_paper(slug, root=tmp_path, **PAPER)


@pytest.mark.parametrize(
    "field, value",
    [
        ("arxiv", "24061"),
        ("title", 'a "b"'),
        ("venue", " "),
        ("title", "a\nb"),
        ("venue", "A (B)"),
        ("family", 'a "b"'),
    ],
)
def test_bad_facts(tmp_path, field, value):
    with pytest.raises(UserError, match=f"{field} must"):
        new_paper("widget", root=tmp_path, **{**PAPER, field: value})
    assert list(tmp_path.iterdir()) == []


def test_class_name():
    assert class_name("deq_flow") == "DeqFlow" and class_name("ect") == "Ect"
