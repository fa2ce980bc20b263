"""One sentence per mistake, naming the nearest name; silence for everything Hydra would accept and the code means."""

import subprocess
import sys
import types
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import pytest
from hydra import compose, initialize_config_dir
from hypothesis import given, settings
from hypothesis import strategies as st
from omegaconf import OmegaConf

from common.errors import UserError
from common.runtime.cli.check import OPEN, check, check_data, mismatch
from common.runtime.cli.explain import explain_hydra_error, is_composition_error, read_schema


class Base:
    pass


class Child(Base):
    def __init__(self, *, width: int = 4):
        self.width = width


class Loss:
    def __init__(
        self,
        *,
        q: float,
        kind: Literal["l2", "huber"] = "l2",
        stages: int = 8,
        net: Base | None = None,
        optimizer: Callable[..., object] | None = None,
        betas: Sequence[float] = (0.9, 0.99),
        table: Mapping[str, int] | None = None,
        name: str = "a",
        flag: bool = False,
        size: tuple[int, int] = (1, 1),
        free=None,
        late: "Later | None" = None,
    ):
        pass


class Later:
    pass


def make_child(*, width: int = 3) -> Child:
    return Child(width=width)


def positional(a: int, b: int = 2, **kwargs: Any):
    return a + b


@pytest.fixture(autouse=True)
def toy(monkeypatch):
    """The classes above under a dotted path below projects., where targets must live."""
    module = types.ModuleType("projects.toy_check")
    for item in (Base, Child, Loss, Later, make_child, positional):
        setattr(module, item.__name__, item)
        monkeypatch.setattr(item, "__module__", module.__name__)  # targets must be defined where they are named
    module.number = 3
    functions = ("projects.toy_check.make_child", "projects.toy_check.positional")
    monkeypatch.setattr("common.targets.FUNCTIONS", functions)
    monkeypatch.setitem(sys.modules, "projects.toy_check", module)


def node(name="Loss", /, **options):
    return {"_target_": f"projects.toy_check.{name}", **options}


def message(config, **options) -> str:
    with pytest.raises(UserError) as error:
        check(config, **options)
    assert error.value.exit_code == 2
    return str(error.value)


def test_a_correct_configuration_passes():
    check(
        {
            "project": node(
                q=1,
                kind="huber",
                betas=[0.9, 1],
                table={"a": 1},
                size=[3, 4],
                free={"any": ["thing"]},
                net=node("Child", width=2),
                optimizer=node("Child", _partial_=True),
                late=None,
            )
        }
    )
    check(OmegaConf.create({"q": 0.5, "project": node(q="${q}", net=node("make_child"), _convert_="all")}))
    check({"x": [{"deep": node("positional", _args_=[1], anything="goes")}]})
    check({"optimizer": {"_target_": "torch.optim.RAdam", "_partial_": True, "lr": 1e-4, "betas": [0.9, 0.99]}})
    check(
        {
            "trainer": {
                "_target_": "lightning.pytorch.Trainer",
                "max_steps": 3,
                "devices": 1,
                "precision": "bf16-mixed",
                "accelerator": "cpu",
                "gradient_clip_val": None,
            }
        }
    )


def test_an_unknown_key_is_named_with_the_nearest_and_all_options():
    text = message({"project": {"loss": node(q=1.0, stagse=3)}})
    assert text == (
        "project.loss.stagse is not an option of projects.toy_check.Loss. Closest: stages. Options: "
        "q, kind, stages, net, optimizer, betas, table, name, flag, size, free, late."
    )


def test_a_key_at_the_wrong_level_is_found_further_down():
    text = message({"project": node(q=1.0, widht=3, net=node("Child", width=3))})
    assert "project.widht is not an option of projects.toy_check.Loss. Closest: project.net.width." in text


def test_a_missing_key_is_named_unless_partial_or_supplied():
    text = message({"loss": node()})
    assert text == "loss.q (a number) is missing: projects.toy_check.Loss needs it. Set loss.q=..."
    check({"loss": node(_partial_=True)})
    check({"loss": node()}, supplied={"loss": {"q"}})
    assert "a (an integer) is missing" in message({"f": node("positional")})


