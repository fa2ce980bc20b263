"""Every card and the README stay true: equations point at code that exists, commands would run, links resolve."""

import ast
import re
import shlex
from functools import cache
from pathlib import Path

import pytest

REPO = Path(__file__).resolve().parent.parent
# what a card must answer, as words one of its `##` headings holds
HEADINGS = {
    "the idea": ("idea",),
    "equation -> file:function": ("equation",),
    "commands": ("command", "run it"),
    "published vs ours": ("published", "result"),
    "disagreements of paper and code": ("disagree",),
    "what is not covered": ("not covered",),
}
README_LINES = 150
PICTURE_BYTES = 300_000
FOREIGN_MODULES = {"pip", "venv", "pytest", "ruff"}
REFERENCE = re.compile(r"`([\w./-]+\.py):([\w.]+)(?:\(\))?`")
PLACEHOLDER = re.compile(r"<[^>]+>|\.\.\.|…|%")


def cards(root: Path = REPO) -> list[Path]:
    return sorted((root / "projects").glob("*/README.md"))


def pages(root: Path = REPO) -> list[Path]:
    return [path for path in (root / "README.md", root / "projects/README.md", *cards(root)) if path.is_file()]


# -- equation table ---------------------------------------------------------------------------------------------------


def defined(source: str) -> set[str]:
    """Functions, classes, methods (`Class.method`) and module constants of a Python source."""
    names = set()
    for node in ast.parse(source).body:
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            names.add(node.name)
        if isinstance(node, ast.ClassDef):
            names |= {f"{node.name}.{inner.name}" for inner in node.body if isinstance(inner, ast.FunctionDef)}
        if isinstance(node, ast.Assign | ast.AnnAssign):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            names |= {target.id for target in targets if isinstance(target, ast.Name)}
    return names


def wrong_references(text: str, root: Path) -> list[str]:
    wrong = []
    for file, name in REFERENCE.findall(text):
        path = root / file
        if not path.is_file():
            wrong.append(f"{file}:{name} (there is no {file})")
        elif name not in defined(path.read_text(encoding="utf-8")):
            wrong.append(f"{file}:{name} (not defined there)")
    return wrong


def table_references(text: str) -> list[tuple[str, str]]:
    return [found for line in text.splitlines() if line.startswith("|") for found in REFERENCE.findall(line)]


# -- commands ---------------------------------------------------------------------------------------------------------


def code_lines(text: str) -> list[str]:
    """Lines of fenced blocks (continuations joined) and every inline `code`."""
    fenced = re.findall(r"```[^\n]*\n(.*?)```", text, flags=re.DOTALL)
    inline = re.findall(r"`([^`\n]+)`", re.sub(r"```.*?```", "", text, flags=re.DOTALL))
    lines = [line for block in fenced for line in block.replace("\\\n", " ").splitlines()]
    return [line.strip().removeprefix("$ ") for line in (*lines, *inline)]


def commands(text: str) -> list[list[str]]:
    """Words of every `make ...` and `python -m ...` in the code of a page; `&&` and `;` separate commands."""
    found = []
    for line in code_lines(text):
        for part in re.split(r"&&|;|\|", line):
            try:
                words = shlex.split(part, comments=True)
            except ValueError:
                continue
            while words and re.fullmatch(r"[A-Z_][A-Z0-9_]*=.*", words[0]):  # environment in front
                words = words[1:]
            if len(words) > 1 and (words[0] == "make" or (words[0].endswith("python") and words[1] == "-m")):
                found.append(words)
    return found


def make_targets(makefile: str) -> set[str]:
    rules = re.findall(r"^([\w%. -]+?)\s*:(?!=)", makefile, flags=re.MULTILINE)
    return {name for rule in rules for name in rule.split() if not name.startswith(".")}


