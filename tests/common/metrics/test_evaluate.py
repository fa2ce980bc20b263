"""From images to records."""

import pytest
import torch

from common.data.images.digits import digits_split
from common.errors import UserError
from common.metrics.evaluate import GeneratorEvaluation
from common.metrics.features import DigitsClassifier, Pixels
from common.metrics.fid import GaussianStatistics, frechet_distance
from common.metrics.images import from_uint8
from common.metrics.measurement import compare, ratio
from common.metrics.reference import TensorImages


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    return str(tmp_path_factory.mktemp("metrics"))


@pytest.fixture(scope="module")
def extractors(cache):
    return [DigitsClassifier(cache_dir=cache), Pixels(channels=1, resolution=8)]


@pytest.fixture(scope="module")
def digits():
    train_x, _, test_x, _ = digits_split()
    train = TensorImages(images=torch.as_tensor(train_x), name="digits/train")
    return train, TensorImages(images=torch.as_tensor(test_x), name="digits/test")


@pytest.fixture
def evaluation(extractors, cache):
    def make(**options):
        options = {"extractors": extractors, "samples": 300, "cache_dir": cache, "device": "cpu", **options}
        return GeneratorEvaluation(**options)

    return make


def test_value_is_the_distance_by_hand_and_the_record_is_complete(evaluation, extractors, digits):
    train, test = digits
    images = from_uint8(test._images)
    table = evaluation()(images.split(64), train)
    assert list(table) == ["FD-digits", "FD-pixels"]
    flat = images[:300].flatten(1)
    seen = GaussianStatistics(dim=64).update(flat)
    real = GaussianStatistics(dim=64).update(from_uint8(train._images).flatten(1))
    record = table["FD-pixels"]
    assert record.value == pytest.approx(frechet_distance(seen, real), rel=1e-6)
    assert (record.samples, record.rounding, record.ddof) == (300, "edm", 1)
    assert record.reference == "digits/train (1400 images)"
    assert record.extractor_hash == extractors[1].hash and len(record.reference_hash) == 16
    assert record.reference_hash != table["FD-digits"].reference_hash


def test_batching_does_not_matter_and_no_batch_is_drawn_in_vain(evaluation, digits):
    train, test = digits
    drawn = []

    def batches():
        for batch in from_uint8(test._images).split(150):
            drawn.append(len(batch))
            yield batch

    a = evaluation()(batches(), train)
    assert drawn == [150, 150]
    b = evaluation()(from_uint8(test._images).split(7), train)
    for name in a:
        assert compare(a[name], b[name]) == pytest.approx(0, abs=1e-6)


def test_floor_is_far_below_noise(evaluation, digits):
    """Measured once with another classifier: pixel floor 0.35; feature floor about 3, noise about 900."""
    train, test = digits
    floor = evaluation(samples=4000).floor(train, test)
    noise = evaluation(samples=4000).noise_ceiling(train)
    assert floor["FD-pixels"].samples == 397 and noise["FD-pixels"].samples == 4000
    assert floor["FD-pixels"].value == pytest.approx(0.35, abs=0.005)
    assert 1 < floor["FD-digits"].value < 6
    assert noise["FD-digits"].value > 100 * floor["FD-digits"].value
    with pytest.raises(UserError, match="differ in samples: 4000 and 397"):
        ratio(noise["FD-digits"], floor["FD-digits"])
    uniform = evaluation(samples=4000).noise_ceiling(train, kind="uniform")
    assert uniform["FD-pixels"].value != noise["FD-pixels"].value
    assert evaluation(samples=4000).noise_ceiling(train) == noise
    with pytest.raises(UserError, match="Closest: uniform"):
        evaluation().noise_ceiling(train, kind="unifrom")


def test_score_precision_and_recall_on_request(evaluation, digits):
    train, test = digits
    table = evaluation(inception_score=True, precision_recall=True)([test._images], train)
    assert list(table) == [
        "FD-digits", "IS-digits", "precision-digits", "recall-digits",
        "FD-pixels", "precision-pixels", "recall-pixels",
    ]  # fmt: skip
    assert 8 < table["IS-digits"].value <= 10 and table["IS-digits"].reference == "none"
    assert table["precision-digits"].value > 0.5 and table["recall-digits"].value > 0.5
    assert table["precision-pixels"].reference == "digits/train (300 of 1400 images)"
    whole = evaluation(precision_recall=True, samples=1400)([train._images], train)
    assert whole["precision-digits"].value == whole["recall-pixels"].value == 1.0


def test_recall_reference_is_spread_over_a_sorted_data_set(evaluation, digits):
    """All classes of a data set sorted by class must be in it, not the first ones only."""
    train_x, train_y, _, _ = digits_split()
    sorted_train = TensorImages(images=torch.as_tensor(train_x[train_y.argsort(kind="stable")]), name="sorted")
    table = evaluation(precision_recall=True)([digits[1]._images], sorted_train)
    assert table["precision-digits"].value > 0.5


def test_statistics_of_parts_merge_as_ranks_would(evaluation, digits):
    train, test = digits
    whole = evaluation()([test._images], train)
    make = evaluation()
    left, right = make.collect([test._images[:100]], samples=100), make.collect([test._images[100:300]], samples=200)
    for name in left:
        left[name].statistics.merge(right[name].statistics)
    joined = make.measure(left, train)
    for name in whole:
        assert joined[name].samples == 300
        assert joined[name].value == pytest.approx(whole[name].value, rel=1e-9)


def test_divisor_and_rounding_are_in_the_record_and_refuse_comparison(evaluation, digits):
    train, test = digits
    a, b = evaluation()([test._images], train), evaluation(ddof=0)([test._images], train)
    assert a["FD-pixels"].value != b["FD-pixels"].value
    with pytest.raises(UserError, match="ddof: 1 and 0"):
        compare(a["FD-pixels"], b["FD-pixels"])
    c = evaluation(rounding="floor255")([test._images], train)
    with pytest.raises(UserError, match="rounding"):
        compare(a["FD-pixels"], c["FD-pixels"])


@pytest.mark.parametrize(
    "options, words",
    [
        ({"samples": 0}, r"evaluate\.samples must be a whole number >= 1, got 0"),
        ({"samples": 1}, "at least 2 images, got samples=1"),
        ({"batch_size": 0}, r"evaluate\.batch_size must be a whole number >= 1, got 0"),
        ({"rounding": "edn"}, r"evaluate\.rounding must be one of .*Closest: edm"),
        ({"ddof": 2}, r"evaluate\.ddof must be one of 0, 1, got 2"),
        ({"extractors": []}, "extractors must hold at least one"),
    ],
)
def test_bad_options_are_named(evaluation, options, words):
    with pytest.raises(UserError, match=words):
        evaluation(**options)


def test_too_few_images_are_refused_with_both_counts(evaluation, digits):
    train, test = digits
    with pytest.raises(UserError, match="found 250 images, but expected at least 300"):
        evaluation()([test._images[:250]], train)
    with pytest.raises(UserError, match="found 300 images, but expected at least 1000"):
        evaluation(minimum=1000)([test._images], train)
    with pytest.warns(UserWarning, match="30 images give a singular covariance of 64-d"):
        evaluation(samples=30)([test._images], train)


def test_one_extractor_only_once(evaluation, extractors):
    with pytest.raises(UserError, match="each once"):
        evaluation(extractors=[extractors[0], extractors[0]])
