"""Metrics at the end, under task=test and as a curve."""

import csv

import pytest
import torch

from common.diffusion.sample import Multistep
from common.errors import UserError
from common.metrics.features import Pixels
from common.runtime import fit, test
from common.runtime.checkpoint import list_checkpoints
from common.runtime.evaluate import Evaluation
from common.runtime.fit import assemble

MEASURED = (
    "evaluate=digits", "evaluate.extractors.digits=null", "evaluate.samples=70", "evaluate.batch_size=32",
    "evaluate.curve_samples=66",
    "evaluate.at_start=false", "evaluate.samplers.heun.steps=2", "evaluate.every_n_steps=null",
)  # fmt: skip


def options(**changed) -> dict:
    return dict(
        samples=70, batch_size=32, seed=1, average="ema", every_n_steps=None, curve_samples=10, floor=False,
        samplers={"one_step": Multistep()}, extractors={"pixels": Pixels(channels=1, resolution=8)},
    ) | changed  # fmt: skip


def test_an_evaluation_without_samplers_or_extractors_is_none():
    assert Evaluation(**options())
    assert not Evaluation(**options(samplers={})) and not Evaluation(**options(extractors={}))
    assert not Evaluation(**options(extractors={"pixels": None})) and not Evaluation(**options(samplers={"a": None}))


@pytest.mark.parametrize("name", ["samples", "curve_samples", "batch_size"])
def test_counts_below_one(name):
    with pytest.raises(UserError, match=r"must be >= 1, got 0"):
        Evaluation(**options(**{name: 0}))


@pytest.fixture
def run(composed, tmp_path):
    return assemble(composed(tmp_path / "run", *MEASURED), training=False, measuring=True)


def test_names_and_records(run):
    found = run.evaluation.run(run.module, run.data)
    assert list(found) == ["fd_pixels_one_step", "fd_pixels_heun"]
    record = found["fd_pixels_heun"]
    assert record.samples == 70 and record.value > 0 and record.extractor_hash and record.reference_hash
    floor = run.evaluation.floor(run.data)
    assert list(floor) == ["fd_pixels_floor"] and 0 < floor["fd_pixels_floor"].value < record.value


def test_the_batch_size_changes_nothing(run):
    whole = Evaluation(**options(batch_size=70)).run(run.module, run.data)["fd_pixels_one_step"]
    parts = Evaluation(**options(batch_size=13)).run(run.module, run.data)["fd_pixels_one_step"]
    assert parts.value == pytest.approx(whole.value, rel=1e-6)
    other = Evaluation(**options(seed=2)).run(run.module, run.data)["fd_pixels_one_step"]
    assert other.value != whole.value


def test_the_curve_is_logged_between_and_measures_the_average(composed, tmp_path):
    folder = tmp_path / "run"
    fit.fit_task(composed(folder, *MEASURED, "trainer.max_steps=6", "evaluate.every_n_steps=2",
                          "ema.profiles.ema.decay=1.0"))  # fmt: skip
    with open(folder / "metrics.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    curve = {int(row["step"]): row["val/fd_pixels_one_step"] for row in rows if row["val/fd_pixels_one_step"]}
    assert sorted(curve) == [1, 3], "after steps 2 and 4; the last one is measured with all images"
    assert curve[1] == curve[3], "an average of decay 1 stays where it was"
    final = [row for row in rows if row["test/fd_pixels_one_step"]]
    assert [row["step"] for row in final] == ["5"] and final[0]["test/fd_pixels_floor"]


def test_task_test_prints_ours_beside_the_published(trained, composed, tmp_path, capsys):
    checkpoint = list_checkpoints(trained / "checkpoints")[0]
    entries = (
        "published=[{metric: test/fd_pixels_heun, value: 3.25, source: table 9},"
        "{metric: test/fid, value: 1.5, source: sheet}]"
    )
    value = test.test_task(composed(tmp_path / "run", *MEASURED, "task=test", f"resume={checkpoint}", entries))
    out = " ".join(capsys.readouterr().out.split())
    for word in ("test/fd_pixels_heun", "3.25", "table 9", "test/fid", "not measured", "1.5", "sheet", "ema, step 12"):
        assert word in out, word
    from common.files import read_json

    result = read_json(tmp_path / "run/test/result.json")
    assert result["objective"] == value == result["metrics"]["test/fd_pixels_one_step"]["value"]
    assert result["step"] == 12


def test_task_test_chooses_the_average(trained, composed, tmp_path):
    checkpoint = list_checkpoints(trained / "checkpoints")[0]
    values = {
        name: test.test_task(composed(tmp_path / name, *MEASURED, f"resume={checkpoint}", f"evaluate.average={name}"))
        for name in ("raw", "half", "power")
    }
    assert len(set(values.values())) == 3
    with pytest.raises(UserError, match="Closest: half"):
        test.test_task(composed(tmp_path / "x", *MEASURED, f"resume={checkpoint}", "evaluate.average=hlaf"))


def test_a_missing_extractor_does_not_stop_training_but_stops_the_test(composed, tmp_path, capsys):
    words = ("evaluate=fid", "data.batch_size=8", "trainer.max_steps=1", f"paths.weights={tmp_path}/none")
    fit.fit_task(composed(tmp_path / "run", *words))
    out = capsys.readouterr().out
    assert "note: no metrics in this run, measure later with task=test" in out and "Inception" in out
    assert list_checkpoints(tmp_path / "run/checkpoints")
    with pytest.raises(Exception, match="Inception"):
        test.test_task(composed(tmp_path / "run", *words, "task=test"))


def test_the_weights_are_put_back_after_a_point_of_the_curve(composed, tmp_path):
    plain, curved = tmp_path / "plain", tmp_path / "curved"
    fit.fit_task(composed(plain, "trainer.max_steps=5"))
    fit.fit_task(composed(curved, *MEASURED, "trainer.max_steps=5", "evaluate.every_n_steps=2"))
    one, two = (torch.load(list_checkpoints(f / "checkpoints")[0], weights_only=True) for f in (plain, curved))
    for name, tensor in one["state_dict"].items():
        assert torch.equal(tensor, two["state_dict"][name]), name
    for name, tensor in one["averages"]["ema"].items():
        assert torch.equal(tensor, two["averages"]["ema"][name]), name
