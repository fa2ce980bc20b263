"""Feature extractors: published accuracy, stable hashes, refusal of missing or wrong weights."""

import hashlib
import io
import json
import pickle
import zipfile

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from common.data.images.digits import digits_split
from common.errors import UserError
from common.metrics import features
from common.metrics.features import (
    CifarResNet56,
    DigitsClassifier,
    EfficientNetLite0,
    Inception,
    Pixels,
    TimmFeatures,
    train_digits_classifier,
)


@pytest.fixture(scope="module")
def cifar_test(data_root):
    """The first 500 CIFAR-10 test images, read without our data module, and their labels."""
    mosaics = zipfile.ZipFile(data_root / "cifar10" / "test_batch.zip")
    images = [np.asarray(Image.open(io.BytesIO(mosaics.read(f"{k:03d}.webp"))).convert("RGB")) for k in range(5)]
    tiles = [m.reshape(10, 32, 10, 32, 3).transpose(0, 2, 4, 1, 3).reshape(100, 3, 32, 32) for m in images]
    labels = np.load(data_root / "cifar10" / "labels.npz")["test"][:500].astype(np.int64)
    return torch.from_numpy(np.concatenate(tiles)), torch.from_numpy(labels)


@pytest.fixture(scope="module")
def resnet56(data_root):
    return CifarResNet56(weights=str(data_root / "weights" / "cifar10_resnet56.safetensors"))


@pytest.fixture(scope="module")
def digits_cache(tmp_path_factory):
    return tmp_path_factory.mktemp("metrics")


@pytest.fixture(scope="module")
def digits(digits_cache):
    return DigitsClassifier(cache_dir=str(digits_cache))


def some_images(*shape, seed=0):
    return torch.randint(0, 256, shape, generator=torch.Generator().manual_seed(seed)).to(torch.uint8)


# CIFAR ResNet-56 ------------------------------------------------------------------------------------------------------


def test_resnet56_accuracy(resnet56, cifar_test):
    """470 of the first 500 test images, measured; the whole split gives the published 93.39 % (9339 of 10000)."""
    images, labels = cifar_test
    found, logits = resnet56.features_and_logits(images)
    assert int((logits.argmax(1) == labels).sum()) == 470
    assert found.shape == (500, resnet56.dim) == (500, 64) and found.dtype == torch.float32
    assert (resnet56.name, resnet56.metric) == ("resnet56", "FD-resnet56")


def test_hash_follows_weights_not_the_file(resnet56, data_root, tmp_path):
    state = load_file(data_root / "weights" / "cifar10_resnet56.safetensors")
    save_file(state, tmp_path / "copy.safetensors", metadata={"note": "other bytes, same weights"})
    assert CifarResNet56(weights=str(tmp_path / "copy.safetensors")).hash == resnet56.hash == "f025007d39f99e94"
    state["linear.bias"] = state["linear.bias"] + 1e-6
    save_file(state, tmp_path / "other.safetensors")
    assert CifarResNet56(weights=str(tmp_path / "other.safetensors")).hash != resnet56.hash


def test_batching_autocast_and_grey_change_nothing(resnet56):
    images = some_images(7, 3, 32, 32)
    whole = resnet56(images)
    small = CifarResNet56.__new__(CifarResNet56)
    small.__dict__ = {**resnet56.__dict__, "batch_size": 2}
    torch.testing.assert_close(small(images), whole, rtol=1e-4, atol=1e-5)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(resnet56(images), whole)
    assert not whole.requires_grad
    grey = images[:, :1]
    assert torch.equal(resnet56(grey), resnet56(grey.repeat(1, 3, 1, 1)))
    assert resnet56(images[:0]).shape == (0, 64)


@pytest.mark.parametrize("bad", [torch.zeros(2, 3, 32, 32), torch.zeros(3, 32, 32, dtype=torch.uint8)])
def test_only_batches_of_uint8(resnet56, bad):
    with pytest.raises(UserError, match="takes uint8 images"):
        resnet56(bad)


def test_wrong_weights_are_named(data_root, tmp_path):
    with pytest.raises(UserError, match=r"no ResNet-56 weights at .*nowhere\.safetensors.*set weights"):
        CifarResNet56(weights=str(tmp_path / "nowhere.safetensors"))
    small = data_root / "weights" / "cifar10_resnet20.safetensors"
    with pytest.raises(UserError, match=r"cifar10_resnet20\.safetensors"):
        CifarResNet56(weights=str(small))
    (tmp_path / "broken.safetensors").write_bytes(small.read_bytes()[:5000])
    with pytest.raises(UserError, match=r"broken\.safetensors"):
        CifarResNet56(weights=str(tmp_path / "broken.safetensors"))


