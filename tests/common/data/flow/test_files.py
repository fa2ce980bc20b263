"""Flow files: round trips, torchvision's readers, and what is said about damaged ones."""

import struct

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.datasets._optical_flow import _read_16bits_png_with_flow_and_valid_mask, _read_flo
from torchvision.datasets.utils import _read_pfm

from common.data.flow.files import image_size, read_flow, read_image, write_flow
from common.errors import UserError


@pytest.fixture
def flow():
    generator = torch.Generator().manual_seed(0)
    return torch.randn(2, 7, 5, generator=generator) * 40


@pytest.fixture
def valid():
    return (torch.arange(35).view(7, 5) % 3 > 0).float()


@pytest.mark.parametrize("suffix", [".flo", ".pfm", ".FLO"])
@pytest.mark.parametrize("sparse", [False, True])
def test_float_files_keep_every_bit(tmp_path, flow, valid, suffix, sparse):
    path = tmp_path / f"a{suffix}"
    write_flow(path, flow, valid if sparse else None)
    found, known = read_flow(path)
    expected = valid if sparse else torch.ones(7, 5)
    assert torch.equal(known, expected) and torch.equal(found, flow * expected)
    assert found.dtype == known.dtype == torch.float32


@pytest.mark.parametrize("scale, most", [(64.0, 1 / 128), (1024.0, 1 / 2048)])
def test_png_rounds_to_its_steps(tmp_path, flow, valid, scale, most):
    path = tmp_path / "a.png"
    flow = flow.clamp(-31, 31)
    write_flow(path, flow, valid, scale=scale)
    found, known = read_flow(path, scale=scale)
    assert torch.equal(known, valid)
    assert ((found - flow).abs() * valid).max() <= most and not (found * (1 - valid)).any()
    on_grid = (flow * scale).round() / scale
    assert torch.equal(found, on_grid * valid)


def test_torchvision_reads_the_same(tmp_path, flow, valid):
    write_flow(tmp_path / "a.flo", flow)
    assert np.array_equal(_read_flo(str(tmp_path / "a.flo")), flow.numpy())
    write_flow(tmp_path / "a.pfm", flow)
    theirs = np.asarray(_read_pfm(str(tmp_path / "a.pfm")))
    assert np.array_equal(theirs[:2], flow.numpy())
    write_flow(tmp_path / "a.png", flow, valid)
    theirs, mask = _read_16bits_png_with_flow_and_valid_mask(str(tmp_path / "a.png"))
    found, known = read_flow(tmp_path / "a.png")
    assert np.array_equal(mask, known.numpy() > 0) and np.array_equal(theirs[:, mask], found.numpy()[:, mask])


def test_big_endian_pfm_and_unknown_flow(tmp_path):
    rows = np.arange(18, dtype=">f4").reshape(2, 3, 3)
    (tmp_path / "a.pfm").write_bytes(b"PF\n3 2\n1.0\n" + rows.tobytes())
    found, known = read_flow(tmp_path / "a.pfm")
    assert found[0].tolist() == [[9, 12, 15], [0, 3, 6]] and found[1, 0, 0] == 10 and known.all()
    values = np.array([[1, 2], [1.6e9, 0], [np.nan, 0]], "<f4")
    (tmp_path / "a.flo").write_bytes(b"PIEH" + struct.pack("<ii", 3, 1) + values.tobytes())
    found, known = read_flow(tmp_path / "a.flo")
    assert known.tolist() == [[1, 0, 0]] and found[:, 0].tolist() == [[1, 0, 0], [2, 0, 0]]


@pytest.mark.parametrize(
    "name, content, message",
    [
        ("a.flo", None, r"flow .*a\.flo cannot be read \(there is no such file"),
        ("a.flo", b"HEIP" + bytes(20), r"a\.flo cannot be read \(it does not begin with PIEH\)"),
        ("a.flo", b"PIEH" + struct.pack("<ii", 4, 4) + bytes(8), r"a\.flo cannot .*head says 4x4.* 20 bytes"),
        ("a.flo", b"PIEH" + struct.pack("<ii", -1, 4), r"a\.flo cannot be read"),
        ("a.flo", b"PI", r"a\.flo cannot be read"),
        ("a.pfm", b"Pf\n3 2\n-1\n" + bytes(24), r"a\.pfm cannot .*no PFM of three channels"),
        ("a.pfm", b"PF\n3 2\n-1\n" + bytes(24), r"a\.pfm cannot .*head says 3x2"),
        ("a.pfm", b"PF", r"a\.pfm cannot be read"),
        ("a.png", b"\x89PNG\r\n\x1a\n" + bytes(30), r"a\.png cannot be read"),
        ("a.exr", b"", r"a\.exr is no flow file: the name must end with one of \.flo, \.png, \.pfm"),
    ],
)
def test_damage_is_named(tmp_path, name, content, message):
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=message):
        read_flow(tmp_path / name)


def test_eight_bit_png_is_no_flow(tmp_path):
    Image.fromarray(np.zeros((4, 4, 3), np.uint8)).save(tmp_path / "a.png")
    with pytest.raises(UserError, match=r"a\.png cannot be read \(it is no 16-bit RGB picture but torch.uint8"):
        read_flow(tmp_path / "a.png")


def test_what_cannot_be_written(tmp_path, flow, valid):
    with pytest.raises(UserError, match=r"a\.png reaches 600 pixels, a \.png with scale 64 holds 512"):
        write_flow(tmp_path / "a.png", torch.full((2, 3, 3), 600.0))
    write_flow(tmp_path / "a.png", torch.full((2, 3, 3), 600.0), torch.zeros(3, 3))
    with pytest.raises(UserError, match=r"a\.flo holds values that are not finite"):
        write_flow(tmp_path / "a.flo", torch.full((2, 3, 3), torch.nan))
    with pytest.raises(
        UserError, match=r"must be \(2, H, W\) with valid \(H, W\), got \(2, 7, 5\) with valid \(5, 7\)"
    ):
        write_flow(tmp_path / "a.flo", flow, valid.T)
    with pytest.raises(UserError, match="must end with one of"):
        write_flow(tmp_path / "a.npy", flow)


def test_pictures(tmp_path):
    Image.fromarray(np.full((4, 6), 7, np.uint8)).save(tmp_path / "grey.png")
    image = read_image(tmp_path / "grey.png")
    assert image.shape == (3, 4, 6) and image.dtype == torch.uint8 and (image == 7).all()
    assert image_size(tmp_path / "grey.png") == (4, 6)
    (tmp_path / "bad.png").write_bytes(b"no picture")
    for reader in (read_image, image_size):
        with pytest.raises(UserError, match=r"picture .*bad\.png cannot be read"):
            reader(tmp_path / "bad.png")
        with pytest.raises(UserError, match=r"picture .*none\.png cannot be read \(there is no such file"):
            reader(tmp_path / "none.png")
