"""The command that makes reference statistics."""

import re
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

from common.metrics.fid import GaussianStatistics
from tools import fid_ref


def call(capsys, *arguments):
    code = fid_ref.main([str(a) for a in arguments])
    out = capsys.readouterr()
    return code, out.out, out.err


def test_digits(tmp_path, capsys):
    out = tmp_path / "digits.npz"
    code, text, _ = call(
        capsys, "--data", "digits", "--extractor", "digits", "--out", out, "--cache-dir", tmp_path, "--device", "cpu"
    )
    statistics = GaussianStatistics.load(out)
    assert code == 0 and statistics.n == 1400 and statistics.dim == 64
    for word in (statistics.record["extractor_hash"], statistics.record["fingerprint"], "digits/train", "1400"):
        assert word in text


def test_cifar10_with_its_resnet(data_root, tmp_path, capsys):
    out = tmp_path / "c.npz"
    code, text, err = call(
        capsys, "--data", "cifar10", "--root", data_root, "--split", "test", "--limit", 40, "--out", out,
        "--device", "cpu",
    )  # fmt: skip
    assert code == 0 and "cifar10/test[:40]" in text and "f025007d39f99e94" in text
    assert "warning: 40 images give a singular covariance of 64-d features" in err
    assert GaussianStatistics.load(out).n == 40


def test_folder_of_images(tmp_path, capsys):
    pixels = np.random.default_rng(0).integers(0, 256, (30, 2, 2, 3), dtype=np.uint8)
    for k, array in enumerate(pixels):
        Image.fromarray(array).save(tmp_path / f"{k:02d}.png")
    out = tmp_path / "f.npz"
    code, _, err = call(capsys, "--data", tmp_path, "--extractor", "pixels", "--out", out, "--device", "cpu")
    flat = pixels.transpose(0, 3, 1, 2).reshape(30, 12) / 127.5 - 1
    assert code == 0 and not err
    np.testing.assert_allclose(GaussianStatistics.load(out).cov().numpy(), np.cov(flat.T), rtol=1e-5, atol=1e-8)


@pytest.mark.parametrize(
    "arguments, words",
    [
        (["--data", "cifar1O", "--out", "a.npz"], "Closest: cifar10"),
        (["--data", "digits", "--out", "a.pkl"], r"--out must end in \.npz"),
        (["--data", "digits", "--out", "a.npz", "--split", "val"], "train, test, got 'val'"),
        (["--data", "digits", "--out", "a.npz", "--limit", "0"], "limit must be >= 1"),
        (["--data", "digits", "--out", "a.npz", "--batch-size", "0"], "--batch-size must be >= 1, got 0"),
        (["--data", "digits", "--out", "a.npz", "--extractor", "resnet65"], "Closest: resnet56"),
        (["--data", "digits", "--out", "a.npz", "--extractor", "timm:resnet18"], "needs --weights"),
        (["--data", "digits", "--out", "a.npz", "--extractor", "inception"], "weights-inception-2015-12-05-6726825d"),
        (["--data", "cifar10", "--out", "a.npz"], "CIFAR-10 not found: .* Set --root"),
        (["--data", "digits", "--extractor", "pixels", "--out", "a.npz", "--device", "tpu9"], "--device tpu9 cannot"),
    ],
)
def test_bad_input_is_one_sentence_and_exit_code_2(arguments, words, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    code, text, err = call(capsys, *arguments, "--root", tmp_path / "nowhere")
    assert code == 2 and not text
    assert re.search(words, err) and err.startswith("error: ") and err.count("\n") == 1
    assert not (tmp_path / "a.npz").exists()


def test_help_does_not_load_torch(repo):
    code = "import sys; from tools import fid_ref; fid_ref._parser().format_help(); assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], cwd=repo, check=True)