# timm -----------------------------------------------------------------------------------------------------------------


def test_efflite0_equals_timm_with_its_own_pipeline(data_root, cifar_test):
    import timm

    weights = data_root / "weights" / "tf_efficientnet_lite0_in1k_fp16.safetensors"
    extractor = EfficientNetLite0(weights=str(weights))
    images = cifar_test[0][:3]
    found, logits = extractor.features_and_logits(images)
    assert found.shape == (3, extractor.dim) == (3, 1280) and logits.shape == (3, 1000)
    assert extractor.metric == "FD-efflite0"

    network = timm.create_model("tf_efficientnet_lite0", pretrained=False).eval()
    network.load_state_dict({k: v.float() for k, v in load_file(weights).items()}, strict=False)
    x = torch.nn.functional.interpolate(images.float(), size=224, mode="bicubic", antialias=True) / 127.5 - 1
    with torch.no_grad():
        torch.testing.assert_close(logits, network(x), rtol=1e-4, atol=1e-4)

    same = TimmFeatures(model="tf_efficientnet_lite0", weights=str(weights))
    assert (same.name, same.metric) == ("timm:tf_efficientnet_lite0", "FD-timm:tf_efficientnet_lite0")
    assert torch.equal(same(images), found)


def test_timm_model_and_weights_must_exist(tmp_path):
    with pytest.raises(UserError, match=r"no model 'resnet5o'\. Closest: resnet50"):
        TimmFeatures(model="resnet5o", weights="x.pth")
    with pytest.raises(UserError, match="no resnet18 weights at"):
        TimmFeatures(model="resnet18", weights=str(tmp_path / "x.pth"))


# Inception ------------------------------------------------------------------------------------------------------------


def test_missing_inception_says_what_to_get_and_where_to_put_it(tmp_path):
    with pytest.raises(UserError) as caught:
        Inception(weights=str(tmp_path / "inception.pth"))
    message = str(caught.value)
    assert str(tmp_path / "weights-inception-2015-12-05-6726825d.pth") in message
    assert "https://github.com/toshas/torch-fidelity/" in message and "FD-resnet56" in message


def test_inception_file_is_checked_before_it_is_unpickled(tmp_path):
    class Hostile:
        def __reduce__(self):
            return (open, (str(tmp_path / "touched"), "w"))

    path = tmp_path / "weights-inception-2015-12-05-6726825d.pth"
    path.write_bytes(pickle.dumps(Hostile()))
    with pytest.raises(UserError, match=r"SHA-256 starts with .*, expected 6726825d"):
        Inception(weights=str(path))
    torch.save({"a": Hostile()}, path)
    with pytest.raises(UserError, match="does not load as plain weights"):
        Inception(weights=str(path), sha256=hashlib.sha256(path.read_bytes()).hexdigest()[:8])
    assert not (tmp_path / "touched").exists()


def test_inception_gives_fid_in_torch_fidelity_order(tmp_path, monkeypatch):
    """Real weights cannot be had offline: random ones in the same wire format."""
    from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

    empty = io.BytesIO()
    torch.save({}, empty)
    empty.seek(0)
    with monkeypatch.context() as patch:
        patch.setattr(FeatureExtractorInceptionV3, "load_state_dict", lambda self, state: None)
        network = FeatureExtractorInceptionV3("x", ["2048", "logits_unbiased"], empty)
    path = tmp_path / "inception.pth"
    torch.save(network.state_dict(), path)
    extractor = Inception(weights=str(path), sha256=hashlib.sha256(path.read_bytes()).hexdigest())
    images = some_images(1, 3, 32, 32)
    found, logits = extractor.features_and_logits(images)
    with torch.no_grad():
        expected = network(images)
    torch.testing.assert_close(found, expected[0])
    torch.testing.assert_close(logits, expected[1])
    assert found.shape == (1, 2048) and logits.shape == (1, 1008) and extractor.metric == "FID"


# Digits ---------------------------------------------------------------------------------------------------------------


