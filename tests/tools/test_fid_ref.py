"""The command that makes reference statistics."""

import re
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

from common.data.images.folder import ImageFolder
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


def uneven(folder, seed, count=40):
    """Pictures of mixed sizes, none of them square."""
    folder.mkdir()
    draws = np.random.default_rng(seed)
    for k in range(count):
        shape = (int(draws.integers(6, 12)), int(draws.integers(12, 20)), 3)
        Image.fromarray(draws.integers(0, 256, shape, dtype=np.uint8)).save(folder / f"{k}.png")
    return folder


def test_a_number_from_two_folders_of_pictures_of_any_size(tmp_path, capsys):
    """Against the distance computed from the fitted pixels by the formula."""
    mine, other = uneven(tmp_path / "mine", 0), uneven(tmp_path / "other", 1)
    words = ["--resolution", 4, "--fit", "center", "--extractor", "pixels", "--device", "cpu"]
    code, text, _ = call(capsys, "--data", mine, "--against", other, *words)
    flat = []
    for folder in (mine, other):
        files = ImageFolder(path=str(folder), resolution=4, fit="center").load("train")
        flat.append(np.stack([files.read(index) for index in range(40)]).reshape(40, -1) / 127.5 - 1)
    (mu, cov), (mu2, cov2) = ((x.mean(0), np.cov(x.T)) for x in flat)
    cross = np.sqrt(np.linalg.eigvals(cov @ cov2).real.clip(0)).sum()
    expected = ((mu - mu2) ** 2).sum() + np.trace(cov) + np.trace(cov2) - 2 * cross
    printed = float(re.search(r"^FD-pixels +(\S+)$", text, re.M).group(1))
    assert code == 0 and printed == pytest.approx(expected, rel=1e-4)  # six digits are printed
    # statistics in a file give the same number, and a folder is at no distance from itself
    assert call(capsys, "--data", other, "--out", tmp_path / "other.npz", *words)[0] == 0
    _, again, _ = call(capsys, "--data", mine, "--against", tmp_path / "other.npz", *words)
    assert float(re.search(r"^FD-pixels +(\S+)$", again, re.M).group(1)) == pytest.approx(printed, rel=1e-5)
    _, same, _ = call(capsys, "--data", mine, "--against", mine, *words)
    assert abs(float(re.search(r"^FD-pixels +(\S+)$", same, re.M).group(1))) < 1e-6


def test_pictures_that_are_not_square_name_options_that_exist(tmp_path, capsys):
    code, _, err = call(
        capsys, "--data", uneven(tmp_path / "mine", 0, 2), "--extractor", "pixels", "--against", "digits"
    )
    assert code == 2 and "Give --fit center" in err and "--resolution" in err and "data." not in err


def test_the_data_root_of_the_environment_is_used(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("DATA_ROOT", str(tmp_path / "sets"))
    code, _, err = call(capsys, "--data", "cifar10", "--out", tmp_path / "a.npz")
    assert code == 2 and str(tmp_path / "sets") in err


@pytest.mark.parametrize(
    "arguments, words",
    [
        (["--data", "cifar1O", "--out", "a.npz"], "Closest: cifar10"),
        (["--data", "digits"], "--out or --against is missing"),
        (["--data", "digits", "--out", "a.pkl"], r"--out must end in \.npz"),
        (["--data", "digits", "--out", "a.npz", "--split", "val"], "train, test, got 'val'"),
        (["--data", "digits", "--out", "a.npz", "--limit", "0"], "--limit must be a whole number >= 1, got 0"),
        (
            ["--data", "digits", "--out", "a.npz", "--batch-size", "0"],
            "--batch-size must be a whole number >= 1, got 0",
        ),
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