def why_not(words: list[str], root: Path) -> str | None:
    """What is wrong with a command, or None."""
    if words[0] == "make":
        return _why_not_make([word for word in words[1:] if "=" not in word and not word.startswith("-")], root)
    module, rest = words[2], words[3:]
    if module == "projects.run":
        return _why_not_run(rest, root)
    if module.split(".")[0] in FOREIGN_MODULES or PLACEHOLDER.search(module):
        return None
    if not (root / (module.replace(".", "/") + ".py")).is_file():
        return f"there is no module {module}"
    if module == "tools.claim" and rest and not rest[0].startswith("-") and not PLACEHOLDER.search(rest[0]):
        return None if (root / f"conf/claim/{rest[0]}.yaml").is_file() else f"there is no claim {rest[0]}"
    return None


def _why_not_make(targets: list[str], root: Path) -> str | None:
    known = make_targets((root / "Makefile").read_text(encoding="utf-8"))
    for target in targets:
        if target in known:
            continue
        pattern = next((name for name in known if "%" in name and target.startswith(name.partition("%")[0])), None)
        if pattern is None:
            return f"the Makefile has no target {target}"
        stem = target.removeprefix(pattern.partition("%")[0])
        folder = {"repro-%": "experiment", "claim-%": "claim"}.get(pattern)
        if folder and not PLACEHOLDER.search(stem) and not (root / "conf" / folder / f"{stem}.yaml").is_file():
            return f"{target}: there is no conf/{folder}/{stem}.yaml"
    return None


def _why_not_run(words: list[str], root: Path) -> str | None:
    experiments = {path.stem for path in (root / "conf" / "experiment").glob("*.yaml")}
    overrides = []
    for word in words:
        if word.startswith("-") or PLACEHOLDER.search(word):
            continue
        key, equals, value = word.partition("=")
        if not equals:
            return f"{word!r} is no key=value"
        if key == "experiment":
            return "write +experiment=, with the plus"
        if key == "+experiment":
            for name in value.split(","):
                known = (
                    any(Path(each).match(name[5:-1]) for each in experiments)
                    if name.startswith("glob(")
                    else (name in experiments)
                )
                if not known:
                    return f"there is no conf/experiment/{name}.yaml"
        overrides.append(word)
    if "+experiment" not in "".join(overrides) or any("glob(" in word for word in overrides):
        return None
    if len(overrides) == 1 and "," not in overrides[0]:
        return None  # tests/test_experiments.py composes every experiment
    return _why_not_composed(tuple(overrides), root)


@cache
def _why_not_composed(overrides: tuple[str, ...], root: Path) -> str | None:
    """Hydra itself reads the command; of a sweep the first value of each key."""
    from hydra import compose, initialize_config_dir
    from hydra.core.global_hydra import GlobalHydra
    from hydra.core.override_parser.overrides_parser import OverridesParser

    from common.runtime.cli import launch

    launch.register_resolvers()
    try:
        first = []
        for word, parsed in zip(overrides, OverridesParser.create().parse_overrides(overrides)):
            swept = parsed.is_sweep_override()
            first.append(f"{word.partition('=')[0]}={next(iter(parsed.sweep_string_iterator()))}" if swept else word)
        GlobalHydra.instance().clear()
        with initialize_config_dir(version_base="1.3", config_dir=str(root / "conf")):
            compose("config", overrides=first)
    except Exception as error:  # Hydra has a dozen exception types; each means the command does not run
        return str(error).splitlines()[0]
    finally:
        GlobalHydra.instance().clear()
    return None


# -- links ------------------------------------------------------------------------------------------------------------


def wrong_links(text: str, folder: Path) -> list[str]:
    prose = re.sub(r"```.*?```|`[^`\n]+`", "", text, flags=re.DOTALL)
    targets = [target.split("#")[0] for target in re.findall(r"\]\(([^)\s]+)\)", prose)]
    return [target for target in targets if target and "://" not in target and not (folder / target).exists()]


# -- the pages of this repository -------------------------------------------------------------------------------------


def name_of(path: Path) -> str:
    return path.relative_to(REPO).as_posix()


def test_the_readme_and_one_card_per_project_exist():
    missing = [f"projects/{path.parent.name}/README.md" for path in sorted((REPO / "projects").glob("*/module.py"))
               if not (path.parent / "README.md").is_file()]  # fmt: skip
    assert not missing and (REPO / "README.md").is_file(), missing