def test_digits_classifier_reads_unseen_digits(digits):
    _, _, test_x, test_y = digits_split()
    found, logits = digits.features_and_logits(torch.as_tensor(test_x))
    assert (logits.argmax(1) == torch.as_tensor(test_y)).double().mean() > 0.95
    assert found.shape == (397, 64) and digits.metric == "FD-digits"


def test_digits_training_is_bitwise_deterministic(digits, digits_cache):
    """Also from another global seed and thread count, and it leaves both alone."""
    (cached,) = digits_cache.glob("digits-classifier-*.safetensors")
    torch.manual_seed(123)
    before = torch.random.get_rng_state()
    torch.set_num_threads(2)
    state = train_digits_classifier()
    assert torch.get_num_threads() == 2
    assert torch.equal(torch.random.get_rng_state(), before)
    stored = load_file(cached)
    assert stored.keys() == state.keys() and all(torch.equal(stored[k], state[k]) for k in state)
    assert all(torch.equal(v * 1024, (v * 1024).round()) for v in state.values())


def test_digits_cache_is_used_and_a_damaged_one_is_replaced(digits, digits_cache, tmp_path, monkeypatch):
    (cached,) = digits_cache.glob("digits-classifier-*.safetensors")
    good = cached.read_bytes()
    state = load_file(cached)
    calls = []

    def train():
        calls.append(1)
        return state

    monkeypatch.setattr(features, "train_digits_classifier", train)
    copy = tmp_path / cached.name
    copy.write_bytes(good)
    assert DigitsClassifier(cache_dir=str(tmp_path)).hash == digits.hash and not calls
    flipped = bytearray(good)
    flipped[-3] ^= 1
    for damaged in (good[:300], bytes(flipped)):
        copy.write_bytes(damaged)
        with pytest.warns(UserWarning, match="is damaged .* training the digits classifier again"):
            assert DigitsClassifier(cache_dir=str(tmp_path)).hash == digits.hash
        assert load_file(copy).keys() == state.keys()
    assert len(calls) == 2
    assert json.loads(good[8 : 8 + int.from_bytes(good[:8], "little")])["__metadata__"]["hash"]


def test_digits_take_only_digits(digits):
    with pytest.raises(UserError, match=r"\(B, 1, 8, 8\)"):
        digits(some_images(2, 3, 32, 32))


# Pixels ---------------------------------------------------------------------------------------------------------------


def test_pixels_are_the_image_in_minus_one_to_one():
    extractor = Pixels(channels=1, resolution=2)
    images = torch.tensor([0, 255, 51, 204], dtype=torch.uint8).view(1, 1, 2, 2)
    torch.testing.assert_close(extractor(images), torch.tensor([[-1.0, 1.0, -0.6, 0.6]]))
    assert extractor.features_and_logits(images)[1] is None and not extractor.classifies
    assert extractor.hash != Pixels(channels=1, resolution=3).hash
    with pytest.raises(UserError, match="Set its channels and resolution"):
        extractor(some_images(1, 3, 2, 2))
    with pytest.raises(UserError, match="channels of pixels must be a whole number >= 1, got 0"):
        Pixels(channels=0, resolution=2)


def test_batch_size_must_be_positive():
    with pytest.raises(UserError, match="batch_size of the pixels extractor must be a whole number >= 1, got 0"):
        Pixels(channels=1, resolution=2, batch_size=0)


def test_averaged_pixels_are_means_of_blocks():
    images = torch.arange(16, dtype=torch.uint8).view(1, 1, 4, 4)
    extractor = Pixels(channels=1, resolution=4, side=2)
    assert extractor.name == "pixels2" and extractor.metric == "FD-pixels2" and extractor.dim == 4
    torch.testing.assert_close(extractor(images), torch.tensor([[2.5, 4.5, 10.5, 12.5]]) / 127.5 - 1)
    assert extractor.hash != Pixels(channels=1, resolution=4).hash
    with pytest.raises(UserError, match="side of pixels must divide the resolution 4, got 3"):
        Pixels(channels=1, resolution=4, side=3)


def test_weights_are_taken_from_the_first_place_that_has_them(data_root):
    there = str(data_root / "weights" / "cifar10_resnet56.safetensors")
    assert CifarResNet56(weights=["nowhere/a.safetensors", there]).hash == CifarResNet56(weights=there).hash
    with pytest.raises(UserError, match="no ResNet-56 weights at a/x or b/x"):
        CifarResNet56(weights=["a/x", "b/x"])