@pytest.mark.parametrize(
    ("key", "value", "expected"),
    [
        ("stages", "8", "loss.stages must be an integer, got '8' (text)."),
        ("stages", True, "loss.stages must be an integer, got true."),
        ("stages", 8.0, "loss.stages must be an integer, got 8.0. Write 8."),
        ("stages", None, "loss.stages must be an integer, got null. null is not allowed here."),
        (
            "q",
            "1e-4",
            "loss.q must be a number, got '1e-4' (text). It is text; YAML writes floats unquoted and with a "
            "point, like 1.0e-4: write 0.0001.",
        ),
        ("q", "abc", "loss.q must be a number, got 'abc' (text)."),
        ("q", True, "loss.q must be a number, got true."),
        ("kind", "l3", "loss.kind must be one of 'l2', 'huber', got 'l3' (text). Closest: l2."),
        ("flag", "yes", "loss.flag must be true or false, got 'yes' (text). Write true or false."),
        ("flag", 1, "loss.flag must be true or false, got 1. Write true or false."),
        ("name", 3, "loss.name must be text, got 3. Quote it: '3'."),
        ("betas", 0.9, "loss.betas must be a list of numbers, got 0.9. Write a list: [0.9]."),
        ("betas", [0.9, "x"], "Element 1 is 'x' (text), not a number."),
        ("size", [1, 2, 3], "It has 3 elements."),
        ("table", {"a": 1, "b": "c"}, "Entry 'b' is 'c' (text)."),
        ("net", 3, "loss.net must be a Base or null, got 3."),
        ("net", {"_target_": "projects.toy_check.Later"}, "projects.toy_check.Later builds a Later."),
        ("net", {"_target_": "projects.toy_check.Child", "_partial_": True}, "drop _partial_."),
        ("optimizer", {"_target_": "projects.toy_check.Child"}, "cannot be called; add _partial_: true."),
        ("optimizer", "Adam", "Give a node with _target_ and _partial_: true."),
    ],
)
def test_a_wrong_type_is_one_sentence_with_the_fix(key, value, expected):
    text = message({"loss": node(**{"q": 1.0, key: value})})
    assert expected in text and "\n" not in text


def test_targets_that_are_not_there_or_not_allowed():
    assert "projects.toy_check has no Los. Closest: Loss." in message({"a": {"_target_": "projects.toy_check.Los"}})
    assert "only targets below common." in message({"a": {"_target_": "os.system", "command": "true"}})
    assert "not a class or function" in message({"a": node("number")})
    assert "common has no runtim. Closest: runtime." in message({"a": {"_target_": "common.runtim.check.check"}})
    assert "torch.nn has no Liner. Closest: Linear." in message({"a": {"_target_": "torch.nn.Liner"}})


def test_a_target_whose_module_fails_to_import_names_the_reason(tmp_path, monkeypatch):
    (tmp_path / "broken_target.py").write_text("import not_installed_anywhere\n")
    package = types.ModuleType("projects.toy_package")
    package.__path__ = [str(tmp_path)]
    monkeypatch.setitem(sys.modules, "projects.toy_package", package)
    text = message({"a": {"_target_": "projects.toy_package.broken_target.Net"}})
    assert "importing projects.toy_package.broken_target failed: No module named 'not_installed_anywhere'" in text


def test_all_problems_are_listed_one_per_line():
    assert len(message({"a": node(q="x", stagse=1), "b": node("Child", widht=3)}).splitlines()) == 3


SCHEMA = {
    "seed": 0,
    "run": {"dir": "outputs", "keep": 2},
    "project": {"_target_": "x"},
    "free": OPEN,
    "callbacks": {"grid": {"_target_": "x"}, "ema": {"_target_": "x"}},
    "nothing": None,
    "needs": {},
}


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        ({"trainr": {"max_steps": 3}, "seed": 1}, "trainr is not a section of the configuration."),
        ({"run": {"dri": "x"}}, "run.dri is not an option of run. Closest: dir. Options: dir, keep."),
        ({"seed": "abc"}, "seed must be an integer, got 'abc' (text)."),
        ({"run": 3}, "run is a section (keys: dir, keep), got 3."),
        (
            {"callbacks": {"grd": {"every": 3}}},
            "callbacks.grd has no _target_, so it is not an entry of callbacks. Closest: grid. Entries: grid, ema.",
        ),
    ],
)
def test_sections_without_target_follow_the_schema(config, expected):
    assert expected in message(config, schema=SCHEMA)