def test_the_front_page_is_short():
    lines = len((REPO / "README.md").read_text(encoding="utf-8").splitlines())
    assert lines <= README_LINES, f"README.md has {lines} lines; long tables belong into the cards"


@pytest.mark.parametrize("card", cards(), ids=name_of)
def test_card_starts_with_idea_picture_and_result(card):
    """In this order, before the equations; a paper without a record needs no picture yet."""
    before, found, _ = card.read_text(encoding="utf-8").partition("\n## Equations\n")
    needed = ["\n## Idea\n", "\n![", "\n<!-- zoo:headline -->\n"]
    if not (card.parent / "results.json").is_file():
        needed.remove("\n![")
    at = [before.find(what) for what in needed]
    assert found and -1 not in at and at == sorted(at), f"{name_of(card)}: idea, picture, headline, then equations"


@pytest.mark.parametrize("path", sorted((REPO / "projects").glob("*/results.json")), ids=name_of)
def test_no_recorded_paper_has_an_unfinished_test(path):
    """`tools.new_paper` writes a test that is unfinished until its author fills in a case with a known answer."""
    for test in (REPO / "tests/projects").rglob(f"test_{path.parent.name}*.py"):
        text = test.read_text(encoding="utf-8")
        assert not re.search(r"^(CASE|ANSWER) = None", text, flags=re.MULTILINE), name_of(test)


@pytest.mark.parametrize("card", cards(), ids=name_of)
def test_equations_name_their_place_in_the_paper(card):
    rows = [line for line in card.read_text(encoding="utf-8").splitlines() if line.startswith("| paper | equation |")]
    assert rows, f"{name_of(card)} has no equation table with the columns paper, equation, code"
    empty = [
        line for line in card.read_text(encoding="utf-8").splitlines() if re.match(r"\|\s*\|", line) and ".py" in line
    ]
    assert not empty, "\n".join(empty)


def test_pictures_of_the_pages_are_small():
    large = [name_of(path) for path in (REPO / "projects").rglob("*.png") if path.stat().st_size > PICTURE_BYTES]
    assert not large, f"at most {PICTURE_BYTES} bytes: {', '.join(large)}"


@pytest.mark.parametrize("card", cards(), ids=name_of)
def test_card_has_its_headings(card):
    headings = [line.lower() for line in card.read_text(encoding="utf-8").splitlines() if line.startswith("## ")]
    missing = [what for what, words in HEADINGS.items() if not any(word in line for word in words for line in headings)]
    assert not missing, f"{name_of(card)} has no `##` heading for: {', '.join(missing)}"


@pytest.mark.parametrize("card", cards(), ids=name_of)
def test_card_maps_equations_to_code(card):
    text = card.read_text(encoding="utf-8")
    assert table_references(text), f"{name_of(card)} has no table row with a `path.py:function`"


@pytest.mark.parametrize("page", pages(), ids=name_of)
def test_references_resolve(page):
    wrong = wrong_references(page.read_text(encoding="utf-8"), REPO)
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize("page", pages(), ids=name_of)
def test_commands_parse(page):
    wrong = []
    for words in commands(page.read_text(encoding="utf-8")):
        reason = why_not(words, REPO)
        if reason:
            wrong.append(f"{' '.join(words)}: {reason}")
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize("page", pages(), ids=name_of)
def test_links_resolve(page):
    wrong = wrong_links(page.read_text(encoding="utf-8"), page.parent)
    assert not wrong, f"{name_of(page)} links to what is not there: {', '.join(wrong)}"


@pytest.mark.parametrize("path", sorted((REPO / "conf/experiment").glob("*.yaml")), ids=name_of)
def test_the_command_in_an_experiments_header_parses(path):
    header = "\n".join(
        line.lstrip("# ") for line in path.read_text(encoding="utf-8").splitlines() if line.startswith("#")
    )
    found = [shlex.split(line) for line in header.splitlines() if line.startswith("python -m projects.run")]
    assert found, f"{name_of(path)} does not say how to run it"
    assert any(f"+experiment={path.stem}" in words for words in found)
    for words in found:
        assert why_not(words, REPO) is None


