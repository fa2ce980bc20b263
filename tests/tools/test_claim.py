"""A claim is judged by its numbers: made once, reused only when nothing changed, recorded also when it fails."""

from pathlib import Path

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from common.errors import UserError
from common.files import read_json, write_json, write_text
from tools import claim as tool

ROOT = Path(__file__).parents[2]

DECLARED = {
    "claim": "Tuning beats starting over.",
    "source": "arXiv 0000.00000",
    "seeds": [1, 2],
    "runs": {
        "teacher": {"experiment": "edm_toy"},
        "tuned": {
            "experiment": "ect_toy",
            "needs": "teacher",
            "overrides": ["init.file={teacher}/export/model.safetensors", "a=1"],
        },
    },
    "measures": {
        "teacher_1step": {"run": "teacher", "metric": "test/fd"},
        "tuned_1step": {"run": "tuned", "metric": "test/fd", "says": "tuned, 1 step"},
    },
    "relations": [{"left": "teacher_1step", "op": ">=", "factor": 50, "right": "tuned_1step", "says": "50 x better"}],
}


class Runs:
    """In place of `python -m projects.run`: writes the result a run with these arguments has."""

    def __init__(self, values=None):
        self.calls: list[list[str]] = []
        self.values = values or {"edm_toy": 300.0, "ect_toy": 4.0}
        self.status = 0

    def __call__(self, arguments, module) -> int:
        self.calls.append(list(arguments))
        if module == "tools.bench":
            name, _, folder = arguments[:3]
            metrics = {"deq_mib": {"value": 100.0 + len(self.calls)}}
            write_json(Path(folder) / f"{name}.json", {"metrics": metrics, "wall_time_s": 1.0, "hardware": "box"})
            return self.status
        given = dict(text.partition("=")[::2] for text in arguments)
        folder = Path(given["run.dir"].strip("'"))
        value = self.values[given["+experiment"]] + int(given["seed"])
        if self.status == 0:
            write_json(
                folder / "result.json",
                {
                    "metrics": {"test/fd": {"value": value, "record": {"samples": 9}}},
                    "wall_time_s": 2.0,
                    "step": 7,
                    "hardware": "box",
                    "dirty": False,
                },
            )
        return self.status


@pytest.fixture
def root(tmp_path, monkeypatch) -> Path:
    monkeypatch.setenv("ONESTEP_OUTPUTS", str(tmp_path / "outputs"))
    declare(tmp_path, DECLARED)
    for name in ("edm_toy", "ect_toy"):
        write_text(tmp_path / f"conf/experiment/{name}.yaml", "a: 1\n")
    return tmp_path


def declare(root: Path, declared: dict) -> None:
    write_text(root / "conf/claim/ect.yaml", yaml.safe_dump(declared, sort_keys=False))


def once(root, runs, **options):
    return tool.claim_once("ect", root=root, run=runs, **{"seeds": None, "fresh": False, "record": True, **options})


def test_runs_are_made_in_order_and_the_record_holds_their_numbers(root, capsys):
    runs = Runs()
    record = once(root, runs)
    place = (root / "outputs/claims/ect/seed1").resolve()
    assert runs.calls[:2] == [
        ["+experiment=edm_toy", "seed=1", f"run.dir='{place}/teacher'"],
        [
            "+experiment=ect_toy",
            "seed=1",
            f"run.dir='{place}/tuned'",
            f"init.file='{place}/teacher/export/model.safetensors'",
            "a=1",
        ],
    ]
    assert len(runs.calls) == 4
    measured = record["measures"]["tuned_1step"]
    assert measured["per_seed"] == {"1": 5.0, "2": 6.0} and measured["mean"] == 5.5
    assert measured["spread"] == pytest.approx(0.5**0.5) and measured["record"] == {"samples": 9}
    assert record["held"] and record["relations"][0]["ratio"] == pytest.approx(301.5 / 5.5)
    assert record["wall_time_s"] == 8.0 and record["hardware"] == "box" and record["seeds"] == [1, 2]
    stored = read_json(root / "projects/ect/results.json")
    assert stored["slug"] == "ect" and stored["records"] == [record]
    printed = capsys.readouterr().out
    assert "5.5 ± 0.7071" in printed and "held" in printed and "FAILED" not in printed