def test_the_schema_leaves_open_sections_named_objects_and_nulls_free():
    check(
        {
            "free": {"a": {"b": 1}},
            "callbacks": {"grid": None, "mine": node("Child")},
            "nothing": 3,
            "run": {"keep": None},
            "needs": {"teacher": {"experiment": "x"}},
            "project": node(q=1.0),
        },
        schema=SCHEMA,
    )
    assert "Closest: seed." in message({"sed": 1}, schema={"seed", "task"})


def test_missing_values_and_broken_interpolations():
    assert message(OmegaConf.create({"run": {"dir": "???"}})) == "run.dir is not set. Give it: run.dir=..."
    assert "refers to ${nope}" in message(OmegaConf.create({"a": "${nope}"}))


@settings(deadline=None, max_examples=50)
@given(
    st.recursive(
        st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=5),
        lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
        max_leaves=6,
    )
)
def test_agreement_with_isinstance_on_plain_types(value):
    real = isinstance(value, int | float) and not isinstance(value, bool)
    assert (mismatch(value, float) is None) == real
    assert (mismatch(value, int) is None) == (real and isinstance(value, int))
    assert (mismatch(value, str | None) is None) == (value is None or isinstance(value, str))
    assert (mismatch(value, list) is None) == isinstance(value, list)
    assert (mismatch(value, dict) is None) == isinstance(value, dict)
    assert mismatch(value, Any) is None


# ---------------------------------------------------------------------------------------------------------------------
# Hydra's own errors


@pytest.fixture
def conf(tmp_path) -> Path:
    files = {
        "config.yaml": "defaults: [_self_, {project: '???'}, {data: digits}, {callbacks: default}]\nseed: 1\n"
        "run: {dir: outputs, name: a}\n",
        "project/toy.yaml": "_target_: projects.toy_check.Loss\nq: 1.0\nstages: 4\n",
        "data/digits.yaml": "_target_: projects.toy_check.Child\nwidth: 3\n",
        "callbacks/default.yaml": "grid: {_target_: projects.toy_check.Child}\n",
        "debug/fast.yaml": "# @package _global_\nseed: 2\n",
        "experiment/toy_tiny.yaml": "# @package _global_\ndefaults: [override /project: toy, _self_]\n",
        "experiment/toy_typo.yaml": "# @package _global_\ndefaults: [override /project: toy, _self_]\n"
        "project: {stagse: 3}\ntrainr: 3\n",
        "experiment/toy_lost.yaml": "# @package _global_\ndefaults: [override /project: tyo, _self_]\n",
        "experiment/toy_yaml.yaml": "seed: 1\na: b: c\n",
    }
    for name, text in files.items():
        path = tmp_path / "conf" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return tmp_path / "conf"


def composed(conf, *overrides):
    with initialize_config_dir(str(conf), version_base="1.3"):
        return compose("config", list(overrides))


