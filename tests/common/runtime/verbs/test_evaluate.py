"""Metrics at the end, under task=test and as a curve."""

import csv

import numpy as np
import pytest
import torch

from common.diffusion.sample import Multistep
from common.errors import UserError
from common.metrics.features import Pixels
from common.runtime.training.checkpoint import list_checkpoints
from common.runtime.verbs import evaluate, fit, test
from common.runtime.verbs.assemble import assemble
from common.runtime.verbs.evaluate import Evaluation

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


def test_the_reference_is_the_split_asked_for(run):
    record = Evaluation(**options(reference="test")).run(run.module, run.data)["fd_pixels_one_step"]
    usual = Evaluation(**options()).run(run.module, run.data)["fd_pixels_one_step"]
    assert usual.reference.startswith("digits/train") and record.reference.startswith("digits/test")
    assert usual.value != record.value
    with pytest.raises(UserError, match=r"evaluate.reference=tset is no split .* Closest: test. Splits: train, test"):
        Evaluation(**options(reference="tset")).check(run.module, run.data)


def test_statistics_in_a_file_take_the_place_of_the_images(run, tmp_path):
    usual = Evaluation(**options(cache_dir=str(tmp_path))).run(run.module, run.data)["fd_pixels_one_step"]
    (kept,) = tmp_path.glob("reference-digits-train-*-pixels-*.npz")
    record = Evaluation(**options(statistics=str(kept))).run(run.module, None)["fd_pixels_one_step"]
    assert record.value == usual.value and record.reference.startswith(kept.name)
    with pytest.raises(UserError, match="precision_recall needs images"):
        Evaluation(**options(statistics=str(kept), precision_recall=True))


def test_balanced_classes_are_the_image_numbers_in_turn(run, monkeypatch):
    asked = []
    monkeypatch.setattr(run.module.net.model, "label_dim", 3)
    monkeypatch.setattr(run.module, "generate", lambda indices, labels, **_: (
        asked.append(labels.tolist()) or torch.zeros(len(indices), 1, 8, 8)))  # fmt: skip
    Evaluation(**options(balanced=True, samples=7, batch_size=4)).run(run.module, run.data)
    assert asked[:2] == [[0, 1, 2, 0], [1, 2, 0]]


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
    assert sorted(curve) == [2, 4], "the last step is measured with all images"
    assert curve[2] == curve[4], "an average of decay 1 stays where it was"
    final = [row for row in rows if row["test/fd_pixels_one_step"]]
    assert [row["step"] for row in final] == ["6"] and final[0]["test/fd_pixels_floor"]


def test_task_test_prints_ours_beside_the_published(trained, composed, tmp_path, capsys):
    checkpoint = list_checkpoints(trained / "checkpoints")[0]
    entries = (
        "published=[{metric: test/fd_pixels_heun, value: 3.25, source: table 9},"
        "{metric: test/fid, value: 1.5, source: page 2}]"
    )
    value = test.test_task(composed(tmp_path / "run", *MEASURED, "task=test", f"resume={checkpoint}", entries))
    out = " ".join(capsys.readouterr().out.split())
    for word in ("test/fd_pixels_heun", "3.25", "table 9", "test/fid", "not measured", "1.5", "page 2", "ema, step 12"):
        assert word in out, word
    from common.files import read_json

    result = read_json(tmp_path / "run/test/result.json")
    assert result["objective"] == value == result["metrics"]["test/fd_pixels_one_step"]["value"]
    assert result["step"] == 12


def test_task_test_against_a_file_needs_no_data(trained, composed, tmp_path, monkeypatch):
    checkpoint = list_checkpoints(trained / "checkpoints")[0]
    np.savez(tmp_path / "published.npz", mu=np.zeros(64), sigma=np.eye(64))

    def missing(self):
        raise UserError("the data are not there")

    monkeypatch.setattr("common.data.images.module.ImageDataModule.check", missing)
    words = (*MEASURED, "task=test", f"resume={checkpoint}", f"evaluate.statistics={tmp_path / 'published.npz'}")
    assert test.test_task(composed(tmp_path / "run", *words, "evaluate.floor=false")) > 0
    with pytest.raises(UserError, match="the data are not there"):  # the floor measures real images
        test.test_task(composed(tmp_path / "run", *words))


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


# Over a split of the data ---------------------------------------------------------------------------------------------


@pytest.fixture
def split(toy_config, tmp_path):
    """split(*overrides) -> assembled run of the toy task."""
    return lambda *words: assemble(toy_config(tmp_path / "run", *words), training=False, measuring=True)


def test_means_over_the_split_finalised_with_solver_statistics(split, toy):
    run = split()
    found = run.evaluation.run(run.module, run.data)
    assert list(found) == ["loss", "error", "nfe", "residual", "converged"]
    batch = run.data.sample(10**6 + 1, 50)
    logits = run.module.predict(batch)
    loss = torch.nn.functional.cross_entropy(logits, batch["label"])
    assert found["loss"].value == pytest.approx(float(loss), rel=1e-4)
    assert found["error"].value == pytest.approx(100 * float((logits.argmax(1) != batch["label"]).float().mean()))
    assert {record.samples for record in found.values()} == {50}
    assert (found["nfe"].reference, found["nfe"].reference_hash) == ("Data/test", "none")
    assert 1 < found["nfe"].value < 50 and found["residual"].value <= 1e-3 and found["converged"].value == 1.0
    assert run.data.was_set_up == ["test"] and run.evaluation.floor(run.data) == {}