# -- the checks themselves --------------------------------------------------------------------------------------------


@pytest.fixture
def small(tmp_path):
    """A tree with one module, one experiment, one claim and a Makefile."""
    for folder in ("common", "tools", "conf/experiment", "conf/claim"):
        (tmp_path / folder).mkdir(parents=True)
    (tmp_path / "common/a.py").write_text("LIMIT = 3\ndef f(): pass\nclass C:\n    def g(self): pass\n")
    (tmp_path / "tools/zoo.py").write_text("")
    (tmp_path / "tools/claim.py").write_text("")
    (tmp_path / "conf/experiment/ect_tiny.yaml").write_text("")
    (tmp_path / "conf/claim/ect.yaml").write_text("")
    (tmp_path / "Makefile").write_text(
        "PY := x\n.PHONY: demo\ndemo test: install ## d\n\techo a:b\nrepro-%:\nclaim-%:\n"
    )
    return tmp_path


def test_references_are_checked(small):
    good = "| (1) | `common/a.py:f` | `common/a.py:C.g` | `common/a.py:C` `common/a.py:LIMIT` `common/a.py:f()` |"
    assert wrong_references(good, small) == [] and len(table_references(good)) == 5
    bad = "| (1) | `common/a.py:h` | `common/b.py:f` | `common/a.py:C.f` |"
    assert len(wrong_references(bad, small)) == 3


@pytest.mark.parametrize(
    "command, good",
    [
        ("make demo", True),
        ("make test ARGS='-k x'", True),
        ("make demoo", False),
        ("make repro-ect_tiny", True),
        ("make repro-<experiment>", True),
        ("make repro-ect_huge", False),
        ("make claim-ect", True),
        ("make claim-edm", False),
        ("python -m tools.zoo --check", True),
        (".venv/bin/python -m tools.zop", False),
        ("python -m tools.claim ect --fresh", True),
        ("python -m tools.claim edm", False),
        ("python -m pytest -q", True),
        ("python -m projects.run experiment=ect_tiny", False),
        ("python -m projects.run +experiment=ect_huge", False),
        ("python -m projects.run +experiment=<name> task=plan", True),
        ("python -m projects.run --help", True),
        ("python -m projects.run -m '+experiment=glob(*_tiny)'", True),
        ("python -m projects.run -m '+experiment=glob(*_vast)'", False),
        ("python -m projects.run task", False),
    ],
)
def test_commands_are_checked(small, command, good):
    for page in (f"Do `{command}` now.", f"```\n$ {command}  # why\n```"):
        found = commands(page)
        assert len(found) == 1
        assert (why_not(found[0], small) is None) == good


def test_commands_are_found_where_they_stand():
    page = "`FOO=1 make demo`\n```bash\ncd x && make test\npython -m tools.zoo \\\n  --check\n```\nmake believe `x.py`"
    assert commands(page) == [["make", "test"], ["python", "-m", "tools.zoo", "--check"], ["make", "demo"]]


@pytest.mark.parametrize(
    "overrides, good",
    [
        ("task=plan", True),
        ("trainer=cpu trainer.max_steps=2 data.batch_size=8", True),
        ("trainer=abacus", False),
        ("trainr=cpu", False),
        ("project.stagess=3", False),
        ("-m seed=1,2,3", True),
        ("-m seed=1,2 trainr=cpu", False),
    ],
)
def test_hydra_reads_the_overrides(overrides, good):
    words = ["+experiment=ect_cifar10", *overrides.split()]
    assert (_why_not_run(words, REPO) is None) == good


def test_links_are_checked(small):
    text = "[a](common/a.py) [b](nothing.md) [c](https://x.y) [d](#part) `[e](none)` ![f](common/f.png)"
    assert wrong_links(text, small) == ["nothing.md", "common/f.png"]
