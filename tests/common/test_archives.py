import io
import zipfile

import numpy as np
import pytest

from common import archives


def bomb(path, name="a.npy", size=80 << 20):
    """A zip whose one member unpacks to `size` zeros."""
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr(name, bytes(size))
    return path


def test_a_zip_bomb_is_refused_before_it_is_unpacked(tmp_path, monkeypatch):
    path = bomb(tmp_path / "bomb.zip")
    monkeypatch.setattr(zipfile.ZipFile, "open", lambda *a, **k: pytest.fail("it was unpacked"))
    with pytest.raises(zipfile.BadZipFile, match=r"would unpack from .* to 83,886,"):
        archives.open_zip(path)
    with pytest.raises(zipfile.BadZipFile), archives.open_npz(path):
        pass


def test_many_small_bombs_and_too_many_members_are_refused(tmp_path, monkeypatch):
    path = tmp_path / "many.zip"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for number in range(80):
            archive.writestr(f"{number}", bytes(1 << 20))
    with pytest.raises(zipfile.BadZipFile, match="would unpack"):
        archives.open_zip(path)
    monkeypatch.setattr(archives, "MOST_MEMBERS", 79)
    with pytest.raises(zipfile.BadZipFile, match="80 members"):
        archives.open_zip(path)


def test_members_that_share_bytes_are_refused(tmp_path):
    path = tmp_path / "shared.zip"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("a", bytes(1000))
        first = archive.infolist()[0]
        for number in range(9):  # more entries of the table for the same bytes
            again = zipfile.ZipInfo(f"b{number}")
            again.header_offset, again.CRC = first.header_offset, first.CRC
            again.file_size = again.compress_size = 1000
            archive.filelist.append(again)
            archive.NameToInfo[again.filename] = again
    with pytest.raises(zipfile.BadZipFile, match="overlap"):
        archives.open_zip(path)


def test_dense_but_small_members_and_ordinary_arrays_are_read(tmp_path):
    np.savez_compressed(tmp_path / "a.npz", zeros=np.zeros(1 << 20), words=np.array("text"))
    with archives.open_npz(tmp_path / "a.npz") as arrays:
        assert arrays["zeros"].sum() == 0 and str(arrays["words"]) == "text"
    with archives.open_zip(tmp_path / "a.npz") as archive:
        assert archive.namelist() == ["zeros.npy", "words.npy"]


def test_an_array_larger_than_its_bytes_is_refused(tmp_path):
    header = io.BytesIO()
    np.lib.format.write_array_header_1_0(header, {"descr": "<f8", "fortran_order": False, "shape": (10**12,)})
    with zipfile.ZipFile(tmp_path / "a.npz", "w") as archive:
        archive.writestr("mu.npy", header.getvalue() + bytes(80))
    with pytest.raises(zipfile.BadZipFile, match=r"mu.npy announces"), archives.open_npz(tmp_path / "a.npz"):
        pass