def test_records_are_appended_and_a_failed_relation_is_recorded_as_failed(root, capsys):
    once(root, Runs())
    record = once(root, Runs({"edm_toy": 300.0, "ect_toy": 5.0}), fresh=True)
    assert not record["held"] and record["relations"][0]["per_seed"] == {"1": True, "2": False}
    assert [r["held"] for r in read_json(root / "projects/ect/results.json")["records"]] == [True, False]
    assert "FAILED" in capsys.readouterr().out


def test_finished_runs_are_reused_until_something_changes(root):
    once(root, Runs(), record=False)
    again = Runs()
    once(root, again, record=False)
    assert again.calls == []
    DECLARED_B = {**DECLARED, "runs": {**DECLARED["runs"], "teacher": {"experiment": "edm_toy", "overrides": ["b=2"]}}}
    declare(root, DECLARED_B)
    once(root, again, record=False)
    assert len(again.calls) == 4  # the tuned run was made from that teacher: it is made again as well
    write_text(root / "common/net.py", "changed = True\n")
    once(root, again, record=False)
    assert len(again.calls) == 8
    once(root, again, record=False, seeds=[1], fresh=True)
    assert len(again.calls) == 10
    assert not (root / "projects/ect/results.json").exists()


def test_an_interrupted_run_continues_in_its_folder_a_foreign_one_is_emptied(root):
    once(root, Runs(), record=False)
    place = root / "outputs/claims/ect/seed1/tuned"
    (place / "result.json").unlink()
    write_text(place / "step-3.ckpt", "kept")
    once(root, Runs(), record=False)
    assert (place / "step-3.ckpt").exists()
    write_json(place / "claim.json", {"arguments": ["other"]})
    once(root, Runs(), record=False)
    assert not (place / "step-3.ckpt").exists() and (place / "result.json").exists()


def test_a_run_that_fails_stops_the_claim_and_records_nothing(root):
    runs = Runs()
    runs.status = 3
    with pytest.raises(UserError, match="Run 'teacher' of seed 1 ended with exit code 3"):
        once(root, runs)
    assert len(runs.calls) == 1 and not (root / "projects/ect/results.json").exists()


def test_a_run_without_a_result_names_the_missing_file(root):
    with pytest.raises(UserError, match=r"Run 'teacher' of seed 1 left no result\.json"):
        once(root, lambda arguments, module: 0)


def test_prose_and_claims_do_not_change_the_code_hash(root):
    before = tool.code_hash(root)
    write_text(root / "common/README.md", "words")
    write_text(root / "conf/claim/ect.yaml", "a: 1")
    assert tool.code_hash(root) == before
    write_text(root / "conf/experiment/new.yaml", "a: 1")
    assert tool.code_hash(root) != before


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        (("runs", "tuned", "needs"), "techer", "'techer' is not a run declared above it. Closest: teacher."),
        (("runs", "tuned", "experiment"), "ect_tyo", "experiment 'ect_tyo' does not exist. Closest: ect_toy."),
        (("runs", "tuned", "overides"), ["x"], "'overides' is not a field of a run. Closest: overrides."),
        (("measures", "tuned_1step", "run"), "tund", "'tund' is not a declared run. Closest: tuned."),
        (("relations", 0, "op"), "=", "'=' is not an operator."),
        (("relations", 0, "left"), "teacher_2step", "Closest: teacher_1step."),
        (("seeds",), ["one"], "seeds must be a list of integers"),
        (("measures", "tuned_1step"), "test/fd", "must be a mapping with metric, run, says"),
    ],
)
def test_mistakes_in_a_declaration_are_named(root, path, value, message):
    declared = yaml.safe_load(yaml.safe_dump(DECLARED))
    node = declared
    for key in path[:-1]:
        node = node[key]
    node[path[-1]] = value
    declare(root, declared)
    with pytest.raises(UserError) as error:
        tool.load_claim("ect", root / "conf")
    assert message in str(error.value)


