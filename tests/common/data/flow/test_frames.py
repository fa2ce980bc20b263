"""Frames of a film without ground truth."""

import numpy as np
import pytest
import torch
from PIL import Image

from common.data.flow.frames import Frames
from common.errors import UserError


def save(path, value, size=(6, 8)):
    Image.fromarray(np.full((*size, 3), value, np.uint8)).save(path)


def test_sequences_are_told_apart_and_sorted_by_number(tmp_path):
    for number in (2, 10, 9):
        save(tmp_path / f"walk_{number}.png", number)
    for number in (1, 2):
        save(tmp_path / f"run{number:04d}.png", 100 + number)
    (tmp_path / "notes.txt").write_text("")
    frames = Frames(str(tmp_path))
    assert frames.sequences == {"run": 2, "walk": 3}
    assert frames.read("walk")[:, 0, 0, 0].tolist() == [2, 9, 10]
    assert frames.read().shape == (2, 3, 6, 8) and frames.read().dtype == torch.uint8
    with pytest.raises(UserError, match=r"no sequence 'wlak'\. Closest: walk\. Sequences: run, walk"):
        frames.read("wlak")
    save(tmp_path / "walk_11.png", 0, (6, 9))
    with pytest.raises(UserError, match=r"walk_11\.png is 9x6, the first frame 8x6"):
        Frames(str(tmp_path)).read("walk")


def test_numbers_alone_and_animations(tmp_path):
    (tmp_path / "film").mkdir()
    for number in (1, 2, 3):
        save(tmp_path / "film" / f"{number:05d}.png", number)
    assert Frames(str(tmp_path / "film")).sequences == {"film": 3}
    pictures = [Image.fromarray(np.full((6, 8, 3), value, np.uint8)) for value in (0, 120, 250)]
    pictures[0].save(tmp_path / "a.gif", save_all=True, append_images=pictures[1:])
    frames = Frames(str(tmp_path / "a.gif"))
    assert frames.sequences == {"a": 3}
    assert (frames.read()[:, 0, 0, 0].float() - torch.tensor([0.0, 120, 250])).abs().max() < 6


def test_names_without_numbers_are_one_clip_and_a_list_keeps_its_order(tmp_path):
    (tmp_path / "mine").mkdir()
    for value, name in enumerate(("second.png", "first.png")):
        save(tmp_path / "mine" / name, value)
    frames = Frames(tmp_path / "mine")
    assert frames.sequences == {"mine": 2} and frames.read()[:, 0, 0, 0].tolist() == [1, 0]
    listed = Frames([tmp_path / "mine/second.png", tmp_path / "mine/first.png"])
    assert listed.sequences == {"second-first": 2} and listed.read()[:, 0, 0, 0].tolist() == [0, 1]
    with pytest.raises(UserError, match="list of frames is empty"):
        Frames([])


def test_what_is_no_film_is_said(tmp_path):
    with pytest.raises(UserError, match=r"nothing is missing\. Give a folder of frames"):
        Frames(str(tmp_path / "nothing"))
    (tmp_path / "film.mp4").write_bytes(b"x")
    with pytest.raises(UserError, match=r"film\.mp4 holds no pictures.*ffmpeg"):
        Frames(str(tmp_path / "film.mp4"))


def test_the_two_clips(data_folder):
    frames = Frames(str(data_folder("flow") / "video"))
    assert frames.sequences == {"middlebury_RubberWhale": 8, "sintel_alley_1": 10}
    assert frames.read("middlebury_RubberWhale").shape == (8, 3, 388, 584)