def test_a_sum_may_be_a_matrix(split, monkeypatch):
    run = split()
    batches = list(run.data.eval_batches("test"))

    def step(batch):
        return {"loss": (torch.tensor(2.0), len(batch["label"])), "matrix": (torch.ones(2, 2, dtype=torch.int64), 10)}

    monkeypatch.setattr(run.module, "evaluation_step", step)
    monkeypatch.setattr(run.module, "finalise", lambda means: {"loss": means["loss"], "trace": means["matrix"].trace()})
    found = run.evaluation.run(run.module, run.data)
    assert found["trace"].value == pytest.approx(2 * 1 / 10) and found["trace"].samples == 50
    assert found["loss"].value == pytest.approx(2.0 * len(batches) / 50)


def test_samples_limit_the_batches(split):
    run = split("evaluate.samples=21", "evaluate.curve_samples=5", "evaluate.curve_split=train")
    assert run.evaluation.run(run.module, run.data)["loss"].samples == 40, "whole batches of 20"
    point = run.evaluation.curve(run.module, run.data)
    assert point["loss"].samples == 20 and point["loss"].reference == "Data/train"


def test_several_splits_each_under_its_name(split):
    run = split("evaluate.split=[test,train]", "evaluate.samples=40", "evaluate.timed_steps=1")
    found = run.evaluation.run(run.module, run.data)
    assert list(found)[:6] == ["test_loss", "test_error", "test_nfe", "test_residual", "test_converged", "train_loss"]
    assert found["train_loss"].reference == "Data/train" and "step_s" in found
    alone = split("evaluate.samples=40").evaluation.run(run.module, run.data)
    assert found["test_loss"].value == alone["loss"].value != found["train_loss"].value


def test_times_and_spectral_radius_are_asked_for(split):
    run = split("evaluate.timed_steps=2", "evaluate.spectral_radius=true")
    found = run.evaluation.run(run.module, run.data)
    assert list(found)[-4:] == ["spectral_radius", "forward_s", "backward_s", "step_s"]
    assert found["step_s"].value > found["forward_s"].value > 0 and found["step_s"].samples == 2
    assert 0 < found["spectral_radius"].value < 0.9 and found["spectral_radius"].samples == 20
    assert run.module.net.deq.last is None and not run.module.net.deq.keep_last
    again = run.evaluation.run(run.module, run.data)
    assert again["spectral_radius"].value == found["spectral_radius"].value and again["loss"] == found["loss"]
    assert "forward_s" not in run.evaluation.curve(run.module, run.data)


def test_an_evaluation_leaves_the_module_in_its_mode(split):
    run = split()
    run.module.train()
    run.module.net.drop.eval()
    run.evaluation.run(run.module, run.data)
    assert run.module.training and not run.module.net.drop.training and run.module.net.calls == 0


@pytest.mark.parametrize(("word", "message"), [
    ("evaluate.samples=0", r"evaluate.samples must be >= 1 or null, got 0"),
    ("evaluate.timed_steps=-1", r"evaluate.timed_steps must be >= 0, got -1"),
    ("evaluate.split=tset", r"evaluate.split=tset is no split of the data. Closest: test"),
    ("evaluate.split=[test,tran]", r"evaluate.split=tran is no split of the data. Closest: train"),
    ("evaluate.curve_split=val", r"evaluate.curve_split=val is no split of the data. .*Splits: train, test"),
])  # fmt: skip
def test_a_split_evaluation_that_cannot_be(word, message, split):
    with pytest.raises(Exception, match=message):
        split(word)


def test_the_wrong_evaluation_for_a_module_is_refused_before_training(composed, toy, toy_config, tmp_path):
    with pytest.raises(UserError, match=r"evaluate=split needs Edm.evaluation_step, which it does not have"):
        images = composed(tmp_path / "run")
        assemble(toy_config(tmp_path / "run", project=images.project, data=images.data), training=True, measuring=True)
    generator = composed(tmp_path / "run", *MEASURED).evaluate
    with pytest.raises(UserError, match=r"evaluate measures generated images, but Task makes none"):
        assemble(toy_config(tmp_path / "run", evaluate=generator), training=True, measuring=True)


def test_an_empty_split_is_one_sentence(split, monkeypatch):
    run = split()
    monkeypatch.setattr(type(run.data), "eval_batches", lambda self, split: iter(()))
    with pytest.raises(UserError, match="The split test of the data is empty"):
        run.evaluation.run(run.module, run.data)


def test_ranks_add_up(monkeypatch):
    """Two ranks with unequal shares, the second without solver statistics."""
    shares = [{"loss": (6.0, 2.0), "nfe": (8.0, 2.0)}, {"loss": (1.0, 5.0)}]
    monkeypatch.setattr(evaluate, "_rank", lambda: (0, 2))

    def gather(into, own):
        into[:] = shares

    monkeypatch.setattr(torch.distributed, "all_gather_object", gather, raising=False)
    assert evaluate._add_up(shares[0]) == {"loss": (7.0, 7.0), "nfe": (8.0, 2.0)}
    shares[:] = [{"matrix": (torch.eye(2), 1.0)}, {"matrix": (torch.ones(2, 2), 2.0)}]
    total, count = evaluate._add_up(shares[0])["matrix"]
    assert total.tolist() == [[2, 1], [1, 2]] and count == 3.0