def test_an_unknown_claim_and_an_unknown_metric(root, capsys):
    with pytest.raises(UserError, match=r"Claim 'etc' does not exist. Closest: ect. Claims: ect"):
        tool.load_claim("etc", root / "conf")
    declared = yaml.safe_load(yaml.safe_dump(DECLARED))
    declared["measures"]["tuned_1step"]["metric"] = "test/fdd"
    declare(root, declared)
    with pytest.raises(UserError, match=r"no metric 'test/fdd'. Closest: test/fd."):
        once(root, Runs())
    assert tool.main(["no_such_claim"]) == 2
    assert "error: Claim 'no_such_claim' does not exist." in capsys.readouterr().err


def test_exit_codes(root, monkeypatch, capsys):
    monkeypatch.setattr(tool, "claim_once", lambda slug, **_: {"held": slug == "good"})
    assert tool.main(["bad"]) == 0 and tool.main(["bad", "--strict"]) == 1 and tool.main(["good", "--strict"]) == 0
    assert tool.main([]) == 2 and "Name a claim" in capsys.readouterr().err


@settings(deadline=None, max_examples=50)
@given(
    st.lists(st.tuples(st.floats(0.1, 1e3), st.floats(0.1, 1e3)), min_size=1, max_size=5),
    st.sampled_from(sorted(tool.OPERATORS)),
    st.floats(0.1, 100),
)
def test_a_relation_holds_only_if_every_seed_holds(pairs, op, factor):
    values = {seed: {"a": a, "b": b} for seed, (a, b) in enumerate(pairs)}
    (verdict,) = tool.judge(
        {"relations": [{"left": "a", "op": op, "factor": factor, "right": "b", "says": ""}]}, values
    )
    expected = [eval(f"a {op} factor * b", {"a": a, "b": b, "factor": factor}) for a, b in pairs]
    assert list(verdict["per_seed"].values()) == expected
    assert verdict["held"] == (all(expected) and verdict["on_means"])


@pytest.mark.parametrize("slug", tool.claim_slugs(ROOT / "conf"))
def test_every_declared_claim_is_well_formed(slug):
    assert tool.load_claim(slug, ROOT / "conf")["claim"]


def test_a_benchmark_is_a_run_of_a_claim(root, capsys):
    """It is made once per seed, its metrics are measured beside those of runs, and it is reused like a run."""
    declared = {
        **DECLARED,
        "runs": {**DECLARED["runs"], "cost": {"benchmark": "flow_memory", "options": ["--repeats", 2]}},
        "measures": {**DECLARED["measures"], "memory": {"run": "cost", "metric": "deq_mib"}},
    }
    declare(root, declared)
    runs = Runs()
    record = once(root, runs)
    place = (root / "outputs/claims/ect/seed1/cost").resolve()
    assert runs.calls[2] == ["flow_memory", "--out", str(place), "--repeats", "2"]
    assert "python -m tools.bench flow_memory --out" in capsys.readouterr().out
    assert record["measures"]["memory"]["per_seed"] == {"1": 103.0, "2": 106.0}
    assert record["runs"]["cost"] == {"benchmark": "flow_memory", "options": ["--repeats", "2"], "steps": None}
    assert once(root, Runs())["measures"]["memory"] == record["measures"]["memory"]


def test_an_unknown_benchmark_is_named(root):
    declare(root, {**DECLARED, "runs": {**DECLARED["runs"], "cost": {"benchmark": "flow_memry"}}})
    with pytest.raises(
        UserError, match=r"runs\.cost\.benchmark: 'flow_memry' is not a benchmark\. Closest: flow_memory"
    ):
        tool.load_claim("ect", root / "conf")