TOY = "+experiment=toy_tiny"


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        ([], "No experiment given. Run: python -m projects.run +experiment=<name>. List them with: ls conf/experiment"),
        (["experiment=toy_tiny"], "An experiment is added with a plus. Write +experiment=toy_tiny"),
        (
            ["+experiment=toy_tny"],
            "Experiment 'toy_tny' does not exist. Closest: toy_tiny. List them with: ls conf/experiment",
        ),
        (["+experiment=toy_lost"], "project=tyo does not exist. Closest: toy. Options: toy."),
        (
            ["+experiment=toy_yaml"],
            "conf/experiment/toy_yaml.yaml, line 2, is not valid YAML: mapping values are not allowed here.",
        ),
        ([TOY, "data=digist"], "data=digist does not exist. Closest: digits. Options: digits."),
        (
            [TOY, "project.stagse=3"],
            "project.stagse is not an option of projects.toy_check.Loss. Closest: project.stages. Options: q, kind,",
        ),
        ([TOY, "widht=3"], "widht is not a section of the configuration. Closest: data.width."),
        ([TOY, "project.flag=true"], "To set it, add it with a plus: +project.flag=..."),
        ([TOY, "projct.q=3"], "projct is not a section of the configuration. Closest: project. Options: seed, run,"),
        ([TOY, "run.dir.x=3"], "run.dir is one value, not a section, so run.dir.x cannot be set. Give run.dir=..."),
        ([TOY, "debug=fast"], "debug is not in the defaults, so it is added with a plus. Write +debug=fast"),
        ([TOY, "+debug=fst"], "debug=fst does not exist. Closest: fast. Options: fast."),
        ([TOY, "+debug=nan"], "+debug=nan is no option: a group needs the name of one of its files"),
        ([TOY, "+seed=3"], "seed exists already, so it is set without a plus. Write seed=..."),
        ([TOY, "~sed"], "~sed removes nothing: there is no such entry. Drop that override."),
        ([TOY, "fast"], "'fast' is not an override. Write key=value, for instance trainer.max_steps=10"),
        ([TOY, "run.name=[1"], "The value in 'run.name=[1' cannot be read."),
        ([TOY, "seed=1,2"], "'seed=1,2' lists several values: that is a sweep. Add -m, or quote the value."),
    ],
)
def test_composition_errors_become_one_sentence(conf, overrides, expected):
    with pytest.raises(Exception) as error:
        composed(conf, *overrides)
    assert is_composition_error(error.value)
    text = explain_hydra_error(error.value, conf, overrides=overrides)
    assert text.startswith(expected) or expected in text
    assert "\n" not in text


def test_the_schema_is_read_from_the_files_and_finds_typos_in_experiments(conf):
    schema = read_schema(conf)
    assert list(schema) == ["seed", "run", "project", "data", "callbacks"]
    check(composed(conf, TOY), schema=schema)
    text = message(composed(conf, "+experiment=toy_typo"), schema=schema)
    assert "trainr is not a section" in text and "project.stagse is not an option" in text


def test_an_error_hydra_does_not_explain_keeps_its_first_line():
    assert explain_hydra_error(RuntimeError("first\nsecond")) == "first"
    assert not is_composition_error(RuntimeError("first"))


def test_importing_the_check_is_light():
    heavy = "('torch', 'lightning', 'hydra')"
    code = f"import sys, common.runtime.cli.check; print([m for m in {heavy} if m in sys.modules])"
    run = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=Path(__file__).parents[4]
    )
    assert run.stdout.strip() == "[]"


def test_values_without_a_target_have_types_too():
    schema = {"sample": {"classes": None, "input": None}, "speed": {"threads": None, "channels_last": None}}
    for key, value, sentence in (
        ("classes", 3, "sample.classes must be a list of integers or null, got 3. Write a list: [3]."),
        ("classes", ["cat"], "sample.classes must be a list of integers or null"),
        ("input", 3, "sample.input must be text or a list of text or null, got 3."),
    ):
        assert sentence in message({"sample": {key: value}}, schema=schema)
    assert "speed.threads must be an integer or null" in message({"speed": {"threads": "many"}}, schema=schema)
    assert "speed.channels_last must be true or" in message({"speed": {"channels_last": 1}}, schema=schema)
    check({"sample": {"classes": [1, 2], "input": "a.png"}, "speed": {"threads": 2}}, schema=schema)


def test_data_of_another_kind_are_refused_with_the_words_that_fit():
    conf = Path(__file__).resolve().parents[4] / "conf"
    edm, camvid = "projects.edm.module.Edm", "common.data.segmentation.module.SegmentationDataModule"
    trainer = {"_target_": "lightning.pytorch.Trainer"}
    config = OmegaConf.create({"project": {"_target_": edm}, "data": {"_target_": camvid}, "trainer": trainer})
    with pytest.raises(UserError) as error:
        check_data(config, conf)
    text = str(error.value)
    assert text.startswith("This experiment needs images, and the data chosen (data=...) are pictures with masks.")
    assert "cifar10" in text and "camvid" not in text and "cora" not in text
    config.data._target_ = "common.data.latents.module.LatentDataModule"  # a kind of images
    check_data(config, conf)
    config.project._target_ = "projects.toy_check.Loss"  # reads anything
    config.data._target_ = camvid
    check_data(config)
    with pytest.raises(UserError, match=r"^data is empty: there is no data\._target_\. Choose one: data=<"):
        check_data(OmegaConf.create({"project": {"_target_": edm}, "data": {}, "trainer": trainer}))
